"""Codes and scales made better after GPTQ, on the same objective: coordinate descent.

GPTQ rounds every column once and can't come back to it. With dW = w - s q, the output error of a row is dW H dW^T, and for one
code, all others being fixed, the best value is known:

    q_j = round(q_j + (dW H)_j / (s H_jj))

A sweep visits every column once; no step can raise the error. Between sweeps the scales of a row are fitted to its codes: the error
is quadratic in them, one small linear system for each row. Columns are rows here, [K, N], as in gptq.py.

Source: coordinate descent on quantized weights as in QuantEase (arXiv 2309.01885); the fit of the scales is ordinary least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resq_compiler.numerics.quantized import Part, QuantSpec


def descend(
    w: Tensor, hessian: Tensor, codes: Tensor, scales: Sequence[Tensor], parts: Sequence[Part], sweeps: int, block_size: int = 32
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """Lower the output error of quantized rows by `sweeps` rounds: fit the scales, then visit every code.

    Args:    w: float32 [K, N], columns of a weight [N, K] as rows.    hessian: float32 [K, K], positive definite.    codes: int8
             [K, N].    scales: float32 [N] for each part.    parts: cover K.    block_size: columns visited one by one
             before their changes move on as a matrix product; the result depends on it by rounding only.
    Returns: codes int8 [K, N], scales, and the error of every row, float64 [N].
    """
    q, scales = codes.float(), list(scales)
    target = hessian @ w
    for _ in range(sweeps):
        images = [hessian[:, p.start : p.stop] @ q[p.start : p.stop] for p in parts]  # H q, part by part
        scales = _fit(q, target, images, scales, parts)
        gradient = target.clone()  # H dW
        for image, scale in zip(images, scales, strict=True):
            gradient.addcmul_(image, scale, value=-1)
        del images
        _sweep(q, gradient, hessian, scales, parts, block_size)
    for part, scale in zip(parts, scales, strict=True):
        w = w.index_add(0, torch.arange(part.start, part.stop), q[part.start : part.stop] * scale, alpha=-1)
    return q.to(torch.int8), scales, (w.double() * (hessian @ w)).sum(0)


def _fit(q: Tensor, target: Tensor, images: list[Tensor], scales: list[Tensor], parts: Sequence[Part]) -> list[Tensor]:
    """Scales of each row that minimize its error for these codes; the former ones where that is no positive number."""
    left = torch.stack([torch.stack([_dot(q, image, p) for image in images], -1) for p in parts], -2)  # [N, P, P]
    right = torch.stack([_dot(q, target, p) for p in parts], -1)
    found, _ = torch.linalg.solve_ex(left, right)
    found = found.float()
    usable = (found.isfinite() & (found > torch.finfo(torch.float32).tiny)).all(-1)
    return [torch.where(usable, found[:, i], scale) for i, scale in enumerate(scales)]


def _dot(q: Tensor, image: Tensor, part: Part) -> Tensor:
    """Sum over the columns of a part, for each row: float64 [N]."""
    columns = slice(part.start, part.stop)
    return torch.einsum("kn,kn->n", q[columns], image[columns]).double()


def _sweep(
    q: Tensor, gradient: Tensor, hessian: Tensor, scales: list[Tensor], parts: Sequence[Part], block_size: int
) -> None:
    """Visit every column once, in place; `gradient` follows the codes."""
    step = hessian.diagonal().reciprocal()
    for part, scale in zip(parts, scales, strict=True):
        spec = QuantSpec(part.bits)
        for start in range(part.start, part.stop, block_size):
            block = slice(start, min(start + block_size, part.stop))
            before, inside, near = q[block].clone(), gradient[block].clone(), hessian[block, block].contiguous()
            for j in range(block.stop - start):
                column = q[start + j]
                code = torch.addcdiv(column, inside[j] * step[start + j], scale).round_().clamp_(spec.qmin, spec.qmax)
                inside[j + 1 :].addr_(near[j, j + 1 :], (code - column).mul_(scale), alpha=-1)
                column.copy_(code)
            moved = (q[block] - before).mul_(scale)
            gradient.addmm_(hessian[:, block], moved, alpha=-1)
