"""Tables, sizes and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False, left: int = 1) -> str:
    """Lines of aligned cells for a terminal, or a table in Markdown: the first `left` columns to the left, the others to the right."""
    sides = ("l" * left + "r" * len(header))[: len(header)] if rows else "l" * len(header)
    widths = [max([len(name) + MARGIN, *(len(row[i]) for row in rows)]) for i, name in enumerate(header)]
    lines = [[_padded(*cell) for cell in zip(line, widths, sides, strict=True)] for line in (header, *rows)]
    if markdown:
        rule = [
            ":" + "-" * (w + 1) if side == "l" else "-" * (w + 1) + ":" for w, side in zip(widths, sides, strict=True)
        ]
        return "\n".join([_piped(lines[0]), f"|{'|'.join(rule)}|", *map(_piped, lines[1:])])
    return "\n".join("  ".join(line).rstrip() for line in (lines[0], ["-" * w for w in widths], *lines[1:]))


MARGIN = 2
"""A column is wider than its name by this."""


def _padded(cell: str, width: int, side: str) -> str:
    return cell.ljust(width) if side == "l" else cell.rjust(width)


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def megabytes(count: float | None) -> str:
    """Bytes in units of 10^6, such as 538.1 MB."""
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def duration(seconds: float | None) -> str:
    """Seconds as people say them, such as 40 s, 12 min or 3.5 h; "-" for nothing."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def first_line(error: BaseException) -> str:
    """Of an error's message, without the rest of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
