"""Arithmetic on weights in float64, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = 4 * 2**20
"""Bytes in float32 of the rows of a weight that are worked on together, at most."""


def by_row_chunks(weight: Tensor, change: Callable[[Tensor], Tensor], rows: int = 4096) -> Tensor:
    """Apply a float64 function to the rows of a weight [N, K], a few thousand at a time, in PIECE bytes of float32: vocabularies are
    large. Of a weight [E, N, K] to those of each expert."""
    if weight.dim() == 3:
        return each(weight, lambda w: by_row_chunks(w, change, rows))
    result, rows = torch.empty_like(weight), max(1, min(rows, PIECE // (4 * max(weight.shape[1], 1))))
    for start in range(0, weight.shape[0], rows):
        result[start : start + rows] = change(weight[start : start + rows].double())
    return result


def by_column_chunks(weight: Tensor, change: Callable[[Tensor], Tensor], columns: int = 2048) -> Tensor:
    """Apply a function to the columns of a weight [N, K], each for itself, some thousands at a time."""
    result = torch.empty_like(weight)
    for here, into in zip(weight.split(columns, 1), result.split(columns, 1), strict=True):
        into.copy_(change(here))
    return result


def each(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function that keeps the shape to value[0], value[1], ...: the weights or biases of each expert."""
    result = torch.empty_like(value)
    for i, one in enumerate(value):
        result[i] = change(one)
    return result
