from __future__ import annotations

import itertools

import pytest
import torch
from resq_compiler.passes import FoldNorms
from resq_compiler.passes.fold_norms import measure_costs

from resq_compiler.analysis.folding import FoldingCost
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Embedding, Norm
from resq_compiler.numerics import seeds
from resq_compiler.numerics.rotation import part_rotation

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


def with_an_enormous_channel(built, put_down=(0, 1, 2, 3)):
    """A channel 1,000 times the others from the embedding on, put down by the gains of these readers."""
    embedding = next(n for n in built.topology.residual.writers if Embedding.of(n))
    table = Embedding.require(embedding).table_tensor(built.gm).clone()
    table[:, 3] = 250.0
    graph_tools.set_tensor(built.gm, str(Embedding.require(embedding).table.target), table)
    for i, group in enumerate(built.topology.readers):
        small = torch.full((64,), 4.0).index_fill(0, torch.tensor([3]), 1e-3)
        gain = small if i in put_down else torch.ones(64)
        graph_tools.set_tensor(built.gm, str(Norm.require(group.norm).gain.target), gain)
    return built


def test_where_folding_costs_too_much_everywhere_nothing_is_folded(build):
    """U_A of the stream stays online, with a note and a table that say why."""
    built = with_an_enormous_channel(build("llama", "fold-norms"))
    assert FoldNorms().run(built.gm, built.ctx) == 0
    assert not built.topology.residual.fusable and all(gain is not None for gain in norm_gains(built))
    assert built.topology.online == built.topology.readers
    (note,) = [note for note in built.ctx.notes if "U_A stays online before 4 of 4 inputs" in note]
    assert "more than 8 (fold-norms, most-lost); a matrix of 64" in note
    assert [line.split()[-1] for line in built.ctx.lines[2:]] == ["online"] * 4


def test_where_folding_costs_too_much_at_some_norms_these_keep_their_gains(build):
    built = with_an_enormous_channel(build("llama", "fold-norms"), (0, 1))
    assert FoldNorms(most_lost=12.0).run(built.gm, built.ctx) == 3  # two and the head's
    assert built.topology.residual.fusable
    kept = [True, True, False, False]
    assert [group.online for group in built.topology.readers] == kept
    assert [gain is not None for gain in norm_gains(built)] == [*kept, False]
    assert [line.split()[-1] for line in built.ctx.lines[2:]] == ["online" if keep else "folded" for keep in kept]
    (note,) = built.ctx.notes
    assert "before 2 of 4 inputs" in note and "would cost up to 19 dB, more than 12" in note


def test_where_the_mean_cost_is_too_much_the_other_norms_keep_their_gains_too(build):
    built = with_an_enormous_channel(build("llama", "fold-norms"), (0, 1))
    assert FoldNorms(most_lost=8.0).run(built.gm, built.ctx) == 0
    assert not built.topology.residual.fusable and all(gain is not None for gain in norm_gains(built))
    (note,) = built.ctx.notes
    assert "before 4 of 4 inputs" in note and "would cost 9 dB in the mean, more than 8" in note


def test_what_folding_costs_is_what_quantizing_in_a_rotated_basis_shows():
    """8 bits for the strongest eighth of channels, 4 for the others, each part turned at random: the same difference, to a dB."""
    generator = seeds.generator(0, "folding")
    gain = 10 ** torch.randn(64, generator=generator, dtype=torch.float64).mul(0.3)
    weight = torch.randn(96, 64, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 64, generator=generator, dtype=torch.float64) / gain
    x[:, 3] *= 100
    x /= x.square().mean(-1, keepdim=True).sqrt()
    cost = FoldingCost(gain, None, False, weight.square().sum(0), 1 / 8)
    cost.see(x)

    def error(value, reader):
        order = value.square().sum(0).argsort()
        u = torch.eye(64, dtype=torch.float64)[:, order] @ part_rotation([56, 8], "orthogonal", generator)
        noise = ops.quantize_dequantize((value @ u).float(), ((4, 0, 56), (8, 56, 64))).double() - value @ u
        return 10 * (noise @ (reader @ u).T).square().sum(-1).log10()

    expected = float((error(x, weight * gain) - error(x * gain, weight)).mean())
    assert expected > 3 and abs(cost.lost - expected) < 1


def test_folding_costs_nothing_where_gains_are_alike(build):
    built = build("llama", "fold-norms")
    costs = [cost for _, cost in measure_costs(built.gm, built.topology.readers, 1 / 8, built.ctx)]
    assert len(costs) == 4 and all(abs(cost.lost) < 1 for cost in costs)  # dB; gains of 1, give or take 0.2
    built.ctx.calibration = None  # nothing to measure with: folded
    assert FoldNorms(most_lost=0.0).run(built.gm, built.ctx) == 5


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_a_norm_that_keeps_its_gain_in_a_stream_that_changes_basis(family, build):
    """The passes up to the quantizers are exact, and one matrix brings what a norm reads to its linears' own basis, gain and all."""
    built = build(family, "fold-norms", double=True)
    chosen = [built.topology.readers[i] for i in (0, 3)]
    for group in chosen:
        group.online = True
    windows, built.ctx.calibration = built.ctx.calibration, None  # nothing to choose by
    exact = list(itertools.takewhile(lambda item: item.exact, built.rest))
    built.pipeline.run(built.gm, exact[:1])
    built.ctx.calibration = windows
    built.pipeline.run(built.gm, exact[1:])
    assert all(stage.max_error <= FP64 for stage in built.pipeline.stages[-len(exact) :])
    assert len(built.bases.reading) == 2 and built.bases.residual is not None
    online = [n for n in built.gm.graph.nodes if (f := meta.get(n, meta.Projection)) and f.basis == "U_A"]
    assert [n.args[0] for n in online] == [group.value for group in chosen]
    assert all(Norm.require(group.norm).gain is None for group in built.topology.residual.readers)


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
