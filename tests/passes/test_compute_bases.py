from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import ComputeBases

from resq_compiler.pipeline.run import prefill_and_decode
from resq_compiler.tiny import TINY_FAMILIES


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_rewrites(family, build):
    """It changes no node; it sets orthogonal bases of the right sizes."""
    built = build(family, "insert-projections")
    bases, topology = built.bases, built.topology
    for block in topology.blocks:
        a = block.attention
        assert bases.value[block.index].shape == (a.num_kv_heads, a.value_dim, a.value_dim)
        assert bases.key[block.index].shape == (a.head_dim, a.head_dim)
    assert (bases.residual is None) == (not topology.residual.fusable) == bool(bases.reading)
    stream = bases.reading.values() if bases.reading else [bases.residual]
    for u in (*stream, *bases.value, *bases.key):
        eye = torch.eye(u.shape[-1], dtype=torch.float64).expand_as(u)
        torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=1e-10)  # orthogonal to float64 rounding


def test_leaves_alone(build):
    built = build("llama", "compute-bases")
    before = [n.format_node() for n in built.gm.graph.nodes]
    built.pipeline.run(built.gm, [ComputeBases()])
    assert built.pipeline.stages[-1].rewrites == 0
    assert [n.format_node() for n in built.gm.graph.nodes] == before


def test_numerics(build):
    built = build("llama", "compute-bases")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [ComputeBases()])
    assert torch.equal(prefill_and_decode(built.gm, built.ctx.example_inputs), before)


def test_idempotent(build):
    built = build("llama", "rotate-bases")
    first = built.bases
    ComputeBases().run(built.gm, built.ctx)
    assert torch.equal(built.bases.residual, first.residual)
    assert all(torch.equal(a, b) for a, b in zip(built.bases.key, first.key, strict=True))
