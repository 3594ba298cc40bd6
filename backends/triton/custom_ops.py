"""The kernels as torch operators `torch.ops.resq_triton.*`, so that a lowered graph is still an FX graph.

Activations keep their leading dimensions: x [B, S, K] becomes codes [B, S, bytes], scale [B, S, groups]. A part that a linear does
not have is an empty tensor. Part lists are flat integers: bits = [4, 8], widths = [504, 72] (columns of one group), cache parts
= [low, high, low_bits, high_bits]. Every operator has a fake implementation: shapes and types without running anything.
"""

from __future__ import annotations

import torch
from resq_compiler.backends.triton import attention as attention_kernel
from resq_compiler.backends.triton import hadamard_quantize as hadamard_kernel
from resq_compiler.backends.triton import mixed_linear as linear_kernel
from resq_compiler.backends.triton import norm_quantize as norm_kernel
from resq_compiler.backends.triton import rope_cache as rope_kernel
from resq_compiler.backends.triton.formats import HeadLayout, PackedWeight, PartLayout
from torch import Tensor

from resq_compiler.ir import ops

Codes = tuple[Tensor, Tensor, Tensor, Tensor]


def layouts_of(bits: list[int], widths: list[int], groups: int) -> tuple[PartLayout, ...]:
    """The layouts of flat part lists."""
    return tuple(PartLayout(b, w, groups) for b, w in zip(bits, widths, strict=True))


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 2 else x


def _codes(x: Tensor, results: tuple[Tensor | None, Tensor | None, Tensor, Tensor], lead: tuple[int, ...]) -> Codes:
    low, high, scale, zero_point = (x.new_empty(x.shape[0], 0, dtype=torch.int8) if t is None else t for t in results)
    return low.view(*lead, -1), high.view(*lead, -1), scale.view(*lead, -1), zero_point.view(*lead, -1)


def _fake_codes(x: Tensor, lead: tuple[int, ...], layouts: tuple[PartLayout, ...]) -> Codes:
    row_bytes = {layout.packed: layout.row_bytes for layout in layouts}
    groups = sum(layout.groups for layout in layouts)
    codes = [x.new_empty(*lead, row_bytes.get(packed, 0), dtype=torch.int8) for packed in (True, False)]
    scale = x.new_empty(*lead, groups, dtype=torch.float32)
    return codes[0], codes[1], scale, x.new_empty(*lead, groups, dtype=torch.int32)


