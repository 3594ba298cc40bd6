"""Quantizers that gradients pass: forward they compute what the integer law does, backward rounding is the identity.

Source: the straight-through estimator (Bengio, Léonard and Courville, arXiv 1308.3432); gradients of scales as in LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec, column_scales

Clip = Tensor | float
"""The share of a range that codes cover: a number, or one that is learned."""


def rounded(x: Tensor) -> Tensor:
    """rint(x), with the gradient of x."""
    return x + (x.round() - x).detach()


def image(x: Tensor, bits: int, groups: int = 1, clip: Clip = 1.0) -> Tensor:
    """The float image of the codes of x [..., K], per token and group of columns; see numerics/quantized.py for the law."""
    spec = QuantSpec(bits, symmetric=False)
    grouped = x.float().unflatten(-1, (groups, -1))
    low = grouped.amin(-1, keepdim=True).clamp(max=0) * clip
    high = grouped.amax(-1, keepdim=True).clamp(min=0) * clip
    scale = ((high - low) / spec.levels).clamp(min=FLT_MIN)
    zero_point = rounded(-low / scale) + spec.qmin
    codes = (rounded(grouped / scale) + zero_point).clamp(spec.qmin, spec.qmax)
    return ((codes - zero_point) * scale).flatten(-2).to(x.dtype)


def static_image(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The same with one scale and zero point [groups] for all tokens."""
    spec = QuantSpec(bits, symmetric=False)
    grouped = x.float().unflatten(-1, (len(scale), -1))
    codes = (rounded(grouped / scale[:, None]) + zero_point[:, None]).clamp(spec.qmin, spec.qmax)
    return ((codes - zero_point[:, None]) * scale[:, None]).flatten(-2).to(x.dtype)


def cache_image(x: Tensor, parts: Sequence[tuple[int, int, int]], clip: Clip = 1.0) -> Tensor:
    """The float image of cache codes: every part (bits, start, stop) of the last dimension on its own."""
    pieces = [image(x[..., start:stop], bits, 1, clip) for bits, start, stop in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def weight_image(w: Tensor, scale: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The float image of the codes of a weight [N, K] at scales [N], or [N, groups]; differentiable by both."""
    spec, scales = QuantSpec(bits), column_scales(scale, w.shape[1], group_size)
    return rounded(w / scales).clamp(spec.qmin, spec.qmax) * scales
