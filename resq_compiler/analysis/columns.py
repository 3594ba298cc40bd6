"""Which columns of a width get how many bits: the parts [low | main | high] of linears, bases and the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from resq_compiler.analysis.expert_bits import ExpertBits
from resq_compiler.analysis.site_shares import Shares, SiteShares
from resq_compiler.analysis.sites import Site
from resq_compiler.errors import ConfigError
from resq_compiler.numerics.quantized import Part, parts_for

FLOAT_BITS = 16  # stands for: not quantized
KINDS: dict[int, Literal["low", "main", "high"]] = {2: "low", 4: "main", 8: "high"}  # by the bits in `column_parts`


@dataclass(frozen=True)
class ColumnPart:
    """Columns start:stop of a linear's input with the bits of its weights and of its activations (16 = float), and which part they are."""

    start: int
    stop: int
    weight_bits: int
    activation_bits: int
    kind: Literal["low", "main", "high"] = "main"


@dataclass(frozen=True)
class ColumnPlan:
    """A fact: the bits of every column. Sites are those of analysis/sites.py.

    weight_bits, activation_bits, kv_bits: the main bits. common: shares with other bits at every site; sites: at single ones.
    rank_multiple: columns of these shares are a multiple of it. split_down: inputs of down projections have parts, too; else they are
    quantized whole, at the main bits. lm_head_bits: None where lm_head stays in float. weight_group_size: columns of a part whose weights
    share a scale; None: all of a row. experts: bits of the weights of single experts of a mixture.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    kv_bits: int = 4
    common: Shares = Shares(1 / 8, 8, 0.0, 2)
    sites: SiteShares = SiteShares()
    rank_multiple: int = 1
    split_down: bool = False
    lm_head_bits: int | None = None
    weight_group_size: int | None = None
    experts: ExpertBits = ExpertBits()

    def shares(self, site: str, block: int | None = None) -> Shares:
        """Of a site, in a block where blocks differ."""
        said = self.sites.find(site, block)
        return self.common if said is None else said.over(self.common)

    def column_parts(self, width: int, site: str, block: int | None = None) -> tuple[Part, ...]:
        """The split of a width by the shares alone. The bits in it only name the parts: 4, 8 (and 2)."""
        shares = self.shares(site, block)
        return parts_for(
            width, shares.high, low_bits=4, high_bits=8, lowest_fraction=shares.low, lowest_bits=2,
            rank_multiple=self.rank_multiple,
        )  # fmt: skip

    def sizes(self, width: int, *sites: str, block: int | None = None) -> list[int]:
        """Columns between one part's border and the next, ascending in precision: of all sites that share a basis."""
        return self.sizes_of(width, [Site(site, block) for site in sites])

    def sizes_of(self, width: int, sites: Iterable[Site]) -> list[int]:
        """The same of sites of several blocks."""
        borders = sorted({0} | {p.stop for site in sites for p in self.column_parts(width, site.name, site.block)})
        return [stop - start for start, stop in itertools.pairwise(borders)]

    def linear_parts(self, width: int, site: str, block: int | None = None) -> tuple[ColumnPart, ...]:
        """Parts of a linear's input. One part where nothing is split or the main bits already reach the high ones."""
        weight, activation, shares = self.weight_bits, self.activation_bits, self.shares(site, block)
        if (site == "down" and not self.split_down) or min(weight, activation) >= shares.high_bits:
            return (ColumnPart(0, width, weight, activation),)
        bits = {2: shares.low_bits, 8: shares.high_bits}
        return tuple(
            ColumnPart(
                p.start, p.stop, _bits(weight, bits.get(p.bits)), _bits(activation, bits.get(p.bits)), KINDS[p.bits]
            )
            for p in self.column_parts(width, site, block)
        )

    def expert_bits(self, part: ColumnPart, block: int | None, experts: int, where: str) -> tuple[int, ...] | None:
        """Bits of each expert's weights in a part; None where all have those of the part. Raises ConfigError: said of other experts."""
        said = self.experts.find(block)
        if said is None or part.kind == "low" or part.weight_bits == FLOAT_BITS:
            return None
        bits = said.main if part.kind == "main" else said.high
        if len(bits) != experts:
            raise ConfigError(
                f"option expert_bits: block {block} has {experts} experts ({where}); expected a digit for each, of {part.kind} columns "
                f"too; got {said}"
            )
        return bits

    def cache_parts(self, width: int, site: str, block: int | None = None) -> tuple[Part, ...]:
        """Parts of a cached key or value (the site) of one head."""
        main, shares = self.kv_bits, self.shares(site, block)
        if main >= shares.high_bits:
            return (Part(main, 0, width),)
        bits = {2: shares.low_bits, 4: main, 8: shares.high_bits}
        return tuple(Part(bits[p.bits], p.start, p.stop) for p in self.column_parts(width, site, block))


def _bits(main: int, special: int | None) -> int:
    return main if special is None or main == FLOAT_BITS else special
