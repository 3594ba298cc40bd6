"""The scale of every row of a weight: the best of 80 shrinks of its largest weight.

    u = w / max|w|        q_i(u) = clamp(rint(u / s_i), qmin, qmax)        s_i = shrink_i / qmax        shrink_i = 1.00, 0.99 .. 0.21

and the least error_i = sum_k h_k (u_k - s_i q_i(u_k))^2 wins; of equal ones the larger shrink. All are compared, in one of two ways.

By cells, where codes have few bits: every threshold between two codes, (2j - 1) s_i / 2 with whole j, is a whole number of steps of
1 / (200 qmax). Between neighbouring thresholds of all shrinks (a cell c, middle m_c) each shrink has one level l_ci, so that a row is known
by two sums for each cell, H_c of h and M_c of h u, and all errors are two matrix products:

    error_i = sum_c H_c (m_c - l_ci)^2 + 2 (M_c - m_c H_c) (m_c - l_ci) + (the same for all i)

One by one otherwise. The error of the clipped weights alone grows as the shrink falls: a row in which it exceeds the best error is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec
from resq_compiler.util.threads import map_threads

Clip = Literal["mse", "max"]
SHRINKS = tuple(round(1 - 0.01 * i, 2) for i in range(80))

CHUNK = 2**17  # weights that are searched at a time: temporaries stay in a 2 MB cache, whatever the layer's size
CELLS_PER_COLUMN = 8  # more, and trying each shrink is faster


def search_scale(w: Tensor, bits: int, *, clip: Clip = "mse", column_weight: Tensor | None = None) -> Tensor:
    """Scale of each row: the largest weight ("max") or the best of the 80 shrinks ("mse").

    Args:    w: [N, K] floating point.    column_weight: [K], >= 0, weight h of each column's error; diag(H) makes the search
             aware of the layer's output.
    Returns: float32 [N], at least FLT_MIN (also for rows of zeros).
    Raises:  QuantError: w not finite, unknown clip, column_weight of another length, negative or not finite.
    Source:  GPTQ's find_params with the grid ResQ uses; differs: squares, not the power 2.4 (perplexity of
             SmolLM2 with rounded weights, seed 0: 28.30, not 29.17), column_weight, 1.00 included.
    """
    check_weight(w, "search_scale")
    if clip not in ("mse", "max"):
        raise QuantError(f"search_scale: clip must be 'mse' or 'max', got clip={clip!r}")
    spec = QuantSpec(bits)
    weighting = _column_weight(column_weight, w)
    best = _search_of(spec, w)

    def of_chunk(chunk: Tensor) -> Tensor:
        chunk = chunk.float()
        largest = torch.maximum(chunk.amax(1), chunk.amin(1).neg_())
        if clip == "max":
            return largest / spec.qmax
        # in units of the row's largest weight the errors cannot underflow
        return best(chunk / largest.clamp(min=FLT_MIN)[:, None], spec, weighting) * largest / spec.qmax

    chunks = w.detach().split(max(CHUNK // w.shape[1], 1))
    scales = map_threads(of_chunk, chunks) if w.device.type == "cpu" else [of_chunk(chunk) for chunk in chunks]
    return torch.cat(scales).clamp_(min=FLT_MIN)


def _search_of(spec: QuantSpec, w: Tensor) -> Callable[[Tensor, QuantSpec, Tensor], Tensor]:
    """The faster way for a weight. Sums by cell are for CPUs: on GPUs their order is not the same in every run."""
    few = spec.bits <= 4 and len(cells_of(spec.bits).squares) <= CELLS_PER_COLUMN * w.shape[1]
    return best_by_cells if few and w.device.type == "cpu" else best_one_by_one


@dataclass(frozen=True)
class Cells:
    """The cells of a number of bits. cell: of each of `2 steps + 1` grid steps over [-1, 1], int32.

    middles: m_c in float32 [C]. squares: (m_c - l_ci)^2; slopes: 2 (m_c - l_ci); float32 [C, 80].
    """

    steps: int
    cell: Tensor
    middles: Tensor
    squares: Tensor
    slopes: Tensor


@functools.cache
def cells_of(bits: int) -> Cells:
    """Thresholds of all shrinks and the levels between them."""
    spec = QuantSpec(bits)
    steps = 200 * spec.qmax
    reach = {s * (2 * j - 1) for s in range(100, 100 - len(SHRINKS), -1) for j in range(1, spec.qmax + 1)}
    below = {s * (2 * j - 1) for s in range(100, 100 - len(SHRINKS), -1) for j in range(1, spec.qmax + 2)}
    edges = torch.tensor(sorted({n for n in reach | {-n for n in below} if -steps < n < steps}))
    cell = torch.bucketize(torch.arange(-steps, steps) + 0.5, edges.double())
    borders = torch.cat([torch.tensor([-steps]), edges, torch.tensor([steps])]).double() / steps
    middles = (borders[1:] + borders[:-1]) / 2
    scales = torch.tensor(SHRINKS, dtype=torch.float64) / spec.qmax
    off = middles[:, None] - (middles[:, None] / scales).round_().clamp_(spec.qmin, spec.qmax) * scales
    last = cell[-1:]  # of u = 1 itself
    return Cells(steps, torch.cat([cell, last]).int(), middles.float(), off.square().float(), (2 * off).float())


def best_by_cells(unit: Tensor, spec: QuantSpec, weighting: Tensor) -> Tensor:
    """unit: [R, K] in [-1, 1]. Returns the best shrink of each row, float32 [R]."""
    cells = cells_of(spec.bits)
    rows, count = len(unit), len(cells.middles)
    step = (unit * cells.steps).add_(cells.steps).int()
    index = cells.cell.index_select(0, step.flatten()).view_as(step)
    index += torch.arange(rows, dtype=torch.int32)[:, None] * count
    total, moment = (
        torch.bincount(index.flatten(), values.flatten(), rows * count).view(rows, count)
        for values in (weighting.expand_as(unit), unit * weighting)
    )
    errors = (total @ cells.squares).addmm_(moment.sub_(total.mul_(cells.middles)), cells.slopes)
    return torch.tensor(SHRINKS)[errors.argmin(1)]


def best_one_by_one(unit: Tensor, spec: QuantSpec, weighting: Tensor) -> Tensor:
    """The same; ends once every row is done."""
    best = torch.full_like(unit[:, 0], torch.inf)
    shrink = torch.ones_like(best)
    scaled, error = torch.empty_like(unit), torch.empty_like(unit)
    for i, candidate in enumerate(SHRINKS):
        torch.mul(unit, spec.qmax / candidate, out=scaled)
        factor = (candidate / spec.qmax) ** 2
        if i in (1, 2, 4) or (i and i % 8 == 0):
            clipped = _row_error(scaled, scaled, error, spec, weighting).mul_(factor)
            if bool((clipped > best * 1.001).all()):  # 0.1 % covers the rounding of float32 sums
                break
        torch.round(scaled, out=error)
        total = _row_error(scaled, error, error, spec, weighting).mul_(factor)
        shrink[total < best] = candidate
        torch.minimum(best, total, out=best)
    return shrink


def _row_error(scaled: Tensor, codes: Tensor, out: Tensor, spec: QuantSpec, weighting: Tensor) -> Tensor:
    """sum_k h_k (scaled - clamp(codes))^2 for each row; `out` is scratch and may be `codes`."""
    torch.clamp(codes, spec.qmin, spec.qmax, out=out)
    torch.sub(scaled, out, out=out).square_()
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
