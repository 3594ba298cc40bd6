"""The fused operators `torch.ops.resq.*`: a lowered graph is an FX graph like any other, with shapes and types known without running it.

Attributes are plain numbers, strings and lists of them: bits = [4, 8] of activations, weight_bits = [4, 8], widths = [504, 72] (columns of
a group), parts of a cached head = [low, high, low_bits, high_bits]. `target` names the kernels that compute, and the bytes of their
operands. What an operator computes is said in `kernels`, what its operands are in `formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from resq_compiler.backends.fused.experts import Between, PackedExperts, Routing
from resq_compiler.backends.fused.formats import Codes, HeadParts, InputPart, PackedWeight, input_parts
from resq_compiler.backends.fused.kernels import LayerCache, Norm, Rotation, Scores
from resq_compiler.backends.fused.targets import find_target
from torch import Tensor

from resq_compiler.ir import ops

NAMESPACE = "resq"
_FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def _operator(fake: Callable, mutates: Iterable[str] = ()) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function an operator of any device, with `fake` for shapes and types."""

    def define(function: Callable) -> torch._ops.OpOverload:
        name = f"{NAMESPACE}::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, fake)
        return getattr(getattr(torch.ops, NAMESPACE), function.__name__).default

    return define


def _fake_codes(x: Tensor, lead: tuple[int, ...], parts: tuple[InputPart, ...], target: str) -> Codes:
    codes = find_target(target).codes
    row_bytes = {part.is_low: codes.row_bytes(part) for part in parts}
    low, high = (x.new_empty(*lead, row_bytes.get(is_low, 0), dtype=torch.int8) for is_low in (True, False))
    groups = sum(part.groups for part in parts)
    scale = x.new_empty(*lead, groups, dtype=torch.float32)
    return Codes(low, high, scale, x.new_empty(*lead, groups, dtype=torch.int32))


def _fake_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], clips: list[float], target: str,
) -> Codes:  # fmt: skip
    return _fake_codes(x, x.shape[:-1], input_parts(bits, weight_bits, widths, groups), target)


@_operator(_fake_norm_quantize)
def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], clips: list[float], target: str,
) -> _FourTensors:  # fmt: skip
    """x [..., K] -> (low, high, scale, zero_point)."""
    parts = input_parts(bits, weight_bits, widths, groups)
    return find_target(target).kernels.norm_quantize(x, parts, Norm(norm, weight, bias, eps), tuple(clips))


def _fake_mixed_linear(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor,
    weight_low: Tensor, weight_high: Tensor, weight_scale: Tensor, row_sum: Tensor, bias: Tensor | None, residual: Tensor | None,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], dtype: torch.dtype, target: str,
) -> Tensor:  # fmt: skip
    return scale.new_empty(*scale.shape[:-1], weight_scale.shape[1], dtype=dtype)


@_operator(_fake_mixed_linear)
def mixed_linear(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor,
    weight_low: Tensor, weight_high: Tensor, weight_scale: Tensor, row_sum: Tensor, bias: Tensor | None, residual: Tensor | None,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], dtype: torch.dtype, target: str,
) -> Tensor:  # fmt: skip
    """Packed activations times stacked packed weights -> [..., N] of dtype."""
    weight = PackedWeight(
        weight_low, weight_high, weight_scale, row_sum, input_parts(bits, weight_bits, widths, groups)
    )
    codes = Codes(low, high, scale, zero_point)
    return find_target(target).kernels.mixed_linear(codes, weight, bias, residual, dtype)


def _fake_hadamard_quantize(
    gate: Tensor, up: Tensor | None, activation: str, transpose: bool,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], clips: list[float], target: str,
) -> Codes:  # fmt: skip
    return _fake_codes(gate, gate.shape[:-1], input_parts(bits, weight_bits, widths, groups), target)


@_operator(_fake_hadamard_quantize)
def hadamard_quantize(
    gate: Tensor, up: Tensor | None, activation: str, transpose: bool,
    bits: list[int], weight_bits: list[int], widths: list[int], groups: list[int], clips: list[float], target: str,
) -> _FourTensors:  # fmt: skip
    """gate, up [..., n] -> (low, high, scale, zero_point) of the transformed product."""
    parts = input_parts(bits, weight_bits, widths, groups)
    return find_target(target).kernels.hadamard_quantize(gate, up, parts, activation, transpose, tuple(clips))


