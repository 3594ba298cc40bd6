from __future__ import annotations

import pytest

from resq_compiler.analysis.columns import ColumnPart, cache_parts, column_parts, linear_parts, sizes
from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import Part
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.recipes.site_shares import SITES, Shares, parse_shares


def linear(width, split=True, **options):
    return [
        (p.start, p.stop, p.weight_bits, p.activation_bits)
        for p in linear_parts(width, CompileConfig(**options), "mlp", split)
    ]


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
    assert linear(160, split=False) == [(0, 160, 4, 4)]
    assert linear(64, high_fraction=0.0) == [(0, 64, 4, 4)]


@pytest.mark.parametrize("width", [16, 64, 96, 576, 1536])
@pytest.mark.parametrize("high", [0.0, 1 / 8, 0.5])
@pytest.mark.parametrize("low", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("multiple", [1, 8])
def test_parts_cover_the_width_with_ascending_bits(width, high, low, multiple):
    config = CompileConfig(high_fraction=high, low_fraction=low, rank_multiple=multiple)
    for parts in (
        column_parts(width, config, "mlp"),
        linear_parts(width, config, "mlp"),
        cache_parts(width, config, "key"),
    ):
        assert parts[0].start == 0 and parts[-1].stop == width
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))
        bits = [p.weight_bits if isinstance(p, ColumnPart) else p.bits for p in parts]
        assert bits == sorted(bits)
    assert sum(sizes(width, config, "mlp")) == width
    high_width = [p for p in column_parts(width, config, "mlp") if p.bits == 8]
    assert (sum(p.width for p in high_width) - int(width * high)) * (multiple == 1 or high == 0) == 0


def test_cache_parts():
    assert cache_parts(16, CompileConfig(), "key") == (Part(4, 0, 14), Part(8, 14, 16))
    assert cache_parts(16, CompileConfig(kv_bits=8), "key") == (Part(8, 0, 16),)
    three = CompileConfig(kv_bits=3, low_fraction=0.25)
    assert cache_parts(16, three, "key") == (Part(2, 0, 4), Part(3, 4, 14), Part(8, 14, 16))


def test_sites_may_have_fractions_of_their_own():
    config = CompileConfig(site_fractions="mlp=1/4, o=0,key=1/2,down.1=1/2")
    assert [config.shares(site).high for site in SITES] == [1 / 8, 1 / 4, 0, 1 / 8, 1 / 2, 1 / 8]
    assert [config.shares(*place).high for place in (("down", 1), ("down", 0), ("key", 1))] == [1 / 2, 1 / 8, 1 / 2]
    assert cache_parts(16, config, "key") == (Part(4, 0, 8), Part(8, 8, 16))
    assert [p.start for p in linear_parts(64, config, "mlp")] == [0, 48] and len(linear_parts(64, config, "o")) == 1
    assert sizes(64, config, "attention", "mlp") == [48, 8, 8]  # a rotation crosses no border of either
    assert sizes(16, config, "value", "o") == [14, 2] and sizes(64, config, "o") == [64]


def test_sites_may_have_bits_of_their_own():
    """High and low parts of any width, beside sites that have the common ones."""
    config = CompileConfig(site_fractions="mlp=1/4@6,down.1=1/8:1/4@3,key=1/4@5,attention=0:1/8")
    assert parse_shares(config.site_fractions)["down.1"] == {"high": 1 / 8, "low": 1 / 4, "low_bits": 3}
    assert config.shares("down", 1) == Shares(1 / 8, 8, 1 / 4, 3) and config.shares("value") == Shares(1 / 8, 8, 0.0, 2)
    assert linear_parts(64, config, "mlp") == (ColumnPart(0, 48, 4, 4), ColumnPart(48, 64, 6, 6))
    assert [(p.start, p.weight_bits) for p in linear_parts(64, config, "down", block=1)] == [(0, 3), (16, 4), (56, 8)]
    assert [(p.start, p.weight_bits) for p in linear_parts(64, config, "attention")] == [(0, 2), (8, 4)]
    assert cache_parts(16, config, "key") == (Part(4, 0, 12), Part(5, 12, 16))
    assert sizes(64, config, "attention", "mlp") == [8, 40, 16]


def test_fractions_that_do_not_fit_say_so():
    with pytest.raises(QuantError, match="exceed width"):
        linear(24, high_fraction=0.5, low_fraction=0.5, rank_multiple=8)  # 12 rounds up to 16, twice
