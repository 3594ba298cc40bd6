"""Weights as codes: symmetric, one scale per output channel and part, or group of its columns (scale_search.py).

w ~ q * scale        q = clamp(rint(w / scale), -2^(b-1), 2^(b-1)-1)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import Part, QuantSpec, check_parts, column_scales
from resq_compiler.numerics.scale_search import Clip, check_weight, search_scale

ROWS = 1024  # that are compared at a time


@dataclass(frozen=True)
class QuantizedWeight:
    """One part of a linear's weight: w[:, part] ~ qdata * scale.

    qdata: int8 [N, K_part], in [-2^(bits-1), 2^(bits-1)-1].    scale: float32, positive, [N], or [N, groups] of `group_size` columns each,
    the last group of a part perhaps of fewer. Of experts, all with one dimension E before.
    """

    qdata: Tensor
    scale: Tensor
    bits: int
    group_size: int | None = None

    def dequantize(self) -> Tensor:
        """float32, as qdata."""
        return self.qdata * column_scales(self.scale, self.qdata.shape[-1], self.group_size)


def dequantize_weight(parts: Sequence[QuantizedWeight]) -> Tensor:
    """float32 [N, K] of all parts side by side, in the order given."""
    return torch.cat([p.dequantize() for p in parts], dim=1)


def room_for(rows: int, some: Sequence[QuantizedWeight]) -> list[QuantizedWeight]:
    """Memory for the parts of a weight of so many rows, of which `some` are like the first; `put_rows` fills it."""
    return [
        QuantizedWeight(p.qdata.new_empty(rows, *p.qdata.shape[1:]), p.scale.new_empty(rows, *p.scale.shape[1:]), p.bits, p.group_size)
        for p in some
    ]  # fmt: skip


def put_rows(whole: Sequence[QuantizedWeight], start: int, some: Sequence[QuantizedWeight]) -> None:
    """Write the parts of some rows into those of a weight, from row `start` on."""
    for part, rows in zip(whole, some, strict=True):
        part.qdata[start : start + len(rows.qdata)] = rows.qdata
        part.scale[start : start + len(rows.scale)] = rows.scale


def rows_noise(part: QuantizedWeight, weight: Iterable[Tensor]) -> float:
    """Frobenius norm of what rounding changed, over that of the weight [N, K], of which some rows are given after the other."""

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor, int | None]]:
        start = 0
        for exact in itertools.chain.from_iterable(piece.split(ROWS) for piece in weight):
            stop = start + len(exact)
            yield part.qdata[start:stop], part.scale[start:stop], exact, part.group_size
            start = stop

    return noise_of(rows())


def noise_of(pieces: Iterable[tuple[Tensor, Tensor, Tensor, int | None]]) -> float:
    """The same of codes, their scales, and the weights that they are of, with the size of groups: a piece of each after the other."""
    lost = kept = 0.0
    for codes, scale, exact, group_size in pieces:
        here = exact.to(codes.device)
        off = torch.mul(codes, column_scales(scale, codes.shape[1], group_size)).sub_(here)
        lost += float(torch.linalg.vector_norm(off, dtype=torch.float64)) ** 2
        kept += float(torch.linalg.vector_norm(here, dtype=torch.float64)) ** 2
    return (lost / max(kept, torch.finfo(torch.float64).tiny)) ** 0.5


def split_rows(parts: Sequence[QuantizedWeight], rows: Sequence[int]) -> list[list[QuantizedWeight]]:
    """Undo a stacking of linears along out_features: for each count in `rows`, its own list of parts.

    Raises: QuantError: the counts do not add up to N.
    """
    total = parts[0].qdata.shape[-2]
    if sum(rows) != total:
        raise QuantError(f"split_rows: row counts {list(rows)} add to {sum(rows)}, the stacked weight has {total} rows")
    pieces = [
        zip(p.qdata.split(list(rows), -2), p.scale.split(list(rows), p.qdata.dim() - 2), strict=True) for p in parts
    ]
    return [
        [
            QuantizedWeight(q.contiguous(), s.contiguous(), p.bits, p.group_size)
            for p, (q, s) in zip(parts, group, strict=True)
        ]
        for group in zip(*pieces, strict=True)
    ]


def quantize_weight_rtn(
    w: Tensor, parts: Sequence[Part], *, clip: Clip = "mse", column_weight: Tensor | None = None,
    group_size: int | None = None,
) -> list[QuantizedWeight]:  # fmt: skip
    """Round a weight to nearest, part by part.

    Args:    w: [N, K] floating point.    parts: cover the K columns.
             clip, column_weight ([K]): see search_scale.    group_size: columns of a part that share a scale; None: all.
    Returns: one QuantizedWeight for each part, in order.
    Raises:  QuantError: parts do not cover K, w not finite, or an option not usable.
    """
    check_weight(w, "quantize_weight_rtn")
    check_parts(parts, w.shape[1])
    result = []
    for part in parts:
        columns = slice(part.start, part.stop)
        weighting = None if column_weight is None else column_weight[columns]
        scale = part_scale(w[:, columns], part.bits, group_size, clip=clip, column_weight=weighting)
        codes = round_to_codes(w[:, columns], scale, part.bits, group_size)
        result.append(QuantizedWeight(codes, scale, part.bits, group_size))
    return result


def round_to_codes(w: Tensor, scale: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """int8 [N, K] codes of w [N, K] at scale [N], or [N, groups], by true division in float32."""
    spec, scales = QuantSpec(bits), column_scales(scale, w.shape[1], group_size)
    return (w.detach().float() / scales).round_().clamp_(spec.qmin, spec.qmax).to(torch.int8)


def part_scale(
    w: Tensor, bits: int, group_size: int | None, *, clip: Clip = "mse", column_weight: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`search_scale` of a part: [N], or of each group of its columns: [N, groups]."""
    if group_size is None:
        return search_scale(w, bits, clip=clip, column_weight=column_weight)
    pieces = [slice(start, start + group_size) for start in range(0, w.shape[1], group_size)]
    weights = [None if column_weight is None else column_weight[piece] for piece in pieces]
    found = [
        search_scale(w[:, piece], bits, clip=clip, column_weight=weight)
        for piece, weight in zip(pieces, weights, strict=True)
    ]
    return torch.stack(found, 1)