def _fake_hadamard(x: Tensor, transpose: bool, sizes: list[int]) -> Tensor:
    return torch.empty_like(x)


@_operator(_fake_hadamard)
def hadamard(x: Tensor, transpose: bool, sizes: list[int]) -> Tensor:
    """A transform that no kernel takes, as one operator, so that graphs with it are traced. sizes: empty for one transform."""
    return ops.hadamard(x, transpose, sizes or None)


def _fake_rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, u: Tensor | None, keys: Tensor, values: Tensor,
    table: Tensor | None, start: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    key_parts: list[int], value_parts: list[int], target: str,
) -> Tensor:  # fmt: skip
    d = HeadParts(*key_parts).head_dim
    return q.new_empty(*q.shape[:-1], q.shape[-1] // d, d)


@_operator(_fake_rope_cache, mutates=("keys", "values"))
def rope_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, u: Tensor | None, keys: Tensor, values: Tensor,
    table: Tensor | None, start: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, clip: float,
    key_parts: list[int], value_parts: list[int], target: str,
) -> Tensor:  # fmt: skip
    """q, k, v [B, S, heads * D] -> q [B, S, H, D] for `attention`; keys and values of the new tokens enter the cache."""
    cache = LayerCache(keys, values, table, start, HeadParts(*key_parts), HeadParts(*value_parts))
    rotation = Rotation(cos, sin, u, q_norm, k_norm, eps)
    return find_target(target).kernels.rope_cache(q, k, v, rotation, cache, clip)


def _fake_cache_image(
    x: Tensor, cache: Tensor, table: Tensor | None, start: Tensor, mask: Tensor, parts: list[int], clip: float, target: str
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:2], mask.shape[1], x.shape[3])


@_operator(_fake_cache_image, mutates=("cache",))
def cache_image(
    x: Tensor, cache: Tensor, table: Tensor | None, start: Tensor, mask: Tensor, parts: list[int], clip: float, target: str
) -> Tensor:  # fmt: skip
    """x [B, G, S, D] of the new tokens enters a cache; the float image of all tokens [B, G, T, D], mask [B, T]."""
    kernels = find_target(target).kernels
    return kernels.cache_image(x, cache, table, start, mask.shape[1], HeadParts(*parts), clip)


def _fake_latent_attention(
    q: Tensor, vectors: Tensor, rotary: Tensor, vector_cache: Tensor, rotary_cache: Tensor, table: Tensor | None, start: Tensor,
    mask: Tensor, weight_low: Tensor, weight_high: Tensor, weight_scale: Tensor, row_sum: Tensor, bits: list[int], weight_bits: list[int],
    widths: list[int], vector_parts: list[int], rotary_parts: list[int], own: int, scale: float, clip: float, target: str,
) -> Tensor:  # fmt: skip
    batch, heads, new, _ = q.shape
    return q.new_empty(batch, new, heads, weight_scale.shape[1] // heads - own)


@_operator(_fake_latent_attention, mutates=("vector_cache", "rotary_cache"))
def latent_attention(
    q: Tensor, vectors: Tensor, rotary: Tensor, vector_cache: Tensor, rotary_cache: Tensor, table: Tensor | None, start: Tensor,
    mask: Tensor, weight_low: Tensor, weight_high: Tensor, weight_scale: Tensor, row_sum: Tensor, bits: list[int], weight_bits: list[int],
    widths: list[int], vector_parts: list[int], rotary_parts: list[int], own: int, scale: float, clip: float, target: str,
) -> Tensor:  # fmt: skip
    """q [B, H, S, own + R] -> [B, S, H, value columns]; vectors and rotary columns of the new tokens enter the cache."""
    weight = PackedWeight(weight_low, weight_high, weight_scale, row_sum, input_parts(bits, weight_bits, widths, [1]))
    cache = LayerCache(rotary_cache, vector_cache, table, start, HeadParts(*rotary_parts), HeadParts(*vector_parts))
    return find_target(target).kernels.latent_attention(q, vectors, rotary, cache, mask, weight, own, scale, clip)


def _scores(
    mask: Tensor, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None, prefix_keys: Tensor | None,
    prefix_values: Tensor | None, slopes: Tensor | None,
) -> Scores:  # fmt: skip
    prefix = None if prefix_keys is None or prefix_values is None else (prefix_keys, prefix_values)
    return Scores(mask, scale, window, softcap, sinks, prefix, slopes)


def _fake_attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, prefix_keys: Tensor | None, prefix_values: Tensor | None, slopes: Tensor | None, target: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q)


