"""Arithmetic on weights in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_row_chunks(weight: Tensor, change: Callable[[Tensor], Tensor], rows: int = 4096) -> Tensor:
    """Apply a float64 function to the rows of a weight [N, K], a few thousand at a time: vocabularies are large. Of a weight [E, N, K] to
    those of each expert."""
    if weight.dim() == 3:
        return each(weight, lambda w: by_row_chunks(w, change, rows))
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], rows):
        result[start : start + rows] = change(weight[start : start + rows].double())
    return result


def each(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function that keeps the shape to value[0], value[1], ...: the weights or biases of each expert."""
    result = torch.empty_like(value)
    for i, one in enumerate(value):
        result[i] = change(one)
    return result
