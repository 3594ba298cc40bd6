"""Activations and attribution on a small compiled model."""

from __future__ import annotations

import json

import pytest
import torch

from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.errors import PassError
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.inspection.activations import Diagnostics, diagnose, measure_after
from resq_compiler.inspection.attribution import Costs, SwitchedGraph, attribute
from resq_compiler.inspection.diagnostic_tables import (
    activation_tables,
    attribution_tables,
    massive_rows,
    table_text,
    write_diagnostics,
)
from resq_compiler.inspection.noise import add_tap, noise_by_name, quantizers, scaled_rows, site_energies, without_zero
from resq_compiler.ir import ops
from resq_compiler.tiny import tiny_tokens

IDS = tiny_tokens(4, 48, seed=5)


@pytest.fixture(scope="module")
def found(compiled):
    original, ctx = trace(compiled.original)
    return diagnose(original, ctx.facts.get(Topology), compiled.model.graph_module, IDS)


def test_statistics_agree_with_hooks_on_the_original_model(compiled, found):
    seen = {}
    linear = compiled.original.model.layers[1].mlp.down_proj
    handle = linear.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        compiled.original(IDS)
    handle.remove()
    site = found.before["blocks.1.down_input"]
    torch.testing.assert_close(site.peaks, seen["x"].flatten(0, 1).abs().amax(0))
    image = ops.quantize_dequantize(seen["x"], ((4, 0, 160),))
    noise = 10 * torch.log10(seen["x"].square().sum() / (image - seen["x"]).square().sum())
    assert found.raw_noise_db["blocks.1.down_input"] == pytest.approx(
        float(noise), abs=0.02
    )  # codes at a tie may differ


def test_projections_keep_energy_and_order_it(compiled, found):
    exact = Diagnostics(IDS.numel())
    measure_after(exact, compiled.projected, IDS)
    for name in ("blocks.0.key", "blocks.1.key"):  # U_C is orthogonal and keys have no gain
        energies = [site.rms.square().sum() for site in (found.before[name], exact.after[name], found.after[name])]
        assert float(energies[0]) == pytest.approx(float(energies[1]), rel=1e-4)  # float32 products
        assert float(energies[0]) == pytest.approx(float(energies[2]), rel=0.1)  # four-bit rounding of all before it
    assert exact.noise_db == {} and exact.after.keys() == found.after.keys()
    assert all(0.125 < share < 1 for share in found.high_energy.values())  # an eighth of the columns, the strongest


def test_bases_and_high_bits_raise_the_signal_over_the_noise(found):
    for name in ("blocks.0.down_input", "blocks.1.down_input"):
        assert (
            found.noise_db[name] > found.raw_noise_db[name] + 2
        )  # a Hadamard transform spreads the gated product's peaks
    assert found.bits["blocks.0.weights"] == pytest.approx(4 + 4 * 56 / (7 * 64 + 96), abs=0.2)


def test_noise_is_that_of_the_compiled_graph(compiled, found):
    measured = noise_by_name(compiled.model.graph_module, IDS)
    assert found.noise_db["blocks.1.value"] == measured["blocks.1.value"]["sqnr_db"]
    assert found.weight_db.items() <= {name: entry["sqnr_db"] for name, entry in measured.items()}.items()


def test_rows_on_one_side_of_zero_are_counted(compiled, found):
    """By hand at a cache and at an output projection, whose quantizers have a scale for each head and part."""
    gm = compiled.model.graph_module
    by_name = {site.name: quantizer for quantizer, site in quantizers(gm)}
    seen: dict = {}
    for name in ("blocks.1.key", "blocks.1.o_input.part1"):
        add_tap(seen.setdefault("taps", {}), by_name[name].x, lambda x, name=name: seen.update({name: x}))
    site_energies(gm, IDS, seen["taps"])
    keys, heads = seen["blocks.1.key"], seen["blocks.1.o_input.part1"].unflatten(-1, (4, 2))
    expected = sum(int(((p > 0).all(-1) | (p < 0).all(-1)).sum()) for p in (keys[..., :14], keys[..., 14:]))
    assert (
        found.one_sided["blocks.1.key"] == expected / (2 * keys[..., 0].numel()) > 0
    )  # two columns agree in sign half of the time
    assert without_zero(heads) == int(((heads > 0).all(-1) | (heads < 0).all(-1)).sum()) > 0
    assert torch.equal(scaled_rows(by_name["blocks.1.o_input.part1"], heads.flatten(-2))[0], heads.reshape(-1, 2))


