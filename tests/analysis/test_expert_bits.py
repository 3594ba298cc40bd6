"""Bits of single experts: their text form, and how a budget is spent on them."""

from __future__ import annotations

import itertools

import pytest

from resq_compiler.analysis.expert_bits import BlockBits, ExpertBits
from resq_compiler.analysis.expert_choices import ExpertChoice, as_bits, pairs, spend_on_experts
from resq_compiler.errors import ConfigError


@pytest.mark.parametrize("text", ["", "0=4432", "0=4432/8866,3=22/88"])
def test_text_form(text):
    said = ExpertBits.parse(text)
    assert str(said) == text and ExpertBits.parse(str(said)) == said
    assert said.find(3) == (BlockBits(3, (2, 2), (8, 8)) if "3=" in text else None)


@pytest.mark.parametrize("text", ["0", "0=", "0=41", "0=49", "0=44/8", "a=44", "0=44,0=44"])
def test_what_is_no_text_form(text):
    with pytest.raises(ConfigError, match="option expert_bits: expected BLOCK=MAIN or BLOCK=MAIN/HIGH, once"):
        ExpertBits.parse(text)


def experts(high: int = 2) -> list[ExpertChoice]:
    """Three experts of 14 weights in main columns; the second is felt least, the third most."""
    return [ExpertChoice(0, felt, (0.4, 0.6 if high else 0.0), (14, high)) for felt in (1.0, 0.01, 30.0)]


@pytest.mark.parametrize(("high", "least"), [(2, 4), (2, 2), (0, 2), (0, 4)])
def test_no_other_bits_of_the_budget_are_better(high, least):
    """All of them tried; what is left over is less than the dearest step."""
    choices, equal = experts(high), (4, 8)
    found = spend_on_experts(choices, equal, least)
    budget = sum(c.price(equal) for c in choices)
    menu = pairs(least, None if high else 8)
    tried = [
        sum(c.error(p) for c, p in zip(choices, each, strict=True))
        for each in itertools.product(menu, repeat=3)
        if sum(c.price(p) for c, p in zip(choices, each, strict=True)) <= budget
    ]
    spent, error = sum(c.price(p) for c, p in found.items()), sum(c.error(p) for c, p in found.items())
    assert budget - 14 < spent <= budget
    assert min(tried) <= error <= 1.25 * min(tried)
    assert error < sum(c.error(equal) for c in choices) or (high, least) == (0, 4)
    assert found[choices[1]][0] <= found[choices[0]][0] <= found[choices[2]][0]


def test_error_and_price_by_hand():
    choice = experts()[0]
    assert choice.error((4, 8)) == pytest.approx(0.4 * 4**-4 + 0.6 * 4**-8, rel=1e-12)
    assert choice.price((3, 8)) == 14 * 3 + 2 * 8
    found = {c: (4, 6) for c in experts()}
    assert str(as_bits(found)) == "0=444/666"
    assert str(as_bits({c: (4, 8) for c in experts(0)})) == "0=444"
