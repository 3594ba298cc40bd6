from __future__ import annotations

import itertools

import pytest
import torch
from resq_compiler.passes import AllocateBits, allocate_bits

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.splits import Choice, Menu, Split, spend
from resq_compiler.errors import ConfigError, PassError
from resq_compiler.evaluation import sizes
from resq_compiler.recipes.named import resolve
from resq_compiler.tiny import tiny_tokens
from tests.conftest import with_prefix

PLUS = {"recipe": "resq+", "weight_method": "rtn"}


def choices() -> list[Choice]:
    """Three sites of 8 columns: flat, steep, and steep but twice as dear."""
    flat, steep = torch.full((8,), 1 / 8, dtype=torch.float64), 0.5 ** torch.arange(1, 9, dtype=torch.float64)
    steep = steep / steep.sum()
    sites = Site("o", 0), Site("down", 0), Site("down", 1)
    return [Choice(sites[0], flat, 1, 4, 8), Choice(sites[1], steep, 1, 4, 8), Choice(sites[2], steep, 2, 4, 8)]


@pytest.mark.parametrize(
    ("average", "allocation"),
    [
        *((average, "sensitivity") for average in (4.25, 4.5, 5.0, 5.5)),
        *((average, "widths") for average in (3.75, 4.0, 4.5)),
    ],
)
def test_no_other_allocation_of_the_budget_is_better(average, allocation):
    """All allocations tried; greedy may miss the best by the one change that did not fit."""
    sites, menu = choices(), Menu(widths=allocation == "widths")
    found = spend(sites, average - 4, menu)
    budget = sum(c.cost * c.width for c in sites) * (average - 4)
    rows = [[(c.price(s), c.error(s)) for s in menu.splits(c)] for c in sites]
    steepest = max(abs(e - f) for pairs in rows for p, e in pairs for q, f in pairs if 0 < abs(p - q) <= 8)
    best = min(sum(e for _, e in each) for each in itertools.product(*rows) if sum(p for p, _ in each) <= budget + 1e-9)
    spent, error = sum(c.price(s) for c, s in found.items()), sum(c.error(s) for c, s in found.items())
    assert spent <= budget + 1e-9 and best <= error <= best + steepest / 4
    if allocation == "sensitivity":
        assert (
            budget - spent < 8 and found[sites[1]].high >= found[sites[0]].high
        )  # a steep spectrum gains more than a flat one
    assert {s.high_bits for s in found.values() if s.high} <= ({8} if allocation == "sensitivity" else {5, 6, 7, 8})


def test_error_and_price_by_hand():
    """8 equal directions: one at 8 bits, two at 2, the others at 4."""
    flat, split = choices()[0], Split(1, 8, 2, 2)
    assert flat.error(split) == pytest.approx((1 * 4**-8 + 5 * 4**-4 + 2 * 4**-2) / 8, rel=1e-12)
    assert flat.price(split) == 1 * 4 - 2 * 2
    assert (
        str(split.share(Site("o", 0), 8, 8)) == "o.0=1/8:1/4@2"
        and str(Split(2, 6).share(Site("mlp"), 8, 8)) == "mlp=1/4@6"
    )


def test_average_of_the_result_is_the_budget(compile_tiny):
    """Linears and cache each, whatever the sites got; what is left over is less than the dearest step."""
    model, _ = compile_tiny("llama", **PLUS, average_bits=4.75)
    shares = {str(said.site): said.high for said in model.options.sites.items}
    assert {name.partition(".")[0] for name in shares} == {"attention", "mlp", "o", "down", "key", "value"}
    assert {f"{s}.{i}" for s in ("o", "down", "key", "value") for i in range(2)} <= set(shares)
    assert model.options.average_bits is None  # what it stood for is in site_fractions
    cache = [shares[f"{s}.{i}"] for s in ("key", "value") for i in range(2)]
    assert abs(sum(cache) / 4 - 0.75 / 4) <= 1 / 16


def test_columns_follow_the_shares(compile_tiny):
    """The same shares written by hand give the same model, to the bit."""
    model, _ = compile_tiny("llama", **PLUS, average_bits=4.75)
    again, _ = compile_tiny("llama", **PLUS, allocation="equal", site_fractions=model.options.site_fractions)
    ids = tiny_tokens(2, 12)
    assert torch.equal(model(ids).logits, again(ids).logits)
    plain, _ = compile_tiny("llama", **PLUS, allocation="equal")
    assert not torch.equal(model(ids).logits, plain(ids).logits)


def test_the_table_is_in_the_stage_and_in_the_dump(compile_tiny, tmp_path):
    model, _ = compile_tiny("llama", **PLUS, average_bits=4.75)
    stage = next(s for s in model.stages if s.name == "allocate-bits")
    assert "% lower than with equal shares" in stage.lines[0]
    assert stage.lines[1].split()[:3] == ["site", "columns", "high"] and len(stage.lines) == 1 + 2 + 10
    model.dump(tmp_path)
    text = (tmp_path / f"{stage.label}.txt").read_text()
    assert all(line in text for line in stage.lines)


@pytest.mark.parametrize(
    "options",
    [{"average_bits": 3.9}, {"average_bits": 6.5}, {"average_bits": 4.5, "site_fractions": "o=0"},
     {"average_bits": 4.5, "recipe": "quarot"}, {"average_bits": 4.5, "low_fraction": 0.25},
     {"allocation": "sensitivity", "basis": "hadamard"}, {"average_bits": 3.4, "allocation": "widths"},
     {"model_megabytes": -1.0}, {"model_megabytes": 9.0, "average_bits": 4.5},
     {"model_megabytes": 9.0, "weight_bits": 8, "activation_bits": 8}],
    ids=str,
)  # fmt: skip
def test_budgets_that_cannot_be_spent_are_refused(options):
    with pytest.raises(ConfigError, match="option (average_bits|model_megabytes|allocation)"):
        resolve(**{"recipe": "resq", **options})


