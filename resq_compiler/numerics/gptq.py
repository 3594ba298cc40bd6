"""GPTQ on one weight (or several stacked ones that share an input): tensor mathematics only.

With H = sum x^T x + damping and U upper triangular, U^T U = H^-1, columns are rounded in order and each rounding error
is spread over the columns still to come:

    q_j = round(w_j)        e_j = (w_j - q_j) / U_jj        w_i -= e_j U_ji   for i > j

sum_j e_j^2 is then the row's output error, diag(dW H dW^T). Where the quantized model's input x~ (H is its moment) is
not the original x, the weight can make up for the difference:

    GPTAQ           w_i += w_j P_ji as column j is rounded,    P = alpha triu(D U^T, 1) U,    D = sum (x - x~)^T x~
    least squares   W + alpha G H^-1 is quantized instead of W,    G = sum (y - W x~)^T x~,   y what the output should be
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.descent import descend
from resq_compiler.numerics.quantized import Part, QuantSpec, check_parts
from resq_compiler.numerics.weights import Clip, QuantizedWeight, check_weight, search_scale

_DAMPING_RETRIES = 3


@dataclass(frozen=True)
class GptqResult:
    """parts: codes and scales, in the order asked.    row_loss: float64 [N], sum_j e_j^2 (see the module docstring).
    damping: fraction of mean(diag H) really used; larger than asked if the factorization needed it.
    dead_columns: inputs that were zero in all calibration tokens (rounded to nearest, nothing to learn from).
    """

    parts: list[QuantizedWeight]
    row_loss: Tensor
    damping: float
    dead_columns: int


def gptq(
    w: Tensor,
    hessian: Tensor,
    parts: Sequence[Part],
    *,
    block_size: int = 32,
    damping: float = 0.01,
    act_order: bool = False,
    clip: Clip = "mse",
    norm: float = 2.0,
    weighted_clip: bool = False,
    cross: Tensor | None = None,
    output_gap: Tensor | None = None,
    alpha: float = 1.0,
    sweeps: int = 0,
) -> GptqResult:
    """Quantize a weight, compensating each column's rounding in the columns after it.

    Columns go in part order (low first, 8-bit last, so the accurate columns absorb the error). Scales are searched on
    the weight before the loop (with output_gap: on the corrected one) and stay fixed. Rows are independent: stack linears that
    share an input, then `weights.split_rows`.

    Args:    w: [N, K] floating point.    hessian: [K, K] sum x^T x at any scale.    parts: cover K, ascending bits.
             block_size: columns handled one by one before errors move on as a matrix product; the result depends on it
             by rounding only.    damping: fraction of mean(diag H).    act_order: within each part, columns by
             descending diag H.    clip, norm: see search_scale; weighted_clip weighs its errors by diag H.
             cross: [K, K] D above, same scale as hessian.    output_gap: [N, K] G above, same scale; not both.
             alpha: how much of the correction is made; 1 is all of it (GPTQModel's default for GPTAQ is 0.25).
             sweeps: rounds of coordinate descent on codes and scales afterwards (descent.py); not with cross.
    Returns: GptqResult; parts[i].qdata int8 [N, K_i] in the original column order, scale float32 [N].
    Raises:  QuantError: shapes, options or values not usable; H not positive definite even with 100x the damping.
    Source:  GPTQ (arXiv 2210.17323) algorithm 1; GPTAQ (arXiv 2504.02692). Differs: errors move on by recursive
             halving; dead columns are rounded, not zeroed; P multiplies the unrounded w_j also beyond a block; output_gap.
    """
    _check(w, hessian, cross, output_gap, parts, block_size, damping, sweeps)
    w = w.detach().float()
    moment = hessian.to(torch.float64)
    diagonal = moment.diagonal()
    order = _column_order(diagonal, parts, act_order)
    upper, used = _inverse_factor(moment, order, damping)
    feedback = None
    if cross is not None:
        feedback = alpha * torch.triu(cross.to(upper)[order][:, order] @ upper.t(), 1) @ upper
    if output_gap is not None:
        w = w.index_add(1, order, (output_gap.to(upper)[:, order] @ upper.t() @ upper).float(), alpha=alpha)
    weighting = diagonal if weighted_clip else None
    scales = [_part_scale(w, p, clip, norm, weighting) for p in parts]
    columns = w.t()[order].contiguous()
    loop = _Loop(columns.clone() if sweeps else columns, upper, feedback, parts, scales, block_size)
    del upper
    loop.run(0, w.shape[1])
    found, row_loss = loop.codes, loop.errors.double().square_().sum(0)
    if sweeps:
        found, scales, row_loss = descend(
            columns, _damped(moment, order, used).float(), found, scales, parts, sweeps, block_size
        )
    codes = torch.empty_like(found)
    codes[order] = found
    quantized = [
        QuantizedWeight(codes[p.start : p.stop].t().contiguous(), scale, p.bits)
        for p, scale in zip(parts, scales, strict=True)
    ]
    return GptqResult(quantized, row_loss, used, int((diagonal == 0).sum()))


def hessian_error(w: Tensor, image: Tensor, hessian: Tensor) -> Tensor:
    """Output error of each row, diag(dW H dW^T) with dW = w - image; its sum is the trace. Returns float64 [N]."""
    delta = w.double() - image.double()
    return ((delta @ hessian.double()) * delta).sum(1)


class _Loop:
    """State of one run, columns as contiguous rows: weights, errors and codes are [K, N]."""

    def __init__(
        self,
        weights: Tensor,
        upper: Tensor,
        feedback: Tensor | None,
        parts: Sequence[Part],
        scales: Sequence[Tensor],
        block_size: int,
    ) -> None:
        self.weights = weights
        self.errors = torch.empty_like(weights)
        self.codes = torch.empty_like(weights, dtype=torch.int8)
        self.block_size = block_size
        self.columns = [(s, QuantSpec(p.bits)) for p, s in zip(parts, scales, strict=True) for _ in range(p.width)]
        self.inverse_diagonal = (1 / upper.diagonal()).tolist()
        # transposed, so that what column j receives from the earlier ones is the contiguous row [j, :j]
        self.spread = upper.t().float().contiguous()
        self.feedback = None if feedback is None else feedback.t().float().contiguous()

    def run(self, start: int, stop: int) -> None:
        """Quantize columns [start, stop); errors of earlier columns are already in their weights."""
        if stop - start <= self.block_size:
            for j in range(start, stop):
                self._column(start, j)
            return
        middle = (start + stop) // 2
        self.run(start, middle)
        rest, done = slice(middle, stop), slice(start, middle)
        self.weights[rest].addmm_(self.spread[rest, done], self.errors[done], alpha=-1)
        if self.feedback is not None:
            self.weights[rest].addmm_(self.feedback[rest, done], self.weights[done])
        self.run(middle, stop)

    def _column(self, start: int, j: int) -> None:
        column = self.weights[j]
        if j > start:
            column.addmv_(self.errors[start:j].t(), self.spread[j, start:j], alpha=-1)
            if self.feedback is not None:
                column.addmv_(self.weights[start:j].t(), self.feedback[j, start:j])
        scale, spec = self.columns[j]
        code = (column / scale).round_().clamp_(spec.qmin, spec.qmax)
        self.codes[j] = code
        torch.addcmul(column, code, scale, value=-1, out=self.errors[j]).mul_(self.inverse_diagonal[j])


def _part_scale(w: Tensor, part: Part, clip: Clip, norm: float, weighting: Tensor | None) -> Tensor:
    columns = slice(part.start, part.stop)
    column_weight = None if weighting is None else weighting[columns]
    return search_scale(w[:, columns], part.bits, clip=clip, norm=norm, column_weight=column_weight)


def _column_order(diagonal: Tensor, parts: Sequence[Part], act_order: bool) -> Tensor:
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    pieces = [diagonal[p.start : p.stop].argsort(descending=True, stable=True) + p.start for p in parts]
    return torch.cat(pieces)


def _inverse_factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """U upper triangular with U^T U = (H + damping)^-1, rows and columns of H in the given order, and the damping used.

    Factoring H with rows and columns reversed gives H = M M^T, M upper triangular; U = M^-1. One Cholesky factorization
    and one triangular inverse in place: H^-1 itself is never formed, and few matrices of this size exist at a time.
    """
    backwards = order.flip(0)
    for retry in range(_DAMPING_RETRIES):
        used = damping * 10**retry
        damped = _damped(moment, backwards, used)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.eye(len(lower), out=damped)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(0, 1), used
    raise QuantError(
        f"gptq: the [{len(moment)}, {len(moment)}] second moment is not positive definite with damping {used:g} * "
        f"mean(diag) (diagonal from {float(moment.diagonal().min()):g}, mean {float(moment.diagonal().mean()):g}); check that it is "
        "sum x^T x, or raise damping"
    )


def _damped(moment: Tensor, order: Tensor, damping: float) -> Tensor:
    """Rows and columns in the given order, the diagonal raised by `damping` of its mean; a dead column counts as 1."""
    damped = moment[order][:, order]
    diagonal = damped.diagonal()
    diagonal += diagonal == 0
    diagonal += damping * diagonal.mean()
    return damped


def _check(
    w: Tensor, hessian: Tensor, cross: Tensor | None, output_gap: Tensor | None, parts: Sequence[Part],
    block_size: int, damping: float, sweeps: int,
) -> None:  # fmt: skip
    check_weight(w, "gptq")
    check_parts(parts, w.shape[1])
    n, k = w.shape
    if cross is not None and output_gap is not None:
        raise QuantError("gptq: give cross (GPTAQ) or output_gap (least squares), not both")
    for name, matrix, rows in (("hessian", hessian, k), ("cross", cross, k), ("output_gap", output_gap, n)):
        if matrix is None:
            continue
        if matrix.shape != (rows, k):
            raise QuantError(f"gptq: {name} must be [{rows}, {k}] for a weight [{n}, {k}], got {tuple(matrix.shape)}")
        if not bool(matrix.isfinite().all()):
            bad = int((~matrix.isfinite()).sum())
            raise QuantError(f"gptq: {name} holds {bad} NaN or infinite entries; check the calibration data")
    if bool((hessian.diagonal() < 0).any()):
        raise QuantError("gptq: hessian has a negative diagonal entry; expected sum x^T x of the layer's input")
    if cross is not None and sweeps:
        raise QuantError(
            "gptq: sweeps of coordinate descent aim at the layer's output; with cross (GPTAQ) sweeps must be 0"
        )
    if block_size < 1 or not damping > 0:
        raise QuantError(f"gptq: need block_size >= 1 and damping > 0, got {block_size} and {damping}")
