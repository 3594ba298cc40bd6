"""Which columns of a width get how many bits: the parts [low | main | high] of linears, bases and the cache."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from resq_compiler.numerics.quantized import Part, parts_for
from resq_compiler.recipes.settings import CompileConfig

FLOAT_BITS = 16  # what the options call "not quantized"
SPLIT_DOWN = ("energy-split", "block-pca", "outliers")
"""Values of `down_proj` that give the input of down projections parts; the others quantize it whole, at the main bits."""


@dataclass(frozen=True)
class ColumnPart:
    """Columns start:stop of a linear's input with the bits of its weights and of its activations (16 = float)."""

    start: int
    stop: int
    weight_bits: int
    activation_bits: int


def column_parts(width: int, config: CompileConfig, site: str, block: int | None = None) -> tuple[Part, ...]:
    """The split of a width at a site (of shares.SITES) of a block by the shares alone. The bits in it only name the parts: 4, 8 (and 2)."""
    shares = config.shares(site, block)
    return parts_for(
        width, shares.high, low_bits=4, high_bits=8, lowest_fraction=shares.low, lowest_bits=2,
        rank_multiple=config.rank_multiple,
    )  # fmt: skip


def sizes(width: int, config: CompileConfig, *sites: str, block: int | None = None) -> list[int]:
    """Columns between one part's border and the next, ascending in precision: of all sites that share a basis."""
    borders = sorted({0} | {p.stop for site in sites for p in column_parts(width, config, site, block)})
    return [stop - start for start, stop in itertools.pairwise(borders)]


def linear_parts(
    width: int, config: CompileConfig, site: str, split: bool = True, block: int | None = None
) -> tuple[ColumnPart, ...]:
    """Parts of a linear's input. One part where `split` is off or the main bits already reach the high ones."""
    weight, activation, shares = config.weight_bits, config.activation_bits, config.shares(site, block)
    if not split or min(weight, activation) >= shares.high_bits:
        return (ColumnPart(0, width, weight, activation),)
    bits = {2: shares.low_bits, 8: shares.high_bits}
    return tuple(
        ColumnPart(p.start, p.stop, _bits(weight, bits.get(p.bits)), _bits(activation, bits.get(p.bits)))
        for p in column_parts(width, config, site, block)
    )


def _bits(main: int, special: int | None) -> int:
    return main if special is None or main == FLOAT_BITS else special


def cache_parts(width: int, config: CompileConfig, site: str, block: int | None = None) -> tuple[Part, ...]:
    """Parts of a cached key or value (the site) of one head."""
    main, shares = config.kv_bits, config.shares(site, block)
    if main >= shares.high_bits:
        return (Part(main, 0, width),)
    bits = {2: shares.low_bits, 4: main, 8: shares.high_bits}
    return tuple(Part(bits[p.bits], p.start, p.stop) for p in column_parts(width, config, site, block))
