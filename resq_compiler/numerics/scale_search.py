"""The scale of every row of a weight: the best of 80 shrinks of its largest weight.

    u = w / max|w|        q_i(u) = clamp(rint(u / s_i), qmin, qmax)        s_i = shrink_i / qmax        shrink_i = 1.00, 0.99 .. 0.21

and the least error_i = sum_k h_k (u_k - s_i q_i(u_k))^2 wins; of equal ones the larger shrink. All are compared, in one of two ways.

By cells, where codes have few bits: every threshold between two codes, (2j - 1) s_i / 2 with whole j, is a whole number of steps of
1 / (200 qmax). Between neighbouring thresholds of all shrinks (a cell c, middle m_c) each shrink has one level l_ci, so that a row is known
by two sums for each cell, H_c of h and M_c of h u, and all errors are two matrix products:

    error_i = sum_c H_c (m_c - l_ci)^2 + 2 (M_c - m_c H_c) (m_c - l_ci) + (the same for all i)

One by one otherwise. The error of the clipped weights alone grows as the shrink falls: a row in which it exceeds the best error is done
and leaves. Both work in buffers, and with operators that threads share by rows: what one thread has written, it reads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec

Clip = Literal["mse", "max"]
SHRINKS = tuple(round(1 - 0.01 * i, 2) for i in range(80))

CHUNK = 2**18  # weights that are searched at a time: enough for threads to share an operator, few enough for a cache
CELLS_PER_COLUMN = 8  # more, and trying each shrink is faster
CHECKED = (3, 4, 6, 8, 12, *range(16, len(SHRINKS), 8))  # where the error of clipping is looked at, one by one


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
    w = w.detach()
    if clip == "max":
        return (_largest(w).float() / spec.qmax).clamp_(min=FLT_MIN)
    way = way_of(spec, weighting)
    rows = _rows_at_a_time(len(w), w.shape[1], way)
    best, buffer = way(rows, spec, weighting), weighting.new_empty(rows, w.shape[1])

    def of_piece(piece: Tensor) -> Tensor:
        unit = buffer[: len(piece)].copy_(piece)
        largest = _largest(unit)
        unit /= largest.clamp(min=FLT_MIN)[:, None]  # in units of the row's largest weight the errors cannot underflow
        return best(unit) * largest / spec.qmax

    return torch.cat([of_piece(piece) for piece in w.split(rows)]).clamp_(min=FLT_MIN)


def _largest(w: Tensor) -> Tensor:
    return torch.maximum(w.amax(1), w.amin(1).neg_())


def _rows_at_a_time(rows: int, columns: int, way: type[ByCells | OneByOne]) -> int:
    """Of pieces of one size. The sums by cell of a short row take more room than the row."""
    width = max(columns, 512) if way is ByCells else columns
    pieces = -(-rows * width // CHUNK)
    return -(-rows // min(pieces, rows))


def way_of(spec: QuantSpec, weighting: Tensor) -> type[ByCells | OneByOne]:
    """The faster way for a weight. Sums by cell are for CPUs: on GPUs their order is not the same in every run."""
    few = spec.bits <= 4 and len(cells_of(spec.bits).squares) <= CELLS_PER_COLUMN * len(weighting)
    return ByCells if few and weighting.device.type == "cpu" else OneByOne


@dataclass(frozen=True)
class Cells:
    """The cells of a number of bits. cell: of each of `2 steps + 1` grid steps over [-1, 1], int64.

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
    return Cells(steps, torch.cat([cell, last]), middles.float(), off.square().float(), (2 * off).float())


class ByCells:
    """The best shrink of rows by sums of cells. rows: at most; weighting: h, float32 [K]."""

    def __init__(self, rows: int, spec: QuantSpec, weighting: Tensor) -> None:
        self.cells, self.weighting = cells_of(spec.bits), weighting
        columns, count = len(weighting), len(self.cells.middles)
        self.scaled, self.step = torch.empty(rows, columns), torch.empty(rows, columns, dtype=torch.int64)
        self.index = torch.empty_like(self.step)
        self.total, self.moment = torch.empty(2, rows, count)
        self.errors = torch.empty(rows, len(SHRINKS))

    def __call__(self, unit: Tensor) -> Tensor:
        """unit: [R, K] in [-1, 1]. Returns the best shrink of each row, float32 [R]."""
        cells, rows = self.cells, len(unit)
        scaled, total, moment, errors = (t[:rows] for t in (self.scaled, self.total, self.moment, self.errors))
        step = self.step[:rows].copy_(torch.mul(unit, cells.steps, out=scaled).add_(cells.steps))
        index = torch.gather(cells.cell.expand(rows, -1), 1, step, out=self.index[:rows])
        total.zero_().scatter_add_(1, index, self.weighting.expand_as(unit))
        moment.zero_().scatter_add_(1, index, torch.mul(unit, self.weighting, out=scaled))
        torch.mm(total, cells.squares, out=errors)
        errors.addmm_(moment.sub_(total.mul_(cells.middles)), cells.slopes)
        return torch.tensor(SHRINKS)[errors.argmin(1)]


class OneByOne:
    """The same by trying one shrink after the other. A row is done where the error of clipping alone exceeds its best."""

    def __init__(self, rows: int, spec: QuantSpec, weighting: Tensor) -> None:
        self.spec, self.weighting = spec, weighting
        self.scaled, self.error = weighting.new_empty(2, rows, len(weighting))

    def __call__(self, unit: Tensor) -> Tensor:
        """The same; unit is overwritten."""
        shrink = torch.ones_like(unit[:, 0])
        best = torch.full_like(shrink, torch.inf)
        left, error = torch.arange(len(unit), device=unit.device), self.error[: len(unit)]
        for i, candidate in enumerate(SHRINKS):
            if i in CHECKED:
                keep = (self._error(unit, error, candidate, clipped=True) <= best * 1.001).nonzero()[:, 0]
                if len(keep) < len(left):  # 0.1 % covers the rounding of float32 sums
                    left, best = left[keep], best[keep]
                    unit, error = torch.index_select(unit, 0, keep, out=error[: len(keep)]), unit[: len(keep)]
            if not len(left):
                break
            total = self._error(unit, error, candidate)
            shrink[left[total < best]] = candidate
            torch.minimum(best, total, out=best)
        return shrink

    def _error(self, unit: Tensor, error: Tensor, candidate: float, clipped: bool = False) -> Tensor:
        """[R] sums over k of h_k (unit - s q(unit))^2, or that of the clipped weights alone; `error` is scratch."""
        spec = self.spec
        scaled = torch.mul(unit, spec.qmax / candidate, out=self.scaled[: len(unit)])
        codes = scaled if clipped else torch.round(scaled, out=error)
        torch.clamp(codes, spec.qmin, spec.qmax, out=error)
        torch.sub(scaled, error, out=error).square_().mul_(self.weighting)
        return error.sum(1).mul_((candidate / spec.qmax) ** 2)  # not a product with h, which one thread would do


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
