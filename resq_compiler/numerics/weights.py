"""Weights as codes: symmetric, one scale per output channel and part, and the search for that scale.

    w ~ q * scale        q = clamp(rint(w / scale), -2^(b-1), 2^(b-1)-1)        scale = shrink * max|w| / (2^(b-1)-1)

The search tries shrink = 1.00, 0.99 .. 0.21 for every row and keeps the least sum_k h_k |w - q * scale|^norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import FLT_MIN, Part, QuantSpec, check_parts

Clip = Literal["mse", "max"]
SHRINKS = tuple(round(1 - 0.01 * i, 2) for i in range(80))

_CHUNK = 2**17  # weights per chunk: three float32 temporaries stay in a 2 MB cache, whatever the layer's size


@dataclass(frozen=True)
class QuantizedWeight:
    """One part of a linear's weight: w[:, part] ~ qdata * scale[:, None].

    qdata: int8 [N, K_part], in [-2^(bits-1), 2^(bits-1)-1].    scale: float32 [N], positive.
    """

    qdata: Tensor
    scale: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """float32 [N, K_part]."""
        return self.qdata * self.scale[:, None]


def dequantize_weight(parts: Sequence[QuantizedWeight]) -> Tensor:
    """float32 [N, K] of all parts side by side, in the order given."""
    return torch.cat([p.dequantize() for p in parts], dim=1)


def split_rows(parts: Sequence[QuantizedWeight], rows: Sequence[int]) -> list[list[QuantizedWeight]]:
    """Undo a stacking of linears along out_features: for each count in `rows`, its own list of parts.

    Raises: QuantError: the counts do not add up to N.
    """
    total = parts[0].qdata.shape[0]
    if sum(rows) != total:
        raise QuantError(f"split_rows: row counts {list(rows)} add to {sum(rows)}, the stacked weight has {total} rows")
    pieces = [zip(p.qdata.split(list(rows)), p.scale.split(list(rows)), strict=True) for p in parts]
    return [
        [QuantizedWeight(q.contiguous(), s.contiguous(), p.bits) for p, (q, s) in zip(parts, group, strict=True)]
        for group in zip(*pieces, strict=True)
    ]


def quantize_weight_rtn(
    w: Tensor, parts: Sequence[Part], *, clip: Clip = "mse", norm: float = 2.0, column_weight: Tensor | None = None
) -> list[QuantizedWeight]:
    """Round a weight to nearest, part by part.

    Args:    w: [N, K] floating point.    parts: cover the K columns.
             clip, norm, column_weight ([K]): see search_scale.
    Returns: one QuantizedWeight for each part, in order.
    Raises:  QuantError: parts do not cover K, w not finite, or an option not usable.
    """
    check_weight(w, "quantize_weight_rtn")
    check_parts(parts, w.shape[1])
    result = []
    for part in parts:
        columns = slice(part.start, part.stop)
        weighting = None if column_weight is None else column_weight[columns]
        scale = search_scale(w[:, columns], part.bits, clip=clip, norm=norm, column_weight=weighting)
        result.append(QuantizedWeight(round_to_codes(w[:, columns], scale, part.bits), scale, part.bits))
    return result


def round_to_codes(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 [N, K] codes of w [N, K] at scale [N], by true division in float32."""
    spec = QuantSpec(bits)
    return (w.detach().float() / scale[:, None]).round_().clamp_(spec.qmin, spec.qmax).to(torch.int8)


