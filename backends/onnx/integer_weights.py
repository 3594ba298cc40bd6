"""Weights of the integer products: correction rows, stacked biases, stored codes. See form_integer.py for the equation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from resq_compiler.backends.onnx.builder import GraphBuilder
from resq_compiler.backends.onnx.plan import Product, Term

PIECE = 127  # largest magnitude of one correction row


def stored_zero(bits: int) -> int:
    """The stored form of the law's smallest code."""
    return 256 - 2**bits


def correction_count(terms: Sequence[Term], groups: int = 1) -> int:
    """How many rows of at most PIECE hold the column sums of every weight that reads one input, or of each of its groups of columns."""
    cut = (t.codes.reshape(groups, -1, t.qdata.shape[0]) for t in terms)
    return max(-(-int(np.abs(codes.sum(1, dtype=np.int64)).max(initial=0)) // PIECE) for codes in cut)


def correction_rows(codes: np.ndarray, rows: int) -> np.ndarray:
    """int8 [rows, N] that sum to minus the column sums of codes [K, N]."""
    rest = -codes.astype(np.int64).sum(0)
    result = np.empty((rows, codes.shape[1]), np.int8)
    for row in result:
        row[:] = np.clip(rest, -PIECE, PIECE)
        rest = rest - row
    if rest.any():
        raise AssertionError("too few correction rows")
    return result


def stacked_bias(members: Sequence[Product]) -> np.ndarray | None:
    """The biases of all members, zeros where there is none; None where none has one."""
    if all(m.bias is None for m in members):
        return None
    biases = [m.bias_array for m in members]
    zeros = [np.zeros(m.out_features, np.float32) for m in members]
    return np.concatenate([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])


@dataclass(frozen=True)
class StackedCodes:
    """Codes [K, N] of terms side by side, which are made when the model is written."""

    terms: tuple[Term, ...]

    @property
    def dims(self) -> tuple[int, int]:
        """[K, N]."""
        return int(self.terms[0].qdata.shape[1]), sum(int(t.qdata.shape[0]) for t in self.terms)

    @property
    def bits(self) -> int:
        return max(t.weight_bits for t in self.terms)

    def make(self) -> np.ndarray:
        return np.concatenate([t.codes for t in self.terms], 1)

    def pieces(self) -> tuple[np.ndarray]:
        return (self.make(),)


def stored_codes(
    b: GraphBuilder, pieces: Callable[[], Iterable[np.ndarray]], dims: Sequence[int], bits: int, name: str
) -> str:
    """Weight codes as an INT4 or INT8 initializer; pieces as GraphBuilder.int4 has them."""
    if bits <= 4:
        return b.int4(f"{name}.codes", dims, pieces)
    return b.later(f"{name}.codes", dims, np.int8, pieces)


def stacked_scales(b: GraphBuilder, terms: Sequence[Term]) -> str:
    """float32 [N], or [groups, N]."""
    return b.constant(np.concatenate([t.scales for t in terms], -1), name=f"{terms[0].name}.scales")


def column_scales(b: GraphBuilder, terms: Sequence[Term]) -> str:
    """float32 [N], or [K, N] of weights with groups: computed from [groups, N] when the model is loaded."""
    scales, size = stacked_scales(b, terms), terms[0].group_size
    if size is None:
        return scales
    width, (groups, rows) = terms[0].qdata.shape[1], np.concatenate([t.scales for t in terms], -1).shape
    each = b.op("Expand", b.op("Unsqueeze", scales, b.ints(1)), b.ints(groups, size, rows))
    columns = b.op("Reshape", each, b.ints(groups * size, rows))
    return columns if groups * size == width else b.op("Slice", columns, b.ints(0), b.ints(width), b.ints(0))
