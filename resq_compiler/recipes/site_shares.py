"""Shares of columns with other bits than the main ones, for single sites: what the option `site_fractions` says.

    SITE[.BLOCK]=HIGH[@BITS][:LOW[@BITS]]        mlp=1/4    o=0    down.3=1/4@6    attention=1/8:1/8@2

HIGH is the share above the main bits and LOW the one below; what is not said is as for all sites.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from resq_compiler.errors import ConfigError

SITES = ("attention", "mlp", "o", "down", "key", "value")
"""Where shares may differ: inputs of q/k/v, gate/up, o and down, and cached keys and values."""

SITES_OF_BLOCKS = SITES[2:]
"""Those that may differ between blocks too, as in down.3; the others share U_A."""

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


@functools.cache
def parse_shares(text: str) -> dict[str, dict[str, Any]]:
    """The fields of Shares that are said, by SITE or SITE.BLOCK; not to be changed. Raises ConfigError."""
    found = {}
    for item in filter(None, text.replace(" ", "").split(",")):
        match = _ITEM.fullmatch(item)
        said = _said(match) if match else None
        site, block = (match["site"], match["block"]) if match else ("", None)
        if said is None or site not in (SITES if block is None else SITES_OF_BLOCKS):
            raise ConfigError(
                f"option site_fractions: expected SITE=HIGH, SITE=HIGH@BITS or SITE=HIGH@BITS:LOW@BITS with a site out of "
                f"{', '.join(SITES)} ({', '.join(SITES_OF_BLOCKS)} also for one block, as in down.3), fractions from 0 to 1/2 and bits "
                f"from 2 to 8, separated by commas; got {item!r}"
            )
        found[site if block is None else f"{site}.{int(block)}"] = said
    return found


def _said(match: re.Match[str]) -> dict[str, Any] | None:
    """Fields of one item; None where one is out of range."""
    said: dict[str, Any] = {name: _fraction(match[name]) for name in ("high", "low") if match[name] is not None}
    said |= {name: int(match[name]) for name in ("high_bits", "low_bits") if match[name] is not None}
    bad = -1.0 in said.values() or any(not 2 <= said.get(name, 2) <= 8 for name in ("high_bits", "low_bits"))
    return None if bad else said


def _fraction(text: str) -> float:
    """A number from 0 to 1/2; -1 for anything else."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        return -1.0
    return value if 0 <= value <= 0.5 else -1.0
