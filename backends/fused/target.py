"""Everything the lowering knows about the machine it lowers for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from resq_compiler.backends.fused.formats import CacheFormat, CodeFormat
from resq_compiler.backends.fused.kernels import Kernels

ALL_SCORES = frozenset({"sinks", "prefix", "slopes"})


def takes_any(columns: int) -> str | None:
    """For targets whose kernels have no limit."""
    return None


@dataclass(frozen=True)
class Target:
    """A set of kernels and the bytes they want.

    name: as in `targets.TARGETS`, and the attribute `target` of every operator in a lowered graph.
    why_not_columns: why no kernel quantizes rows of so many columns, or None.
    why_not_transform: why no kernel multiplies rows of so many columns by a Hadamard matrix, or None; PyTorch does it then.
    why_not_head: why no kernel attends with heads of so many columns, or None.
    why_not_entry: why no kernel reads cached vectors of so many columns as floats, or None; absent where none does.
    takes: which of `sinks`, `prefix` and `slopes` its attention takes (Scores).
    any_parts: how activations are split and packed is not bound to their readers and makers: weights of 4 bits are low beside activations
    of 8, and attention gives parts of any widths, not only those of its values.
    stacked: linears of one input become one operator (q, k and v; gate and up).
    """

    name: str
    codes: CodeFormat
    cache: CacheFormat
    kernels: Kernels
    why_not_columns: Callable[[int], str | None] = takes_any
    why_not_transform: Callable[[int], str | None] = takes_any
    why_not_head: Callable[[int], str | None] = takes_any
    takes: frozenset[str] = frozenset()
    any_parts: bool = False
    why_not_entry: Callable[[int], str | None] | None = None
    stacked: bool = True
