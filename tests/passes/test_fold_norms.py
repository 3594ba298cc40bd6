from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import FoldNorms

from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten

LAYER_NORM = aten.layer_norm.default
FP64 = 1e-9  # relative; float64 rounding of a two-layer model is near 1e-14


def norm_gains(built):
    return [g.norm.args[1] for g in built.topology.residual.readers if g.norm is not None]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_rewrites(family, build):
    built = build(family, "fold-norms")
    assert all(gain is not None for gain in norm_gains(built))
    assert FoldNorms().run(built.gm, built.ctx) == 5
    assert norm_gains(built) == [None] * 5


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox-sequential", "opt"])
def test_rewrites_layer_norm_to_rms_norm(family, build):
    built = build(family, "fold-norms")
    assert FoldNorms().run(built.gm, built.ctx) == 10  # 5 gains folded, 5 norms renamed
    assert not built.gm.graph.find_nodes(op="call_function", target=LAYER_NORM)
    for writer in built.topology.residual.writers:
        index = 0 if writer.target is aten.embedding.default else 1
        weight = graph_tools.get_tensor(built.gm, writer.args[index])
        mean = weight.mean(-1 if index == 0 else 0)
        assert mean.abs().max() < 1e-6  # centred over the hidden dimension, to float32 rounding


def test_leaves_alone_norms_that_write_into_the_stream(build):
    """OLMo2 has only post-norms: the final one is folded, those with a gain behind attention and feed-forward stay."""
    built = build("olmo2", "fold-norms")
    gained = built.topology.residual.gained_writers
    assert len(gained) == 4
    assert FoldNorms().run(built.gm, built.ctx) == 1
    assert all(n.args[1] is not None for n in gained)


def test_leaves_alone_q_and_k_norms(build):
    built = build("qwen3", "compute-bases")
    norms = built.gm.graph.find_nodes(op="call_function", target=ops.rms_norm)
    assert sum(n.args[1] is not None for n in norms) == 4 and len(norms) == 9


def test_does_not_write_into_the_users_weights(build, tiny):
    before = {k: v.clone() for k, v in tiny("opt").state_dict().items()}
    build("opt", "compute-bases")
    assert all(torch.equal(v, before[k]) for k, v in tiny("opt").state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2", "gpt_neox", "opt"])
def test_numerics(family, build):
    built = build(family, "fold-norms", double=True)
    built.pipeline.run(built.gm, [FoldNorms()])
    assert built.pipeline.stages[-1].max_error <= FP64


@pytest.mark.parametrize("family", ["llama", "olmo2", "opt"])
def test_idempotent(family, build):
    built = build(family, "compute-bases")
    assert FoldNorms().run(built.gm, built.ctx) == 0
