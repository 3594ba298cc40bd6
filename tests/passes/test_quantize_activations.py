from __future__ import annotations

import weakref

import pytest
import torch
from resq_compiler.passes import QuantizeActivations, quantize_activations
from resq_compiler.passes.quantize_activations import groups_of, may_clip, open_parts, search_clips

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.numerics.clip import SHARES, ClipSearch
from resq_compiler.tiny import tiny_tokens

BEFORE_WEIGHTS = {"gptq_on_quantized_activations": True}


def quantizers(gm):
    return gm.graph.find_nodes(op="call_function", target=ops.quantize)


@pytest.mark.parametrize("options", [{}, BEFORE_WEIGHTS], ids=str)
def test_rewrites(options, build):
    built = build("llama", "quantize-activations", **options)
    linears = [n for n in built.gm.graph.nodes if meta.get(n, meta.LinearPart)]
    assert QuantizeActivations().run(built.gm, built.ctx) == len(linears) == 26
    found = quantizers(built.gm)
    assert len(found) == 2 * 7  # for each block: attention, o and mlp inputs at 4 and 8 bits, down at 4
    assert len({meta.get(n, meta.QuantizerSite).name for n in found}) == len(found)
    targets = {n.target for n in built.gm.graph.nodes if meta.get(n, meta.LinearPart)}
    assert targets == ({aten.linear.default} if options else {ops.quantized_linear})


@pytest.mark.parametrize("granularity, groups", [("head", {1, 4}), ("token", {1})])
def test_granularity_of_o_proj(granularity, groups, build):
    built = build("llama", "quantize-kv-cache", o_proj_granularity=granularity, weight_method="rtn")
    assert {n.args[2] for n in quantizers(built.gm)} == groups


@pytest.mark.parametrize(
    "width, size, groups",
    [
        (504, 32, 14),
        (486, 32, 18),
        (504, 64, 8),
        (500, 64, 10),
        (1344, 128, 12),
        (64, 128, 1),
        (61, 32, 1),
        (9, 128, 1),
    ],
)
def test_equal_groups_of_the_nearest_width(width, size, groups):
    assert groups_of(width, size) == groups


@pytest.mark.parametrize("clip", [0.9, "output"])
def test_inputs_in_groups(clip, build):
    """Of attention, feed-forwards and down projections; those of output projections go by heads."""
    options = dict(activation_group_size=32, activation_clip=clip, weight_method="rtn", high_fraction=0.0)
    built = build("llama", "quantize-kv-cache", **options)
    found = {(meta.get(n, meta.QuantizerSite).name.split(".")[2], n.args[1]): n.args[2] for n in quantizers(built.gm)}
    assert found == {("attention_input", 4): 2, ("mlp_input", 4): 2, ("o_input", 4): 4, ("down_input", 4): 5}
    assert not built.ctx.notes or not any("activation_group_size" in note for note in built.ctx.notes)


def test_parts_of_8_bits_are_not_cut(build):
    options = dict(activation_group_size=32, down_proj="energy-split", weight_method="rtn")
    built = build("llama", "quantize-kv-cache", **options)
    found = {(meta.get(n, meta.QuantizerSite).name.split(".")[2], n.args[1]): n.args[2] for n in quantizers(built.gm)}
    assert found == {
        ("attention_input", 4): 2, ("attention_input", 8): 1, ("mlp_input", 4): 2, ("mlp_input", 8): 1,
        ("o_input", 4): 4, ("o_input", 8): 4, ("down_input", 4): 4, ("down_input", 8): 1,
    }  # fmt: skip
    built = build("llama", "quantize-kv-cache", activation_bits=8, **options)
    assert (
        "activation_group_size=32: nothing is cut, because inputs have no part of less than 8 bits" in built.ctx.notes
    )


def test_the_share_of_groups_that_loses_least():
    """A channel that outgrows the others decides about its own group alone; whole rows would rather cut it off."""
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0] * 63 + [3.0])
    found = {}
    for groups in (1, 4):
        search = ClipSearch(4, groups=groups)
        search.update(x)
        found[groups] = search.best()
        errors = [
            float(((ops.dequantize(ops.quantize(x, 4, groups, share)) - x).square().sum(-1) / x.square().sum(-1)).sum())
            for share in SHARES
        ]
        assert errors[SHARES.index(found[groups])] <= min(errors) * (1 + 1e-5)
    assert found[1] < found[4]


def test_groups_that_do_not_fit_are_told(build):
    options = dict(down_proj="energy-split", site_fractions="down=7/80")
    built = build("llama", "quantize-kv-cache", activation_group_size=32, weight_method="rtn", **options)
    (note,) = [note for note in built.ctx.notes if "activation_group_size" in note]
    assert "no divisor near it" in note and "73 of 146" in note
    built = build("llama", "quantize-kv-cache", activation_group_size=128, weight_method="rtn")
    assert not [
        note for note in built.ctx.notes if "activation_group_size" in note
    ]  # parts that are narrower stay whole


def test_clip_holds_for_narrow_codes_but_not_for_the_output_projection(build):
    """8 bits lose more by clipping than by a wide step: on SmolLM2 perplexity went up by a tenth."""
    built = build("llama", "quantize-kv-cache", activation_clip=0.9, weight_method="rtn")
    clips = {(n.args[1], n.args[2]): n.args[3] for n in quantizers(built.gm)}  # (bits, groups)
    assert clips == {(4, 1): 0.9, (8, 1): 1.0, (4, 4): 1.0, (8, 4): 1.0}


