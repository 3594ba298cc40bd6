"""Linears of a mixture of experts: every token goes through the experts that its router chose, each with a weight of its own.

    y[b, s, j] = W[i] x[b, s] + bias[i],    i = indices[b, s, j],    j = 0 .. k - 1

Rows are computed expert by expert, so that every weight that is used is read once, and no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakTensorKeyDictionary

from resq_compiler.numerics.quantized import QuantizedActivation, column_scales, integer_linear


@dataclass(frozen=True)
class Groups:
    """Which rows each expert computes. order: int64 [M], rows (a token and one of its k choices) by expert, in order inside each;
    stops: where the rows of each expert end in it."""

    order: Tensor
    stops: tuple[int, ...]

    def rows(self, expert: int) -> Tensor:
        """The rows of one expert, int64."""
        return self.order[self.stops[expert - 1] if expert else 0 : self.stops[expert]]

    @property
    def counts(self) -> list[int]:
        """Rows of each expert."""
        return [stop - start for start, stop in zip((0, *self.stops), self.stops, strict=False)]


_groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def groups(indices: Tensor, experts: int) -> Groups:
    """Rows by expert, of indices [..., k]; found once for all linears that ask with the same indices."""
    if indices not in _groups:
        flat = indices.flatten()
        counts = torch.bincount(flat, minlength=experts)
        _groups[indices] = Groups(flat.argsort(stable=True), tuple(counts.cumsum(0).tolist()))
    return _groups[indices]


def expert_linear(x: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Float weights. x [B, S, K], or [B, S, k, K] with a value for each choice; weight [E, N, K]; indices [..., k]; bias [E, N]."""
    if shapes_only(indices):
        return (
            x @ weight[0].mT if has_choices(x) else (x @ weight[0].mT)[:, :, None].expand(-1, -1, indices.shape[-1], -1)
        ).clone()
    flat = x.flatten(0, -2)

    def compute(expert: int, rows: Tensor) -> Tensor:
        return F.linear(flat[rows], weight[expert].to(x.device), None if bias is None else bias[expert])

    return _each(x, indices, weight.shape[0], weight.shape[1], x.dtype, compute)


def quantized_expert_linear(
    x: QuantizedActivation, qdata: Tensor, scale: Tensor, indices: Tensor, row_sum: Tensor | None = None, group_size: int | None = None
) -> Tensor:  # fmt: skip
    """Codes of weights qdata int8 [E, N, K], scale float32 [E, N] or [E, N, groups], row_sum int32 [E, N]: exact integer products of each
    expert's rows."""
    if shapes_only(indices):
        return expert_linear(x.qdata.float(), qdata.float(), indices)
    codes, scales, zeros = (t.flatten(0, -2) for t in (x.qdata, x.scale, x.zero_point))

    def compute(expert: int, rows: Tensor) -> Tensor:
        mine = QuantizedActivation(codes[rows], scales[rows], zeros[rows], x.bits)
        sums = None if row_sum is None else row_sum[expert]
        return integer_linear(mine, qdata[expert], scale[expert], sums, group_size)

    return _each(x.qdata, indices, qdata.shape[0], qdata.shape[1], torch.float32, compute)


def weight_only_expert_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, indices: Tensor, group_size: int | None = None
) -> Tensor:
    """Float activations times the float image of weight codes qdata int8 [E, N, K], scale [E, N] or [E, N, groups], by expert."""
    if shapes_only(indices):
        return expert_linear(x, qdata.to(x.dtype), indices)
    flat = x.flatten(0, -2)

    def compute(expert: int, rows: Tensor) -> Tensor:
        scales = column_scales(scale[expert], qdata.shape[-1], group_size)
        return F.linear(flat[rows], (qdata[expert] * scales).to(x.dtype))

    return _each(x, indices, qdata.shape[0], qdata.shape[1], x.dtype, compute)


def add_expert_bias(x: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """x [B, S, k, N] + bias[indices], bias [E, N]."""
    return x + bias[indices].reshape(x.shape)


def combine_experts(y: Tensor, weights: Tensor) -> Tensor:
    """Sum over the choices of a token: y [B, S, k, N] and weights [..., k] -> [B, S, N]."""
    return (y * weights.reshape(y.shape[:-1])[..., None]).sum(-2)


def has_choices(x: Tensor) -> bool:
    """[B, S, k, K] rather than [B, S, K]."""
    return x.dim() == 4


def shapes_only(x: Tensor) -> bool:
    """A tensor without values: rows cannot be sorted by them."""
    return x.is_meta or isinstance(x, FakeTensor)


def row_numbers(x: Tensor, rows: Tensor, choices: int) -> Tensor:
    """Where the rows of an expert are in x.flatten(0, -2)."""
    return rows if has_choices(x) else rows // choices


def _each(
    x: Tensor, indices: Tensor, experts: int, width: int, dtype: torch.dtype, compute: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """[B, S, k, width]: `compute` gives the rows of one expert from its number and where its inputs are."""
    choices = indices.shape[-1]
    batch, tokens = x.shape[:2]
    y = torch.empty(batch * tokens * choices, width, dtype=dtype, device=x.device)
    found = groups(indices, experts)
    for expert, count in enumerate(found.counts):
        if count:
            rows = found.rows(expert)
            y[rows] = compute(expert, row_numbers(x, rows, choices))
    return y.view(batch, tokens, choices, width)