def test_massive_activations_of_several_blocks_are_one_row():
    sites = [("blocks.3.residual", 200.0), ("blocks.4.residual", -300.0), ("blocks.5.residual", 250.0)]
    rows = [{"site": s, "position": 0, "token": "'a'", "channel": 7, "value": v} for s, v in sites]
    found = Diagnostics(10, massive=[*rows, {**rows[0], "channel": 8, "value": 999.0}])
    assert massive_rows(found) == [
        {"channel": 8, "token": "'a'", "position": 0, "from block": 3, "to block": 3, "value": 999.0},
        {"channel": 7, "token": "'a'", "position": 0, "from block": 3, "to block": 5, "value": -300.0},
    ]


def test_all_switches_off_is_the_float_model_and_all_on_the_compiled_one(compiled):
    runner = SwitchedGraph(compiled.model.graph_module, compiled.projected, IDS)
    with torch.no_grad():
        expected = compiled.original(IDS).logits.log_softmax(-1)
    torch.testing.assert_close(
        runner.float_log_p, expected, atol=1e-4, rtol=1e-4
    )  # projections are exact up to rounding
    everything = runner.cost("kind", "everything", frozenset(runner.switches))
    measured = evaluate(compiled.model, IDS, compiled.original)
    assert everything.perplexity == pytest.approx(
        measured.perplexity, rel=5e-3
    )  # float products: a code on a rounding edge may flip
    assert everything.kl == pytest.approx(measured.kl, rel=0.05)  # evaluate leaves the last position out


def test_costs_are_ranked_and_name_every_site(compiled):
    costs = attribute(compiled.model.graph_module, compiled.projected, IDS, ("kind", "block", "linear"))
    levels = {level: [c for c in costs if c.level == level] for level in ("kind", "block", "linear")}
    assert {c.name for c in levels["kind"]} == {"weights", "activations", "kv", "everything"}
    assert levels["kind"][0].name == "everything"
    assert {c.name for c in levels["block"]} == {"block 0", "block 1"}
    assert len(levels["linear"]) == 14
    for ranked in levels.values():
        assert [c.kl for c in ranked] == sorted((c.kl for c in ranked), reverse=True)
        assert all(c.kl > 0 for c in ranked)


def test_a_later_block_starts_from_saved_values(compiled):
    runner = SwitchedGraph(compiled.model.graph_module, compiled.projected, IDS)
    on = runner.groups("block")["block 1"]
    late = runner.cost("block", "block 1", on)
    runner.saved = {}
    assert runner.cost("block", "block 1", on) == late


def test_float_graph_of_another_model_is_refused(compiled):
    original, _ = trace(compiled.original)
    with pytest.raises(PassError, match=r"give the graph that compile\(on_float=...\) reported"):
        attribute(compiled.model.graph_module, original, IDS)


def test_tables_and_plots_reach_the_dump_and_the_page(compiled, found, tmp_path):
    pytest.importorskip("matplotlib")
    compiled.model.dump(tmp_path)
    costs = Costs(IDS.numel(), attribute(compiled.model.graph_module, compiled.projected, IDS, ("kind",)))
    written = {p.name for p in write_diagnostics(tmp_path, found, costs)}
    assert written == {
        "activations.json", "attribution.json", "channels.png", "spectrum.png", "noise.png", "bits.png", "cost-by-kind.png", "index.html",
    }  # fmt: skip
    assert all(
        (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in written if name.endswith("png")
    )
    assert json.loads((tmp_path / "attribution.json").read_text())["tables"] == attribution_tables(costs)
    summary = table_text(activation_tables(found)[0])
    assert "attention_input" in summary and "QSUR after U" in summary and "192 tokens" in summary
