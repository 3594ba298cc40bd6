"""One calibration run serves all passes that see the same graph, and ends with the pass that rewrites it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from resq_compiler.passes import AllocateBits, ComputeBases, QuantizeWeights, ReorderChannels

import resq_compiler
from resq_compiler.analysis.sites import Site
from resq_compiler.calibration import requests
from resq_compiler.calibration.statistics import Request, Statistics, observe
from resq_compiler.errors import DataError, PassError
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.recipes.named import passes_for, resolve
from resq_compiler.tiny import tiny_tokens


def runs_of(steps) -> Counter:
    """How often a step of this name began."""
    return Counter(name for name, done, total in steps if done == 0)


def test_one_run_serves_all_that_ask(tiny):
    """Bases, shares of columns and the order of channels see one run, those of activations another."""
    steps: list = []
    passes = passes_for(resolve("resq+", weight_method="rtn"))
    resq_compiler.compile(
        tiny("llama"), tiny_tokens(4, 32), recipe=passes, calibration_length=32, progress=lambda *step: steps.append(step)
    )  # fmt: skip
    assert {type(p) for p in passes} >= {ComputeBases, AllocateBits, ReorderChannels}
    assert runs_of(steps)["calibrate"] == 1 and runs_of(steps)["search clips"] == 1


def test_statistics_end_with_the_graph_they_are_of(build):
    built = build("llama", "compute-bases", recipe="resq+")
    built.pipeline.run(built.gm, [ComputeBases()])
    assert built.ctx.facts.find(Statistics) is not None
    built.pipeline.run(built.gm, [ReorderChannels()])
    assert built.ctx.facts.find(Statistics) is None


def test_what_nobody_asked_for_is_told(build):
    built = build("llama", "reorder-channels", recipe="resq+")
    with pytest.raises(PassError, match="Peak of down.0 was not asked for"):
        built.ctx.facts.put(Statistics(requests.down_sizes(built.topology, "energy")))
        ReorderChannels("peak").run(built.gm, built.ctx)


def test_without_calibration_data_the_pass_is_named(build):
    built = build("llama", "compute-bases")
    built.ctx.calibration = None
    with pytest.raises(DataError, match=r"pass \d+ compute-bases: .*expected calibration data, got none"):
        built.pipeline.run(built.gm, [ComputeBases()])
    built = build("llama", "quantize-weights")
    built.ctx.calibration = None
    with pytest.raises(DataError, match=r"pass \d+ quantize-weights: .*expected calibration data, got none"):
        built.pipeline.run(built.gm, [QuantizeWeights()])


def test_energy_and_peak_by_hand():
    x = torch.tensor([[[1.0, -3.0], [2.0, 0.5]]])
    energy, peak = Energy("site"), Peak("site")
    for statistic in (energy, peak):
        with pytest.raises(DataError, match="site: no tokens were seen"):
            statistic.state()
        statistic.update(x)
        statistic.update(-x[:, :1])
        with pytest.raises(DataError, match="site: not finite"):
            statistic.update(x / 0)
    assert (
        energy.sizes.tolist() == [6.0, 18.25] and energy.sizes.dtype == torch.float64 and peak.sizes.tolist() == [2, 3]
    )
    again = Energy("other")
    again.restore(energy.state())
    assert torch.equal(again.sizes, energy.sizes)


def test_pooled_nodes_and_taps_on_one_node(build):
    """A request of several nodes counts all of their tokens; two requests of one node see the same values."""
    built = build("llama", "compute-bases")
    nodes = requests.values_of(built.topology.readers)
    pooled, alone = Energy("all"), [Energy(str(i)) for i in range(len(nodes))]
    wanted = [
        Request(Site("all"), pooled, nodes),
        *(Request(Site(str(i)), e, (n,)) for i, (e, n) in enumerate(zip(alone, nodes, strict=True))),
    ]
    taps: dict = {}
    for request in wanted:
        for node in request.nodes:
            taps.setdefault(node, []).append(request)
    observe(
        built.gm, {n: lambda x, rs=rs: [r.see(x) for r in rs] for n, rs in taps.items()}, tiny_tokens(2, 8), lambda *step: None
    )  # fmt: skip
    torch.testing.assert_close(pooled.sizes, sum(e.sizes for e in alone), rtol=1e-12, atol=0)
    assert wanted[0].name == "Energy.all"