def test_searched_clips_lose_least(build):
    """Every other share, put in the place of the one found, has a larger error on the tokens of the search (relative, row by row)."""
    built = build("llama", "quantize-kv-cache", activation_clip="input", activation_bits=3, weight_method="rtn")
    nodes = [n for n in quantizers(built.gm) if n.args[1] == 3 and n.args[2] == 1]
    before = build(
        "llama", "quantize-activations", activation_bits=3, weight_method="rtn"
    ).gm  # float inputs, as the search sees them
    names = {n.name: n for n in before.graph.nodes}
    twins = [names[n.args[0].name] for n in nodes]
    env = executor.first_tokens(before, built.ctx.calibration)
    executor.Schedule(before, twins, env).run(env)
    assert len(nodes) == 6 and any(n.args[3] < 1 for n in nodes)  # attention, mlp and down inputs of two blocks
    for node, twin in zip(nodes, twins, strict=True):
        x = env[twin].flatten(0, -2)
        error = {
            share: float(
                ((ops.dequantize(ops.quantize(x, 3, 1, share)) - x).square().sum(-1) / x.square().sum(-1)).sum()
            )
            for share in SHARES
        }
        assert error[node.args[3]] <= min(error.values()) * (1 + 1e-5)  # float32 sums


def test_readers_are_held_for_one_block_at_a_time(build, monkeypatch):
    """A model of users' size has gigabytes of them."""
    held, most = weakref.WeakSet(), []

    class Seen(ClipSearch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            held.add(self)
            most.append(len(held))

    monkeypatch.setattr(quantize_activations, "ClipSearch", Seen)
    built = build("llama", "quantize-activations", activation_clip="output", weight_method="rtn")
    sites = [part.site.block for node, part in open_parts(built.gm) if may_clip(part)]
    with executor.batches_of(built.ctx.windows.shape[1]):
        search_clips(built.gm, built.ctx, by_output=True)
    assert len(most) == 6 and max(most) == 3 and len(set(sites)) == 2 and not held


@pytest.mark.parametrize("options", [{"weight_method": "rtn"}, BEFORE_WEIGHTS], ids=str)
def test_searches_by_output_see_the_weights_that_read(options, build):
    """Float ones before weights are quantized, the image of codes after: all linears of one input, and the right columns of them."""
    built = build("llama", "quantize-activations", activation_clip="output", activation_bits=3, **options)
    before = {node.args[0]: [] for node, part in open_parts(built.gm) if may_clip(part)}
    for node, part in open_parts(built.gm):
        if may_clip(part):
            weight = graph_tools.get_tensor(built.gm, node.args[1]).float()
            scale = 1.0 if options is BEFORE_WEIGHTS else graph_tools.get_tensor(built.gm, node.args[2])[:, None]
            before[node.args[0]].append(weight * scale)
    env = executor.first_tokens(built.gm, built.ctx.calibration)
    executor.Schedule(built.gm, list(before), env).run(env)
    clips = search_clips(built.gm, built.ctx, by_output=True)
    assert clips.keys() == before.keys() and {len(w) for w in before.values()} == {1, 2, 3}
    for node, weights in before.items():
        x, readers = env[node].flatten(0, -2), torch.cat(weights).double()
        gaps = {s: (ops.dequantize(ops.quantize(x, 3, 1, s)) - x).double() for s in SHARES}
        error = {
            s: float(((gap @ readers.T).square().sum(-1) / x.double().square().sum(-1)).sum())
            for s, gap in gaps.items()
        }
        assert error[clips[node]] <= min(error.values()) * (1 + 1e-5)


def test_the_search_is_told(build):
    built = build("llama", "quantize-activations", activation_clip="input", weight_method="rtn")
    built.pipeline.run(built.gm, [QuantizeActivations(clip="input")])
    lines = built.pipeline.stages[-1].lines
    assert len(lines) == 6 and all(line.startswith("clip of blocks.") for line in lines)
    assert any("blocks.1.down_input.part0" in line for line in lines)


def test_leaves_alone(build):
    """A16: no quantizer anywhere. Weight-only parts keep their float input."""
    built = build("llama", activation_bits=16, kv_bits=16, weight_method="rtn")
    assert not quantizers(built.gm)
    assert len(built.gm.graph.find_nodes(op="call_function", target=ops.weight_only_linear)) == 26


def test_numerics(build):
    """Every image is within half a step of the value it stands for, at the step of its own bits and group."""
    built = build("llama", "quantize-weights", **BEFORE_WEIGHTS)
    nodes = quantizers(built.gm)
    wanted = nodes + [n.args[0] for n in nodes]
    env = executor.first_tokens(built.gm, tiny_tokens(2, 16))
    executor.Schedule(built.gm, wanted, env).run(env)
    for node in nodes:
        codes, x = env[node], env[node.args[0]].flatten(0, 1)
        grouped = x.unflatten(-1, (codes.groups, -1))
        span = grouped.amax(-1).clamp_min(0) - grouped.amin(-1).clamp_max(0)
        step = codes.scale.flatten(0, 1)
        torch.testing.assert_close(step, span / (2 ** node.args[1] - 1), rtol=1e-6, atol=0)  # closed form of the step
        error = (ops.dequantize(codes).flatten(0, 1) - x).unflatten(-1, (codes.groups, -1)).abs().amax(-1)
        assert bool((error <= step * 0.5001 + step * 0.5).all())  # half a step, and half for the rounded zero-point


@pytest.mark.parametrize("options", [{}, BEFORE_WEIGHTS], ids=str)
def test_idempotent(options, build):
    built = build("llama", "quantize-kv-cache", **options)
    assert QuantizeActivations().run(built.gm, built.ctx) == 0
