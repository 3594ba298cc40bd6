"""Shares of columns with other bits than the main ones, for single sites, and their text form.

    SITE[.BLOCK]=HIGH[@BITS][:LOW[@BITS]]        mlp=1/4    o=0    down.3=1/4@6    attention=1/8:1/8@2

HIGH is the share above the main bits and LOW the one below; what is not said is as for all sites.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from resq_compiler.analysis.sites import SITES, SITES_OF_BLOCKS, Site
from resq_compiler.errors import ConfigError

MOST_LOW = 4  # at most 1 / MOST_LOW of a site's columns may go below the main bits where bits are shared out

_ITEM = re.compile(
    r"(?P<site>[a-z]+)(\.(?P<block>\d+))?=(?P<high>[^@:]+)(@(?P<high_bits>\d))?(:(?P<low>[^@:]+)(@(?P<low_bits>\d))?)?"
)


@dataclass(frozen=True)
class Shares:
    """Of a site's columns, the share above the main bits and the one below, and the bits of each."""

    high: float
    high_bits: int
    low: float
    low_bits: int


@dataclass(frozen=True)
class SiteShare:
    """What is said about one site; None: as for all sites."""

    site: Site
    high: float
    high_bits: int | None = None
    low: float | None = None
    low_bits: int | None = None

    def over(self, common: Shares) -> Shares:
        """The shares of the site where those of all sites are `common`."""
        return Shares(
            self.high,
            common.high_bits if self.high_bits is None else self.high_bits,
            common.low if self.low is None else self.low,
            common.low_bits if self.low_bits is None else self.low_bits,
        )

    def __str__(self) -> str:
        high = _number(self.high) + ("" if self.high_bits is None else f"@{self.high_bits}")
        low = "" if self.low is None else ":" + _number(self.low)
        return f"{self.site}={high}{low}" + ("" if self.low_bits is None else f"@{self.low_bits}")


@dataclass(frozen=True)
class SiteShares:
    """What is said about sites; of a site's own block before that of the site."""

    items: tuple[SiteShare, ...] = ()

    @classmethod
    def parse(cls, text: str) -> SiteShares:
        """Read the text form. Raises ConfigError naming the item."""
        found = {said.site: said for item in filter(None, text.replace(" ", "").split(",")) for said in [_parse(item)]}
        return cls(tuple(found.values()))

    def find(self, site: str, block: int | None = None) -> SiteShare | None:
        """What is said about a site in a block."""
        said = {item.site: item for item in self.items}
        return said.get(Site(site, block)) or said.get(Site(site))

    def __str__(self) -> str:
        return ",".join(map(str, self.items))


def least_average(main_bits: int, low_bits: int, widths: bool) -> float:
    """The average bits that a budget may go down to: with a quarter of the columns at `low_bits`, where bits may be taken away."""
    return main_bits - max(0, main_bits - low_bits) / MOST_LOW if widths else main_bits


def _parse(item: str) -> SiteShare:
    match = _ITEM.fullmatch(item)
    said = _said(match) if match else None
    if said is None or said.site.name not in (SITES if said.site.block is None else SITES_OF_BLOCKS):
        raise ConfigError(
            f"option site_fractions: expected SITE=HIGH, SITE=HIGH@BITS or SITE=HIGH@BITS:LOW@BITS with a site out of "
            f"{', '.join(SITES)} ({', '.join(SITES_OF_BLOCKS)} also for one block, as in down.3), fractions from 0 to 1/2 and bits "
            f"from 2 to 8, separated by commas; got {item!r}"
        )
    return said


def _said(match: re.Match[str]) -> SiteShare | None:
    """One item; None where a number is out of range."""
    site = Site(match["site"], None if match["block"] is None else int(match["block"]))
    high, low = _fraction(match["high"]), None if match["low"] is None else _fraction(match["low"])
    high_bits, low_bits = (None if match[n] is None else int(match[n]) for n in ("high_bits", "low_bits"))
    bad = high is None or (match["low"] is not None and low is None)
    bad = bad or any(bits is not None and not 2 <= bits <= 8 for bits in (high_bits, low_bits))
    return None if bad or high is None else SiteShare(site, high, high_bits, low, low_bits)


def _fraction(text: str) -> float | None:
    """A number from 0 to 1/2; None for anything else."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return None
    return value if 0 <= value <= 0.5 else None


def _number(value: float) -> str:
    """A fraction where a short one is the same number, such as 3/64; else the number."""
    near = Fraction(value).limit_denominator(1 << 20)
    return str(near) if float(near) == value else repr(value)
