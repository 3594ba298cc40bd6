from __future__ import annotations

import pytest
from resq_compiler.passes import PlanColumns

from resq_compiler.analysis.columns import ColumnPart, ColumnPlan
from resq_compiler.analysis.site_shares import Shares, SiteShare, SiteShares
from resq_compiler.analysis.sites import SITES, Site
from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import Part


def plan(**options) -> ColumnPlan:
    """Of the options of plan-columns; sites as text."""
    return PlanColumns(**{**options, "sites": SiteShares.parse(options.get("sites", ""))}).plan


def linear(width, site="mlp", **options):
    return [
        (p.start, p.stop, p.weight_bits, p.activation_bits) for p in plan(**options).linear_parts(width, site)
    ]  # fmt: skip


def test_the_paper_split():
    assert linear(576) == [(0, 504, 4, 4), (504, 576, 8, 8)]  # 1/8 of the columns at 8 bits, last
    assert linear(4096) == [(0, 3584, 4, 4), (3584, 4096, 8, 8)]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"weight_bits": 4, "activation_bits": 16}, [(0, 56, 4, 16), (56, 64, 8, 16)]),
        ({"weight_bits": 16, "activation_bits": 4}, [(0, 56, 16, 4), (56, 64, 16, 8)]),
        ({"weight_bits": 4, "activation_bits": 8}, [(0, 56, 4, 8), (56, 64, 8, 8)]),
        ({"weight_bits": 8, "activation_bits": 8}, [(0, 64, 8, 8)]),
        ({"weight_bits": 16, "activation_bits": 16}, [(0, 64, 16, 16)]),
        ({"weight_bits": 3, "high_bits": 6}, [(0, 56, 3, 4), (56, 64, 6, 6)]),
        ({"low_fraction": 0.5, "high_fraction": 0.5}, [(0, 32, 2, 2), (32, 64, 8, 8)]),
        ({"low_fraction": 0.25}, [(0, 16, 2, 2), (16, 56, 4, 4), (56, 64, 8, 8)]),
    ],
    ids=str,
)
def test_linear_parts(options, expected):
    assert linear(64, **options) == expected


def test_one_part_where_there_is_no_split():
    assert linear(160, site="down") == [(0, 160, 4, 4)]
    assert linear(160, site="down", split_down=True) == linear(160)
    assert linear(64, high_fraction=0.0) == [(0, 64, 4, 4)]


@pytest.mark.parametrize("width", [16, 64, 96, 576, 1536])
@pytest.mark.parametrize("high", [0.0, 1 / 8, 0.5])
@pytest.mark.parametrize("low", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("multiple", [1, 8])
def test_parts_cover_the_width_with_ascending_bits(width, high, low, multiple):
    config = plan(high_fraction=high, low_fraction=low, rank_multiple=multiple)
    for parts in (
        config.column_parts(width, "mlp"),
        config.linear_parts(width, "mlp"),
        config.cache_parts(width, "key"),
    ):
        assert parts[0].start == 0 and parts[-1].stop == width
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
        bits = [p.weight_bits if isinstance(p, ColumnPart) else p.bits for p in parts]
        assert bits == sorted(bits)
    assert sum(config.sizes(width, "mlp")) == width
    high_width = [p for p in config.column_parts(width, "mlp") if p.bits == 8]
    assert (sum(p.width for p in high_width) - int(width * high)) * (multiple == 1 or high == 0) == 0


def test_cache_parts():
    assert plan().cache_parts(16, "key") == (Part(4, 0, 14), Part(8, 14, 16))
    assert plan(kv_bits=8).cache_parts(16, "key") == (Part(8, 0, 16),)
    three = plan(kv_bits=3, low_fraction=0.25)
    assert three.cache_parts(16, "key") == (Part(2, 0, 4), Part(3, 4, 14), Part(8, 14, 16))


def test_sites_may_have_fractions_of_their_own():
    config = plan(split_down=True, sites="mlp=1/4, o=0,key=1/2,down.1=1/2")
    assert [config.shares(site).high for site in SITES] == [1 / 8, 1 / 4, 0, 1 / 8, 1 / 2, 1 / 8, 1 / 8, 1 / 8]
    assert [config.shares(*place).high for place in (("down", 1), ("down", 0), ("key", 1))] == [1 / 2, 1 / 8, 1 / 2]
    assert config.cache_parts(16, "key") == (Part(4, 0, 8), Part(8, 8, 16))
    assert [p.start for p in config.linear_parts(64, "mlp")] == [0, 48] and len(config.linear_parts(64, "o")) == 1
    assert config.sizes(64, "attention", "mlp") == [48, 8, 8]  # a rotation crosses no border of either
    assert config.sizes(16, "value", "o") == [14, 2] and config.sizes(64, "o") == [64]


def test_sites_may_have_bits_of_their_own():
    """High and low parts of any width, beside sites that have the common ones."""
    config = plan(split_down=True, sites="mlp=1/4@6,down.1=1/8:1/4@3,key=1/4@5,attention=0:1/8")
    assert config.sites.find("down", 1) == SiteShare(Site("down", 1), 1 / 8, None, 1 / 4, 3)
    assert config.shares("down", 1) == Shares(1 / 8, 8, 1 / 4, 3) and config.shares("value") == Shares(1 / 8, 8, 0.0, 2)
    assert config.linear_parts(64, "mlp") == (ColumnPart(0, 48, 4, 4, "main"), ColumnPart(48, 64, 6, 6, "high"))
    assert [(p.start, p.weight_bits) for p in config.linear_parts(64, "down", block=1)] == [(0, 3), (16, 4), (56, 8)]
    assert [(p.start, p.weight_bits) for p in config.linear_parts(64, "attention")] == [(0, 2), (8, 4)]
    assert config.cache_parts(16, "key") == (Part(4, 0, 12), Part(5, 12, 16))
    assert config.sizes(64, "attention", "mlp") == [8, 40, 16]


def test_fractions_that_do_not_fit_say_so():
    with pytest.raises(QuantError, match="exceed width"):
        linear(24, high_fraction=0.5, low_fraction=0.5, rank_multiple=8)  # 12 rounds up to 16, twice


@pytest.mark.parametrize(
    "text", ["", "mlp=1/4,o=0", "down.3=1/2@6:1/8@2,key=5/192", "attention=1/8:1/3", "value.0=0.1234567891234567"]
)
def test_shares_of_sites_have_a_text(text):
    shares = SiteShares.parse(text)
    assert str(shares) == text and SiteShares.parse(str(shares)) == shares