@torch.library.custom_op("resq_triton::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float, clip: float,
    clip_high: float, bits: list[int], widths: list[int], groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x [..., K] -> (low, high, scale, zero_point); see norm_quantize.py."""
    layouts = layouts_of(bits, widths, groups)
    results = norm_kernel.norm_quantize(_rows(x), layouts, norm, weight, bias, eps, clip, clip_high)
    return _codes(_rows(x), results, x.shape[:-1])


@norm_quantize.register_fake
def _(x, weight, bias, norm, eps, clip, clip_high, bits, widths, groups):
    return _fake_codes(x, x.shape[:-1], layouts_of(bits, widths, groups))


@torch.library.custom_op("resq_triton::mixed_linear", mutates_args=())
def mixed_linear(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor,
    weight_low: Tensor, weight_high: Tensor, weight_scale: Tensor, row_sum: Tensor, bias: Tensor | None, residual: Tensor | None,
    bits: list[int], widths: list[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Packed activations times stacked packed weights -> [..., N] of dtype; see mixed_linear.py."""
    layouts = layouts_of(bits, widths, groups)
    packed = [layout.packed for layout in layouts]
    low_x, high_x = (_rows(low) if True in packed else None), (_rows(high) if False in packed else None)
    low_w, high_w = (weight_low if True in packed else None), (weight_high if False in packed else None)
    weight = PackedWeight(low_w, high_w, weight_scale, row_sum, layouts)
    extra = None if residual is None else _rows(residual)
    y = linear_kernel.mixed_linear(low_x, high_x, _rows(scale), _rows(zero_point), weight, bias, extra, dtype)
    return y.view(*scale.shape[:-1], y.shape[-1])


@mixed_linear.register_fake
def _(
    low,
    high,
    scale,
    zero_point,
    weight_low,
    weight_high,
    weight_scale,
    row_sum,
    bias,
    residual,
    bits,
    widths,
    groups,
    dtype,
):
    return scale.new_empty(*scale.shape[:-1], weight_scale.shape[1], dtype=dtype)


@torch.library.custom_op("resq_triton::hadamard_quantize", mutates_args=())
def hadamard_quantize(
    gate: Tensor,
    up: Tensor | None,
    bits: list[int],
    widths: list[int],
    activation: str,
    transpose: bool,
    clips: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, up [..., n] -> (low, high, scale, zero_point) of the transformed product; see hadamard_quantize.py.

    Every part of the columns has a transform of its own, and a launch."""
    gate_rows, up_rows = _rows(gate), None if up is None else _rows(up)
    codes: dict[bool, Tensor] = {}
    scales, zero_points, start = [], [], 0
    for layout, clip in zip(layouts_of(bits, widths, 1), clips, strict=True):
        columns = slice(start, start + layout.columns)
        other = None if up_rows is None else up_rows[:, columns]
        codes[layout.packed], scale, zero_point = hadamard_kernel.hadamard_quantize(
            gate_rows[:, columns], other, layout, activation, transpose, clip
        )
        scales.append(scale)
        zero_points.append(zero_point)
        start += layout.columns
    results = (codes.get(True), codes.get(False), torch.cat(scales, 1), torch.cat(zero_points, 1))
    return _codes(next(iter(codes.values())), results, gate.shape[:-1])


@hadamard_quantize.register_fake
def _(gate, up, bits, widths, activation, transpose, clips):
    return _fake_codes(gate, gate.shape[:-1], layouts_of(bits, widths, 1))


@torch.library.custom_op("resq_triton::hadamard", mutates_args=())
def hadamard(x: Tensor, transpose: bool, sizes: list[int]) -> Tensor:
    """A transform that no kernel takes, in torch: one opaque operator, so that graphs with it compile."""
    return ops.hadamard(x, transpose, sizes or None)


@hadamard.register_fake
def _(x, transpose, sizes):
    return torch.empty_like(x)


@torch.library.custom_op("resq_triton::rope_cache", mutates_args=("key_pages", "value_pages"))
def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, u: Tensor | None, key_pages: Tensor, value_pages: Tensor,
    table: Tensor, start: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    key_parts: list[int], value_parts: list[int],
) -> Tensor:  # fmt: skip
    """q, k, v [B, S, heads * D] -> q [B, S, H, D] for `attention`, keys and values appended; see rope_cache.py."""
    layout, value_layout = HeadLayout(*key_parts), HeadLayout(*value_parts)
    q, k, v = (x.unflatten(-1, (-1, layout.head_dim)) for x in (q, k, v))
    return rope_kernel.rope_cache(
        q, k, v, cos, sin, u, key_pages, value_pages, table, start, layout, value_layout, q_norm, k_norm, eps, clip
    )


@rope_cache.register_fake
def _(q, k, v, cos, sin, u, key_pages, value_pages, table, start, q_norm, k_norm, eps, clip, key_parts, value_parts):
    d = key_parts[0] + key_parts[1]
    return q.new_empty(*q.shape[:-1], q.shape[-1] // d, d)


@torch.library.custom_op("resq_triton::attention", mutates_args=())
def attention(
    q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """q [B, S, H, D] -> [B, S, H, D] of q's dtype; mask [B, T], 0 = padding; see attention.py."""
    return attention_kernel.attention(
        q, key_pages, value_pages, table, start, mask, HeadLayout(*key_parts), HeadLayout(*value_parts), scale,
        mask.shape[1], window, softcap,
    )  # fmt: skip


@attention.register_fake
def _(q, key_pages, value_pages, table, start, mask, key_parts, value_parts, scale, window, softcap):
    return torch.empty_like(q)


@torch.library.custom_op("resq_triton::attention_quantize", mutates_args=())
def attention_quantize(
    q: Tensor, key_pages: Tensor, value_pages: Tensor, table: Tensor, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
    bits: list[int], widths: list[int], clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same, quantized per token and head for o_proj: (low, high, scale, zero_point), leading dimensions [B, S]."""
    results = attention_kernel.attention(
        q, key_pages, value_pages, table, start, mask, HeadLayout(*key_parts), HeadLayout(*value_parts), scale,
        mask.shape[1], window, softcap, layouts_of(bits, widths, q.shape[2]), clip,
    )  # fmt: skip
    return _codes(results[2], results, q.shape[:2])


@attention_quantize.register_fake
def _(
    q, key_pages, value_pages, table, start, mask, key_parts, value_parts, scale, window, softcap, bits, widths, clip
):
    return _fake_codes(q, q.shape[:2], layouts_of(bits, widths, q.shape[2]))
