"""Plain-text and Markdown tables, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lines of aligned cells: the first column to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))] for r in cells
    ]
    if markdown:
        rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
        text = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([text[0], f"|{rule}|", *text[1:]])
    text = ["  ".join(line).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


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
