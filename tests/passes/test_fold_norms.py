from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import FoldNorms
from resq_compiler.passes.fold_norms import measure_costs

from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Embedding, Norm

LAYER_NORM = aten.layer_norm.default
FP64 = 1e-9  # relative; float64 rounding of a two-layer model is near 1e-14


def norm_gains(built):
    norms = [Norm.require(g.norm) for g in built.topology.residual.readers if g.norm is not None]
    return [norm.gain for norm in norms]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi3"])
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


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_leaves_alone_models_whose_stream_cannot_change_basis(family, build):
    """U_A is multiplied in behind the gains, so that values are quantized with them."""
    built = build(family, "fold-norms")
    assert FoldNorms().run(built.gm, built.ctx) == 0
    assert all(gain is not None for gain in norm_gains(built))


def test_where_folding_costs_too_much_nothing_is_folded(build):
    """A channel 1,000 times the others, put down by the gains: U_A of the stream stays online, with a note and a table that say why."""
    built = build("llama", "fold-norms")
    embedding = next(n for n in built.topology.residual.writers if Embedding.of(n))
    table = Embedding.require(embedding).table_tensor(built.gm).clone()
    table[:, 3] = 250.0
    graph_tools.set_tensor(built.gm, str(Embedding.require(embedding).table.target), table)
    for group in built.topology.readers:
        gain = torch.full((64,), 100.0).index_fill(0, torch.tensor([3]), 1e-3)
        graph_tools.set_tensor(built.gm, str(Norm.require(group.norm).gain.target), gain)
    assert FoldNorms().run(built.gm, built.ctx) == 0
    assert not built.topology.residual.fusable and all(gain is not None for gain in norm_gains(built))
    assert [note for note in built.ctx.notes if "U_A stays online" in note and "folding the gains" in note]
    assert len(built.ctx.lines) == 2 + 4


def test_folding_costs_nothing_where_gains_are_alike(build):
    built = build("llama", "fold-norms")
    (_, *costs) = [cost for _, cost in measure_costs(built.gm, built.topology, built.ctx)]
    assert all(abs(cost.lost) < 1 for cost in costs)  # dB; gains of 1, give or take 0.2
    built.ctx.calibration = None  # nothing to measure with: folded
    assert FoldNorms(most_lost=0.0).run(built.gm, built.ctx) == 5


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "quik"])
def test_recipes_that_rotate_nothing_do_without_it(recipe, build):
    """What the quantizers see is the value with its gain, and a LayerNorm stays one."""
    for family in ("llama", "opt"):
        built = build(family, "partition-linears", recipe=recipe)
        assert "fold-norms" not in [stage.name for stage in built.pipeline.stages]
        assert all(gain is not None for gain in norm_gains(built))


def test_leaves_alone_q_and_k_norms(build):
    built = build("qwen3", "compute-bases")
    norms = built.gm.graph.find_nodes(op="call_function", target=ops.rms_norm)
    assert sum(n.args[1] is not None for n in norms) == 4 and len(norms) == 9


def test_does_not_write_into_the_users_weights(build, tiny):
    before = {k: v.clone() for k, v in tiny("opt").state_dict().items()}
    build("opt", "compute-bases")
    assert all(torch.equal(v, before[k]) for k, v in tiny("opt").state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt"])
def test_numerics(family, build):
    built = build(family, "fold-norms", double=True)
    built.pipeline.run(built.gm, [FoldNorms()])
    assert built.pipeline.stages[-1].max_error <= FP64


@pytest.mark.parametrize("family", ["llama", "olmo2", "opt"])
def test_idempotent(family, build):
    built = build(family, "compute-bases")
    assert FoldNorms().run(built.gm, built.ctx) == 0
