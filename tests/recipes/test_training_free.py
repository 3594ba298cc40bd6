"""Recipes of the literature that learn nothing: each has the property that defines it."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import SpreadOutliers

from resq_compiler.calibration.statistics import observe
from resq_compiler.errors import ConfigError
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import source
from resq_compiler.ir.transforms import TARGETS
from resq_compiler.ir.views import CodedLinear, Linear, Quantize
from resq_compiler.numerics.channels import Peak
from resq_compiler.numerics.spreading import greedy_rotation, spreading_transform, uniform_first_row, zigzag
from resq_compiler.numerics.transforms import Scaling
from resq_compiler.recipes import named

FP64 = 1e-9  # relative; scales and their inverses in float64


def peaks_at(built, nodes):
    """The largest magnitude of every channel of values, on the calibration windows."""
    found = {node: Peak(node.name) for node in nodes}
    observe(built.gm, {n: p.update for n, p in found.items()}, built.ctx.windows, lambda done, total: None)
    return {node: peak.sizes for node, peak in found.items()}


def test_smoothquant_meets_in_the_middle(build):
    """alpha 1/2: behind the scales the largest value of a channel is the largest weight of its column."""
    built = build("llama", "plan-columns", recipe="smoothquant", double=True)
    groups = built.topology.readers
    peaks = peaks_at(built, [group.value for group in groups])
    for group in groups:
        columns = torch.stack([Linear.require(n).weight_tensor(built.gm).abs().amax(0) for n in group.linears]).amax(0)
        torch.testing.assert_close(peaks[group.value], columns, rtol=1e-6, atol=0)
    stages = {stage.name: stage for stage in built.pipeline.stages}
    assert stages["smooth-channels"].max_error <= FP64 and stages["fuse-projections"].max_error <= FP64
    assert not [n for n in built.gm.graph.nodes if n.target in TARGETS]  # nothing is left online


@pytest.mark.parametrize("family", ["opt", "gemma2", "gpt_neox"])
def test_smoothquant_is_exact_in_other_families(family, build):
    built = build(family, "plan-columns", recipe="smoothquant", double=True)
    assert max(stage.max_error for stage in built.pipeline.stages[-3:] if stage.exact) <= FP64


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_awq_never_chooses_scales_that_lose(family, build):
    """Of every place the table says by how much the error of the block is below that without scales; all of it is exact and fused."""
    built = build(family, "partition-linears", recipe="awq", double=True, weight_group_size=32)
    stages = {stage.name: stage for stage in built.pipeline.stages}
    rows = [line.split() for line in stages["search-scales"].lines[2:]]
    gains = [float(row[-1]) for row in rows]
    assert min(gains) >= 0 and max(gains) > 0.1
    places = {row[0].partition(".")[2].partition(".")[2] for row in rows}
    assert places == (
        {"attention", "mlp", "down", "o"} if family == "opt" else {"attention", "mlp", "down"}
    )  # GQA: no o
    assert stages["search-scales"].max_error <= FP64 and stages["fuse-projections"].max_error <= FP64
    assert not [n for n in built.gm.graph.nodes if n.target in TARGETS]


def test_awq_quantizes_weights_alone_with_groups(build):
    built = build("llama", recipe="awq", weight_group_size=32)
    assert not built.gm.graph.find_nodes(op="call_function", target=ops.quantize)
    coded = [c for n in built.gm.graph.nodes if (c := CodedLinear.of(n)) is not None]
    assert len(coded) == 14 and all(c.group_size == 32 and not c.on_codes for c in coded)


def test_llm_int8_keeps_every_outlier_out_of_the_codes(build):
    built = build("llama", "quantize-weights", recipe="llm-int8", outlier_threshold=3.6)
    parts = {n: fact for n in built.gm.graph.nodes if (fact := meta.get(n, meta.LinearPart)) is not None}
    read = peaks_at(built, {source(n) for n in parts})
    stream = {n: fact for n, fact in parts.items() if fact.site.role != "o"}  # of heads, the strongest by energy
    for node, fact in stream.items():
        if fact.weight_bits == 8:
            assert read[source(node)].max() < 3.6, fact
    floats = [n for n, fact in stream.items() if fact.weight_bits == fact.activation_bits == 16]
    assert floats and all(bool((read[source(n)] >= 3.6).any()) for n in floats)
    whole = build("llama", recipe="llm-int8", outlier_threshold=3.6)
    bits = {q.bits for n in whole.gm.graph.nodes if (q := Quantize.of(n)) is not None}
    assert bits == {8} and sum(Linear.of(n) is not None for n in parts) == len(parts)


def test_llm_int8_keeps_half_at_most(build):
    built = build("llama", "compute-bases", recipe="llm-int8", outlier_threshold=0.01)
    assert all(item.high == 0.5 for item in built.plan.sites.items)
    assert [n for n in built.ctx.notes if "64 of 64 channels reach 0.01; the 32 largest stay" in n]


def test_duquant_lowers_the_peaks_of_every_linear(build):
    before = build("llama", "spread-outliers", recipe="duquant", double=True)
    values = [source(n) for n in before.topology.linears]
    peaks = peaks_at(before, set(values))
    before.pipeline.run(before.gm, [SpreadOutliers()])
    assert before.pipeline.stages[-1].max_error <= FP64
    after = build("llama", "partition-linears", recipe="duquant", double=True)
    inputs = {source(n) for n in after.topology.linears}
    assert all(meta.require(n, meta.Projection).online for n in inputs)  # the second rotation, fused with nothing
    turned = peaks_at(after, inputs)
    assert max(p.max() for p in turned.values()) < 0.75 * max(p.max() for p in peaks.values())
    assert (
        sum(meta.get(n, meta.Projection) is not None for n in after.gm.graph.nodes) == 2 * 8
    )  # two nodes, 4 sites, 2 blocks


def test_the_search_of_duquant():
    """The first row spreads channel 0; the greedy search never raises the peak; dealing makes sums of blocks alike."""
    spread = uniform_first_row(8, 0, "x")
    torch.testing.assert_close(spread @ spread.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(spread[0], torch.full((8,), 8**-0.5, dtype=torch.float64), rtol=0, atol=1e-12)
    rows = torch.randn(5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:, :, 3] *= 50
    u, turned = greedy_rotation(rows, spread, 64)
    torch.testing.assert_close(torch.einsum("tgd,gde->tge", rows, u), turned, rtol=1e-9, atol=1e-9)
    assert bool((turned.abs().amax((0, 2)) < 0.6 * rows.abs().amax((0, 2))).all())
    peaks = torch.arange(32.0)
    sums = peaks[zigzag(peaks, 8)].view(4, 8).sum(1)
    assert sums.max() - sums.min() <= 4
    transform = spreading_transform(rows.flatten(1), 8, 64, 0, "x")
    assert transform.orthogonal and transform.products == 2 * 4 * 64


def test_prefixquant_has_one_scale_for_all_tokens(build):
    """A token's codes do not depend on its size, and what is quantized lies in the range of the calibration text."""
    built = build("llama", recipe="prefixquant")
    quantizers = [q for n in built.gm.graph.nodes if (q := Quantize.of(n)) is not None]
    assert len(quantizers) == 8 and all(q.scale is not None and q.groups == 1 for q in quantizers)
    first = quantizers[0]
    x = torch.randn(2, 3, first.columns)
    codes, louder = first.codes_of(built.gm, x), first.codes_of(built.gm, x * torch.tensor([1.0, 0.5])[:, None, None])
    assert torch.equal(codes.scale, louder.scale) and torch.equal(codes.qdata[0], louder.qdata[0])
    scale, zero = (graph_tools.get_tensor(built.gm, n) for n in (first.scale, first.zero_point))
    expected = ((x / scale).round() + zero).clamp(-8, 7)
    assert torch.equal(codes.qdata.float(), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "resq", "smooth_alpha": 0.5}, "smooth_alpha: expected basis=none or outliers beside it; got basis=pca"),
        ({"recipe": "prefixquant", "activation_group_size": 32}, "activation_group_size: expected activation_scales=dynamic beside it"),
        ({"recipe": "quarot", "scale_search": True}, "scale_search: expected basis=none or outliers beside it"),
        ({"recipe": "duquant", "high_fraction": 0.25}, "spread_outliers: expected high_fraction=0.0 beside it; got high_fraction=0.25"),
        ({"recipe": "llm-int8", "basis": "none"}, "outlier_threshold: expected basis=outliers beside it"),
        ({"recipe": "resq", "high_bits": 16}, "high_bits: 16 is for channels that outlier_threshold names"),
        ({"recipe": "smoothquant", "smooth_alpha": 1.5}, "smooth_alpha: expected a number from 0 to 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        named.resolve(**options)


def test_a_transform_that_must_be_fused_and_cannot_be_is_told(build):
    """The option of fuse-projections that recipes without online operators set."""
    from resq_compiler.passes import FuseProjections

    from resq_compiler.errors import PassError
    from resq_compiler.ir.transforms import Placing, Transforms

    built = build("llama", "plan-columns", recipe="rtn")
    value = built.topology.readers[0].value
    known = Transforms()
    placing = Placing(built.gm, Scaling(torch.full((64,), 2.0)), "S", torch.zeros(1), "test", known)
    stream = built.topology.residual.values[-1]
    placing.forward(stream, list(stream.users), meta.Projection("S"))
    assert value.graph is built.gm.graph
    with pytest.raises(PassError, match="this recipe asks for transforms that cost nothing at run time"):
        FuseProjections("refused").run(built.gm, built.ctx)
