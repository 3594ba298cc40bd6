"""Quantizers that gradients pass: forward they compute what the integer law does, backward rounding is the identity.

Source: the straight-through estimator (Bengio, Léonard and Courville, arXiv 1308.3432); gradients of scales as in LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec, column_scales

Clip = Tensor | float
"""The share of a range that codes cover: a number, or one that is learned."""


def rounded(x: Tensor) -> Tensor:
    """rint(x), with the gradient of x."""
    return x + (x.round() - x).detach()


def image(x: Tensor, bits: int, groups: int = 1, clip: Clip = 1.0) -> Tensor:
    """The float image of the codes of x [..., K], per token and group of columns; see numerics/quantized.py for the law."""
    found: Tensor = _Image.apply(x.float().unflatten(-1, (groups, -1)), clip, bits)
    return found.flatten(-2).to(x.dtype)


class _Image(torch.autograd.Function):
    """Of groups x [..., G, K / G]. One function, because learning spends its time in passes over activations.

    Backward, with codes c, zero point z and scale s: where nothing is cut off, x has the identity and s the rounding error c - z - x / s;
    elsewhere s has c - z, and z has -s. The range moves with the smallest and the largest value, and with clip.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Clip, bits: int) -> Tensor:
        spec = QuantSpec(bits, symmetric=False)
        low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
        scale = ((high * clip - low * clip) / spec.levels).clamp(min=FLT_MIN)
        zero_point = (-(low * clip) / scale).round() + spec.qmin
        codes = (x / scale).round_().add_(zero_point).clamp_(spec.qmin, spec.qmax)
        y = codes.sub_(zero_point).mul_(scale)
        ctx.save_for_backward(x, y, low, high, scale, *([clip] if isinstance(clip, Tensor) else []))
        ctx.clip, ctx.levels = (None if isinstance(clip, Tensor) else clip), spec.levels
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        g, (x, y, low, high, scale, *learned) = gradients[0], ctx.saved_tensors
        clip = learned[0] if learned else ctx.clip
        of_x = g * ((x - y).abs_() <= scale * 0.5001)
        of_zero = (of_x - g).sum(-1, keepdim=True) * scale
        of_scale = ((g * y).sum(-1, keepdim=True) - (of_x * x).sum(-1, keepdim=True)) / scale
        of_scale = torch.where(scale > FLT_MIN, of_scale + of_zero * (low * clip) / scale.square(), 0.0)
        of_low, of_high = -of_scale / ctx.levels - of_zero / scale, of_scale / ctx.levels
        for end, of_end in ((low, of_low), (high, of_high)):
            there = x == end  # nowhere where the end is the zero that ranges hold
            of_x.addcmul_(there, of_end * clip / there.sum(-1, keepdim=True).clamp_(min=1))
        of_clip = (
            (of_low * low + of_high * high).sum().reshape_as(clip) if learned and ctx.needs_input_grad[1] else None
        )
        return of_x, of_clip, None


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


def codes(latent: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest codes of latent values, as numbers of a dtype that holds them exactly."""
    found: Tensor = _Codes.apply(latent, dtype)
    return found


class _Codes(torch.autograd.Function):
    """rint(latent), with the gradient of latent."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, dtype: torch.dtype) -> Tensor:
        return latent.round().to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].float(), None


def weight_image(w: Tensor, scale: Tensor, bits: int, group_size: int | None = None) -> Tensor:
    """The float image of the codes of a weight [N, K] at scales [N], or [N, groups]; differentiable by both."""
    spec, scales = QuantSpec(bits), column_scales(scale, w.shape[1], group_size)
    return rounded(w / scales).clamp(spec.qmin, spec.qmax) * scales


def linear_of_codes(x: Tensor, codes: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    """x Wᵀ for codes [N, K] at scales [N], or [N, groups]; differentiable by all three."""
    if group_size is not None:
        return F.linear(x, (codes * column_scales(scale, codes.shape[1], group_size)).to(x.dtype))
    return F.linear(x, codes.to(x.dtype)) * scale.to(x.dtype)
