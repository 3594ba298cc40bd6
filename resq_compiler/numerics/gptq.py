"""GPTQ on one weight (or several stacked ones that share an input): tensor mathematics only.

With H = sum x^T x + damping = M M^T, M upper triangular, a row whose columns are off by e_i has the output error

    sum_j (sum_i e_i M_ij)^2, i up to j

Columns are rounded in order, each where its own term is least, given those before it:

    t_j = w_j + sum_(i < j) e_i M_ij / M_jj        q_j = round(t_j)        e_j = w_j - q_j

and the row's output error, diag(dW H dW^T), is sum_j ((t_j - q_j) M_jj)^2. These are the integers of GPTQ, whose factor of the inverse of
H is the inverse of M, and nothing is inverted. Source: Babai's nearest plane; that GPTQ is the same: arXiv 2507.18553.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics import upper_factor
from resq_compiler.numerics.quantized import Part, QuantSpec, check_parts
from resq_compiler.numerics.scale_search import Clip, check_weight
from resq_compiler.numerics.weights import QuantizedWeight, part_scale

_DAMPING_RETRIES = 3


@dataclass(frozen=True)
class GptqResult:
    """parts: codes and scales, in the order asked.    row_loss: float64 [N], the output error of the damped H.
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
    weighted_clip: bool = False,
    group_size: int | None = None,
    overwrite: bool = False,
) -> GptqResult:
    """Quantize a weight, compensating each column's rounding in the columns after it.

    Columns go in part order (low first, 8-bit last, so the accurate columns absorb the error). Scales are searched on
    the weight before the loop and stay fixed. Rows are independent: stack linears that
    share an input, then `weights.split_rows`.

    Args:    w: [N, K] floating point.    hessian: [K, K] sum x^T x at any scale.    parts: cover K, ascending bits.
             block_size: columns handled one by one before errors move on as a matrix product; the result depends on it
             by rounding only.    damping: fraction of mean(diag H).    act_order: within each part, columns by
             descending diag H.    clip: see search_scale; weighted_clip weighs its errors by diag H.
             group_size: columns of a part that share a scale; None: all. With act_order a column keeps the scale of its own group.
             overwrite: the memory of a float32 hessian is used for its factor: no other matrix of this size is made.
    Returns: GptqResult; parts[i].qdata int8 [N, K_i] in the original column order, scale float32 [N], or [N, groups].
    Raises:  QuantError: shapes, options or values not usable; H not positive definite even with 100x the damping.
    Source:  GPTQ (arXiv 2210.17323) algorithm 1. Differs: no inverse; errors move on by recursive halving; dead columns are rounded, not
             zeroed.
    """
    _check(w, hessian, parts, block_size, damping)
    w = w.detach().float()
    moment = hessian.to(torch.float32)
    _check_moment(moment)
    diagonal = moment.diagonal().clone()
    order = _column_order(diagonal, parts, act_order)
    upper, used = _factor(moment if overwrite or moment is not hessian else moment.clone(), order, damping)
    weighting = diagonal if weighted_clip else None
    scales = [_part_scale(w, p, clip, weighting, group_size) for p in parts]
    each = [column for p, s in zip(parts, scales, strict=True) for column in _columns(p, s, group_size)]
    loop = _Loop(w.t().contiguous().index_select(0, order), upper, [each[j] for j in order.tolist()], block_size)
    loop.run(0, w.shape[1])
    codes = torch.empty_like(loop.codes)
    codes[order] = loop.codes
    quantized = [
        QuantizedWeight(codes[p.start : p.stop].t().contiguous(), scale, p.bits, group_size)
        for p, scale in zip(parts, scales, strict=True)
    ]
    return GptqResult(quantized, _sum_of_squares(loop.weights), used, int((diagonal == 0).sum()))