def search_scale(
    w: Tensor, bits: int, *, clip: Clip = "mse", norm: float = 2.0, column_weight: Tensor | None = None
) -> Tensor:
    """Scale of each row: the largest weight ("max") or the best of the 80 shrinks ("mse").

    The search is exhaustive in effect: a chunk of rows stops early only once, in every row, the error of the clipped
    weights alone, which grows as shrink falls, exceeds the best error found, so that no smaller shrink can win. Ties
    keep the larger shrink.

    Args:    w: [N, K] floating point.    norm: exponent of the error, > 0.    column_weight: [K], >= 0, weight of each
             column's error; diag(H) with norm=2 makes the search aware of the layer's output.
    Returns: float32 [N], at least FLT_MIN (also for rows of zeros).
    Raises:  QuantError: w not finite, unknown clip, norm <= 0, column_weight of another length, negative or not finite.
    Source:  GPTQ's find_params with the grid ResQ uses; differs: squares, not the power 2.4 (perplexity of
             SmolLM2 with rounded weights, seed 0: 28.30, not 29.17), column_weight, early stop, 1.00 included.
    """
    check_weight(w, "search_scale")
    if clip not in ("mse", "max") or not norm > 0:
        raise QuantError(f"search_scale: clip must be 'mse' or 'max' and norm > 0, got clip={clip!r}, norm={norm}")
    spec = QuantSpec(bits)
    weighting = _column_weight(column_weight, w)
    scales = []
    for chunk in w.detach().split(max(_CHUNK // w.shape[1], 1)):
        chunk = chunk.float()
        largest = torch.maximum(chunk.amax(1), chunk.amin(1).neg_())
        if clip == "mse":
            # in units of the row's largest weight the errors cannot underflow
            shrink = _best_shrink(chunk / largest.clamp(min=FLT_MIN)[:, None], spec, norm, weighting)
            scales.append(shrink * largest / spec.qmax)
        else:
            scales.append(largest / spec.qmax)
    return torch.cat(scales).clamp_(min=FLT_MIN)


def _best_shrink(unit: Tensor, spec: QuantSpec, norm: float, weighting: Tensor) -> Tensor:
    """unit: [R, K] in [-1, 1]. Returns float32 [R]."""
    best = torch.full_like(unit[:, 0], torch.inf)
    shrink = torch.ones_like(best)
    scaled, error = torch.empty_like(unit), torch.empty_like(unit)
    for i, candidate in enumerate(SHRINKS):
        torch.mul(unit, spec.qmax / candidate, out=scaled)
        factor = (candidate / spec.qmax) ** norm
        if i in (1, 2, 4) or (i and i % 8 == 0):
            clipped = _row_error(scaled, scaled, error, spec, norm, weighting).mul_(factor)
            if bool((clipped > best * 1.001).all()):  # 0.1 % covers the rounding of float32 sums
                break
        torch.round(scaled, out=error)
        total = _row_error(scaled, error, error, spec, norm, weighting).mul_(factor)
        shrink[total < best] = candidate
        torch.minimum(best, total, out=best)
    return shrink


def _row_error(scaled: Tensor, codes: Tensor, out: Tensor, spec: QuantSpec, norm: float, weighting: Tensor) -> Tensor:
    """sum_k h_k |scaled - clamp(codes)|^norm for each row; `out` is scratch and may be `codes`."""
    torch.clamp(codes, spec.qmin, spec.qmax, out=out)
    torch.sub(scaled, out, out=out).square_()
    if norm != 2:
        out.log_().mul_(norm / 2).exp_()  # vectorised; pow is 10x slower. log(0) = -inf comes back as exactly 0
    return out @ weighting


def _column_weight(column_weight: Tensor | None, w: Tensor) -> Tensor:
    if column_weight is None:
        return torch.ones(w.shape[1], device=w.device)
    if column_weight.shape != w.shape[1:] or not bool((column_weight.isfinite() & (column_weight >= 0)).all()):
        raise QuantError(
            f"search_scale: column_weight {tuple(column_weight.shape)} must hold {w.shape[1]} finite values >= 0, one "
            "for each in_feature; pass the diagonal of the second moment"
        )
    weighting = column_weight.double()
    return (weighting / weighting.mean().clamp(min=FLT_MIN)).float()


def check_weight(w: Tensor, where: str) -> None:
    """Raise QuantError unless w is a finite floating-point matrix [N, K] with N, K >= 1."""
    if w.dim() != 2 or not w.numel() or not w.is_floating_point():
        raise QuantError(f"{where}: expected a floating-point weight [N, K], got {w.dtype} {tuple(w.shape)}")
    # the extremes are NaN or infinite exactly when some weight is: one pass, no mask
    low, high = torch.aminmax(w.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~w.isfinite()).sum())
        raise QuantError(f"{where}: {bad} of {w.numel()} weights are NaN or infinite; check the checkpoint's dtype")
