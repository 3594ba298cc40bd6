"""Arithmetic on weights in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_row_chunks(weight: Tensor, change: Callable[[Tensor], Tensor], rows: int = 4096) -> Tensor:
    """Apply a float64 function to the rows of a weight, a few thousand at a time: vocabularies are large."""
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], rows):
        result[start : start + rows] = change(weight[start : start + rows].double())
    return result
