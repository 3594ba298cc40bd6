"""Tables, sizes and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lines of aligned cells for a terminal, or a table in Markdown: the first column to the left, the others to the right."""
    return tabulate(
        rows, header, tablefmt="pipe" if markdown else "simple", disable_numparse=True, preserve_whitespace=True,
        colalign=("left", *["right"] * (len(header) - 1)) if rows else None,
    )  # fmt: skip


def megabytes(count: float | None) -> str:
    """Bytes in units of 10^6, such as 538.1 MB."""
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed decimals; large values without them; "-" for nothing."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return "-" if value is None else f"{100 * value:.1f} %"
