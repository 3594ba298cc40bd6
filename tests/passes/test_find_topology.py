from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import FindTopology

from resq_compiler.ir import meta
from resq_compiler.pipeline.run import prefill_and_decode


def test_rewrites(build):
    """It only labels: every linear gets a site, under the name of its module."""
    built = build("llama", "fold-norms")
    sites = {s.name: (s.role, s.block) for n in built.gm.graph.nodes if (s := meta.get(n, meta.LinearSite))}
    assert sites["model.layers.1.mlp.down_proj"] == ("down", 1) and sites["model.layers.0.self_attn.k_proj"] == ("k", 0)
    assert len(sites) == 15 and [v for v in sites.values() if v[0] == "head"] == [("head", None)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_leaves_alone(family, build):
    built = build(family, "find-topology")
    before = [n.format_node() for n in built.gm.graph.nodes]
    FindTopology().run(built.gm, built.ctx)
    assert [n.format_node() for n in built.gm.graph.nodes] == before


def test_numerics(build):
    built = build("llama", "find-topology")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [FindTopology()])
    assert torch.equal(prefill_and_decode(built.gm, built.ctx.example_inputs), before)


def test_idempotent(build):
    built = build("llama", "fold-norms")
    first = built.topology
    assert FindTopology().run(built.gm, built.ctx) == 0
    assert built.topology == first