@_operator(_fake_attention)
def attention(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, prefix_keys: Tensor | None, prefix_values: Tensor | None, slopes: Tensor | None, target: str,
) -> Tensor:  # fmt: skip
    """q [B, S, H, D] -> [B, S, H, D] of q's type; mask [B, T] bool, False = padding."""
    cache = LayerCache(keys, values, table, start, HeadParts(*key_parts), HeadParts(*value_parts))
    return find_target(target).kernels.attention(
        q, cache, _scores(mask, scale, window, softcap, sinks, prefix_keys, prefix_values, slopes)
    )


def _fake_attention_quantize(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, prefix_keys: Tensor | None, prefix_values: Tensor | None, slopes: Tensor | None,
    bits: list[int], weight_bits: list[int], widths: list[int], clip: float, target: str,
) -> Codes:  # fmt: skip
    return _fake_codes(q, q.shape[:2], input_parts(bits, weight_bits, widths, [q.shape[2]]), target)


@_operator(_fake_attention_quantize)
def attention_quantize(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, start: Tensor, mask: Tensor,
    key_parts: list[int], value_parts: list[int], scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, prefix_keys: Tensor | None, prefix_values: Tensor | None, slopes: Tensor | None,
    bits: list[int], weight_bits: list[int], widths: list[int], clip: float, target: str,
) -> _FourTensors:  # fmt: skip
    """The same, quantized per token and head for the output projection: (low, high, scale, zero_point) of [B, S]."""
    cache = LayerCache(keys, values, table, start, HeadParts(*key_parts), HeadParts(*value_parts))
    parts = input_parts(bits, weight_bits, widths, [q.shape[2]])
    kernels = find_target(target).kernels
    return kernels.attention_quantize(
        q, cache, _scores(mask, scale, window, softcap, sinks, prefix_keys, prefix_values, slopes), parts, clip
    )


def _fake_experts(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, indices: Tensor, weights: Tensor,
    gate_up: Tensor, gate_up_scale: Tensor, gate_up_sum: Tensor, gate_up_bits: Tensor, gate_up_bias: Tensor | None,
    down: Tensor, down_scale: Tensor, down_sum: Tensor, down_bits: Tensor, down_bias: Tensor | None,
    activation: str, gated: bool, limit: float, slope: float, transform: str,
    bits: list[int], weight_bits: list[int], widths: list[int],
    hidden_bits: list[int], hidden_weight_bits: list[int], hidden_widths: list[int], hidden_clips: list[float],
    dtype: torch.dtype, target: str,
) -> Tensor:  # fmt: skip
    return scale.new_empty(*scale.shape[:-1], down_scale.shape[2], dtype=dtype)


@_operator(_fake_experts)
def experts(
    low: Tensor, high: Tensor, scale: Tensor, zero_point: Tensor, indices: Tensor, weights: Tensor,
    gate_up: Tensor, gate_up_scale: Tensor, gate_up_sum: Tensor, gate_up_bits: Tensor, gate_up_bias: Tensor | None,
    down: Tensor, down_scale: Tensor, down_sum: Tensor, down_bits: Tensor, down_bias: Tensor | None,
    activation: str, gated: bool, limit: float, slope: float, transform: str,
    bits: list[int], weight_bits: list[int], widths: list[int],
    hidden_bits: list[int], hidden_weight_bits: list[int], hidden_widths: list[int], hidden_clips: list[float],
    dtype: torch.dtype, target: str,
) -> Tensor:  # fmt: skip
    """Packed rows of tokens [...] through their experts, indices and weights [..., k] -> [..., N] of dtype."""
    parts, hidden = (
        input_parts(bits, weight_bits, widths, [1]),
        input_parts(hidden_bits, hidden_weight_bits, hidden_widths, [1]),
    )
    inner = PackedExperts(gate_up, gate_up_scale, gate_up_sum, gate_up_bits, gate_up_bias, parts)
    outer = PackedExperts(down, down_scale, down_sum, down_bits, down_bias, hidden)
    between = Between(activation, gated, limit, slope, transform, hidden, tuple(hidden_clips))
    codes, routing = Codes(low, high, scale, zero_point), Routing(indices, weights)
    return find_target(target).kernels.experts(codes, routing, inner, outer, between, dtype)