class _Loop:
    """State of one run, columns as contiguous rows: weights, errors and codes are [K, N]. columns: scale [N] and code of each.

    upper: M, of which only the upper triangle is looked at, every block of it once. Of a column that is still to come, `errors` holds what
    those before it move it by; of one that is done, `weights` holds its term of the output error, before it is squared.
    """

    def __init__(
        self,
        weights: Tensor,
        upper: Tensor,
        columns: Sequence[tuple[Tensor, QuantSpec]],
        block_size: int,
    ) -> None:
        self.weights = weights
        self.errors = torch.zeros_like(weights)
        self.codes = torch.empty_like(weights, dtype=torch.int8)
        self.block_size = block_size
        self.columns = columns
        self.upper = upper
        self.diagonal = upper.diagonal().tolist()

    def run(self, start: int, stop: int) -> None:
        """Quantize columns [start, stop); what earlier columns move them by is already in their errors."""
        if stop - start <= self.block_size:
            spread = self._spread(slice(start, stop), slice(start, stop))
            for j in range(start, stop):
                self._column(start, j, spread[j - start])
            return
        middle = (start + stop) // 2
        self.run(start, middle)
        rest, done = slice(middle, stop), slice(start, middle)
        self.errors[rest].addmm_(self._spread(rest, done), self.errors[done])
        self.run(middle, stop)

    def _spread(self, to: slice, done: slice) -> Tensor:
        """M_ij / M_jj: what columns j receive of the errors of earlier ones i, a contiguous row for each that receives."""
        block = self.upper[done, to].t()
        return torch.div(block, self.upper.diagonal()[to, None], out=block.new_empty(block.shape))

    def _column(self, start: int, j: int, spread: Tensor) -> None:
        weight, error = self.weights[j], self.errors[j]
        if j > start:
            error.addmv_(self.errors[start:j].t(), spread[: j - start])
        target = error.add_(weight)
        scale, spec = self.columns[j]
        code = (target / scale).round_().clamp_(spec.qmin, spec.qmax)
        self.codes[j] = code
        image = code.mul_(scale)
        left = torch.sub(target, image)
        torch.sub(weight, image, out=error)
        torch.mul(left, self.diagonal[j], out=weight)


def _sum_of_squares(errors: Tensor, step: int = 256) -> Tensor:
    """Over rows of errors [K, N], float64 [N]: some rows at a time, since all of them in float64 are twice the weight."""
    total = errors.new_zeros(errors.shape[1], dtype=torch.float64)
    for rows in errors.split(step):
        total += rows.double().square_().sum(0)
    return total


def _part_scale(w: Tensor, part: Part, clip: Clip, weighting: Tensor | None, group_size: int | None) -> Tensor:
    columns = slice(part.start, part.stop)
    column_weight = None if weighting is None else weighting[columns]
    return part_scale(w[:, columns], part.bits, group_size, clip=clip, column_weight=column_weight)


def _columns(part: Part, scale: Tensor, group_size: int | None) -> list[tuple[Tensor, QuantSpec]]:
    """Scale [N] and code of every column of a part; columns of a group share the tensor."""
    spec = QuantSpec(part.bits)
    if group_size is None:
        return [(scale, spec)] * part.width
    each = [(s.contiguous(), spec) for s in scale.unbind(1)]
    return [each[j // group_size] for j in range(part.width)]


def _column_order(diagonal: Tensor, parts: Sequence[Part], act_order: bool) -> Tensor:
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    pieces = [diagonal[p.start : p.stop].argsort(descending=True, stable=True) + p.start for p in parts]
    return torch.cat(pieces)


def _factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """M with M M^T = H + damping, rows and columns of H in the given order, and the damping used.

    It is the upper triangle of the matrix that is returned, the one that was given; the lower one holds other values.
    """
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        upper_factor.reorder(moment, order)
    found = moment.diagonal().clone()
    found += found == 0  # a dead column counts as 1
    for retry in range(_DAMPING_RETRIES):
        used = damping * 10**retry
        moment.diagonal().copy_(found + used * found.mean())
        if upper_factor.factorize(moment):
            return moment, used
        upper_factor.restore(moment)
    raise QuantError(
        f"gptq: the [{len(moment)}, {len(moment)}] second moment is not positive definite with damping {used:g} * "
        f"mean(diag) (diagonal from {float(found.min()):g}, mean {float(found.mean()):g}); check that it is "
        "sum x^T x, or raise damping"
    )


def _check(w: Tensor, hessian: Tensor, parts: Sequence[Part], block_size: int, damping: float) -> None:
    check_weight(w, "gptq")
    check_parts(parts, w.shape[1])
    n, k = w.shape
    if hessian.shape != (k, k):
        raise QuantError(f"gptq: hessian must be [{k}, {k}] for a weight [{n}, {k}], got {tuple(hessian.shape)}")
    if block_size < 1 or not damping > 0:
        raise QuantError(f"gptq: need block_size >= 1 and damping > 0, got {block_size} and {damping}")


def _check_moment(moment: Tensor) -> None:
    low, high = torch.aminmax(moment)  # NaN or infinite exactly when some entry is
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~moment.isfinite()).sum())
        raise QuantError(f"gptq: hessian holds {bad} NaN or infinite entries in float32; check the calibration data")
    if bool((moment.diagonal() < 0).any()):
        raise QuantError("gptq: hessian has a negative diagonal entry; expected sum x^T x of the layer's input")