def test_without_a_budget_it_is_that_of_equal_shares(compile_tiny):
    """1/4 of the columns of keys and values, not the same number for all."""
    model, _ = compile_tiny("llama", **PLUS, allocation="sensitivity", high_fraction=0.25)
    shares = {str(said.site): said.high for said in model.options.sites.items}
    cache = [shares[f"{s}.{i}"] for s in ("key", "value") for i in range(2)]
    assert sum(cache) / 4 == pytest.approx(0.25, abs=1 / 16) and len(set(cache)) > 1
    assert model.options.allocation == "equal"  # a compile of the recorded options gives the same model


def test_shares_stay_equal_where_the_forecast_gains_little(build):
    built = build("llama", "allocate-bits", **PLUS)
    before = built.plan
    built.pipeline.run(built.gm, [AllocateBits(worth=0.9)])
    assert built.plan is before and built.pipeline.stages[-1].rewrites == 0
    assert "below 90 %, so the shares stay equal" in built.pipeline.stages[-1].lines[0]
    built.pipeline.run(built.gm, [AllocateBits(worth=0.0)])
    assert built.plan.sites != before.sites and built.pipeline.stages[-1].rewrites == 10


@pytest.mark.parametrize(
    "options", [{"high_fraction": 0.0}, {"weight_bits": 8, "activation_bits": 8, "kv_bits": 8}], ids=str
)
def test_nothing_is_measured_where_all_columns_are_alike(compile_tiny, options, monkeypatch):
    monkeypatch.setattr(allocate_bits.sensitivity, "measure", None)
    model, _ = compile_tiny("llama", **PLUS, allocation="sensitivity", **options)
    stage = next(s for s in model.stages if s.name == "allocate-bits")
    assert stage.rewrites == 0 and stage.lines == ("nothing to share out: all columns have the same bits",)


def test_families_without_gates(compile_tiny):
    """One linear before the activation, and none of a fused kind."""
    model, _ = compile_tiny("opt", **PLUS, average_bits=4.5)
    assert {"mlp", "down.0", "o.1"} <= {str(said.site) for said in model.options.sites.items}


@pytest.mark.parametrize("average", [4.0, 4.5])
def test_widths_are_bits_of_the_model(compile_tiny, average):
    """Read off the compiled graph: high parts of 5 to 8 bits, columns of 2, and the average that was asked for."""
    model, _ = compile_tiny("llama", **PLUS, allocation="widths", average_bits=average)
    bits = sizes.average_bits(model)
    assert average - 0.1 <= bits.weights <= average and average - 0.15 <= bits.kv <= average
    splits = model.options.sites.items
    assert any(s.high_bits not in (None, 8) for s in splits)
    assert any(s.low for s in splits) == (average == 4.0)  # what high columns take must come from somewhere
    again, _ = compile_tiny("llama", **PLUS, allocation="equal", site_fractions=model.options.site_fractions)
    ids = tiny_tokens(2, 12)
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gpt_neox"])
@pytest.mark.parametrize(
    "options", [{"allocation": "sensitivity"}, {"allocation": "widths"}, {"down_proj": "block-pca"}], ids=str
)
def test_a_size_is_kept(compile_tiny, family, options):
    """The report's size is not above what was asked; what is not used are scales of a third part, padding and a step of every site."""
    plain, _ = compile_tiny(family, **{**PLUS, **options, "allocation": "equal"}, high_fraction=0.25)
    before = sizes.memory_bytes(plain)
    asked = before["total"] + 0.1 * before["weight_codes"] + before["weight_scales"]
    model, _ = compile_tiny(family, **PLUS, **options, model_megabytes=asked / 1e6)
    size = sizes.memory_bytes(model)
    assert asked - 1.5 * size["weight_scales"] <= size["total"] <= asked
    assert size["weight_codes"] > before["weight_codes"] and model.options.model_megabytes is None


def test_prefix_tokens_are_part_of_a_size(compile_tiny):
    plain, _ = compile_tiny("llama", recipe=with_prefix(**PLUS, allocation="equal", high_fraction=0.25))
    assert any("resq.prefix_key" in name for name in plain.graph_module.state_dict())
    asked = sizes.memory_bytes(plain)["total"]
    model, _ = compile_tiny("llama", recipe=with_prefix(**PLUS, model_megabytes=asked / 1e6))
    assert asked - 3 * sizes.memory_bytes(plain)["weight_scales"] <= sizes.memory_bytes(model)["total"] <= asked


def test_a_size_below_the_main_bits_is_refused(compile_tiny):
    with pytest.raises(PassError, match=r"model_megabytes: 0\.01 MB are too few.*expected at least 0\.\d"):
        compile_tiny("llama", **PLUS, model_megabytes=0.01)


def test_a_size_above_all_high_columns_is_not_spent(compile_tiny):
    model, _ = compile_tiny("llama", **PLUS, model_megabytes=500.0)
    assert any("are all that is spent, 6 average bits" in note for note in model.notes)
    assert 5.9 <= sizes.average_bits(model).weights <= 6


def test_stated_shares_are_not_shared_out():
    assert resolve("resq+", site_fractions="o=0").allocation == "equal" and resolve("resq+").allocation == "sensitivity"
    assert resolve("resq+", low_fraction=0.25).allocation == resolve("resq+", basis="hadamard").allocation == "equal"
    with pytest.raises(ConfigError, match="option allocation: "):
        resolve("resq+", site_fractions="o=0", allocation="sensitivity")
