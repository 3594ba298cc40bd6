"""The operators of a compiled graph, as plain functions: what they compute is written here and nowhere else.

A graph node calls one of these (or an ``aten`` operator) by reference, so a dump reads as a program. `OPS` maps names to functions
for saved graphs. B batch, S new tokens, T all tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from resq_compiler.numerics import experts, quantized
from resq_compiler.numerics.hadamard import hadamard_plan, hadamard_transform
from resq_compiler.numerics.quantized import QuantizedActivation
from resq_compiler.numerics.transforms import Kronecker

OPS: dict[str, Callable] = {}


def op(function: Callable) -> Callable:
    OPS[function.__name__] = function
    return function


@op
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps), times weight; over the last dimension, in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half form: x [B, H, S, D], cos and sin [B, 1, S, R]; columns from R on pass through."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rope(x[..., :width], cos, sin), x[..., width:]), -1)
    half = width // 2
    y = x * cos  # and the rest in place: halves that are joined first take six times as long
    y[..., :half].sub_(x[..., half:] * sin[..., :half])
    y[..., half:].add_(x[..., :half] * sin[..., half:])
    return y


@op
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, S, H·D] -> [B, H, S, D]."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


@op
def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H·D]."""
    return x.transpose(1, 2).flatten(2)


@op
def append_cache(past: Tensor, new: Tensor) -> Tensor:
    """Keys or values of all tokens: past [B, G, P, D] then new [B, G, S, D]."""
    return torch.cat((past, new), -2)


@op
def prepend(prefix: Tensor, x: Tensor) -> Tensor:
    """Keys or values that every sequence sees first: prefix [1, G, P, D], x [B, G, T, D] -> [B, G, P + T, D]."""
    return torch.cat((prefix.expand(x.shape[0], -1, -1, -1), x), -2)


@op
def see_prefix(mask: Tensor, length: int) -> Tensor:
    """A mask with `length` more keys in front, which every query attends to: bool [B, 1, S, T] -> [B, 1, S, length + T]."""
    return F.pad(mask, (length, 0), value=True)


@op
def causal_mask(attention_mask: Tensor, input_ids: Tensor, window: int | None = None) -> Tensor:
    """Which keys a query may see: bool [B, 1, S, T], True = attend; at most `window` keys back when given.

    attention_mask [B, T] (0 = padding), input_ids [B, S]; the S queries are the last of the T positions.
    """
    total, new = attention_mask.shape[1], input_ids.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    queries = torch.arange(new, device=attention_mask.device)[:, None] + (total - new)
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys > queries - window)
    return visible[None, None] & attention_mask[:, None, None, :].bool()


def is_causal(mask: Tensor, new: int) -> bool:
    """Whether a mask is the triangle of `new` tokens, no padding, no past, no window: the kernel then skips half of the products.

    On a CPU the result is the same to the bit, in half of the time. A mask is looked at once for all layers; a traced one has no values.
    """
    if type(mask) is not Tensor or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if mask.dtype != torch.bool or new < 2 or mask.shape[1:] != (1, new, new):
        return False
    if mask not in _causal:
        triangle = torch.ones(new, new, dtype=torch.bool).tril()
        _causal[mask] = bool(torch.equal(mask, triangle.expand_as(mask)))
    return _causal[mask]


_causal: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@op
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ + mask) v with grouped key/value heads; with softcap c the scores become c·tanh(scores / c).

    q [B, H, S, D]; k, v [B, G, T, D]; mask bool (True = attend) or additive float, [B or 1, 1, S, T]; sinks [H]: one more score for each
    head, whose share of the softmax goes to no value.
    """
    grouped = q.shape[1] != k.shape[1]
    if softcap is None and sinks is None:
        causal = mask is not None and is_causal(mask, q.shape[2])
        mask = None if causal else mask
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2)
    scores = scores * scale if softcap is None else torch.tanh(scores * (scale / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return torch.softmax(scores, -1) @ v
    beside = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, beside), -1), -1)[..., :-1] @ v


@op
def project(x: Tensor, u: Tensor, inverse: bool = False) -> Tensor:
    """x U (inverse: x Uᵀ) over the last dimension: x [..., d], u [d, d] orthogonal (U_A, U_C)."""
    return x @ (u.mT if inverse else u)


@op
def project_heads(x: Tensor, u: Tensor, inverse: bool = False) -> Tensor:
    """x U (inverse: x Uᵀ), a basis for each key/value head: x [B, H, S, D], u [G, D, D]; head h uses u[h // (H / G)] (U_B)."""
    return x @ (u.mT if inverse else u).repeat_interleave(x.shape[1] // u.shape[0], 0)


@op
def project_blocks(x: Tensor, u: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """x blockdiag(U) with its columns in `order` (inverse: the transposed map): x [..., G·D], u [G, D, D] orthogonal, order [G·D] (U_D)."""
    if inverse:
        return torch.einsum(
            "...gd,ged->...ge", x.index_select(-1, order.argsort()).unflatten(-1, u.shape[:2]), u
        ).flatten(-2)
    return torch.einsum("...gd,gde->...ge", x.unflatten(-1, u.shape[:2]), u).flatten(-2).index_select(-1, order)


@op
def hadamard(x: Tensor, transpose: bool = False, sizes: Sequence[int] | None = None) -> Tensor:
    """x H / sqrt(n) (transpose: x Hᵀ / sqrt(n)) over the last dimension as a fast transform (U_D); `sizes`: one H for each stretch."""
    if sizes is None:
        return hadamard_transform(x, hadamard_plan(int(x.shape[-1])), transpose=transpose)
    return torch.cat([hadamard(piece, transpose) for piece in x.split(list(sizes), -1)], -1)


@op
def project_kronecker(x: Tensor, a: Tensor, b: Tensor, inverse: bool = False) -> Tensor:
    """x (A ⊗ B) (inverse: x times its inverse) over the last dimension: A [a, a], B [b, b] invertible, x [..., a·b]."""
    transform = Kronecker(a, b)
    return transform.inverse(x) if inverse else transform.forward(x)


@op
def scale_channels(x: Tensor, s: Tensor, inverse: bool = False) -> Tensor:
    """x · s (inverse: x / s) over the last dimension: s [d]."""
    return x / s if inverse else x * s


@op
def permute_channels(x: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
    """x[..., order] (inverse: back to where they were) over the last dimension: order [d]."""
    return x.index_select(-1, order.argsort() if inverse else order)


@op
def columns(x: Tensor, start: int, stop: int) -> Tensor:
    """x[..., start:stop]: the part of the columns that shares a precision."""
    return x[..., start:stop]


@op
def quantize(
    x: Tensor,
    bits: int,
    groups: int = 1,
    clip: float = 1.0,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> QuantizedActivation:
    """Asymmetric codes of x [..., K], per token and group of K / groups columns; with scale and zero_point [groups], static ones."""
    if scale is not None and zero_point is not None:
        return quantized.quantize_static(x, bits, scale, zero_point)
    return quantized.quantize_activation(x, bits, groups, clip)


@op
def dequantize(x: QuantizedActivation) -> Tensor:
    """The float image (codes - zero point) · scale of quantized activations."""
    return quantized.dequantize(x)


@op
def quantized_linear(
    x: QuantizedActivation, qdata: Tensor, scale: Tensor, row_sum: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """Integer product of x [..., K] with weight codes qdata [N, K] int8, scaled: float32 [..., N]. row_sum: saved sums of qdata rows.

    scale: [N], or [N, groups] with a scale for every group_size columns.
    """
    return quantized.integer_linear(x, qdata, scale, row_sum, group_size)


@op
def weight_only_linear(x: Tensor, qdata: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
    """Float activations [..., K] times the float image of weight codes qdata [N, K] int8, scale [N], or [N, groups]."""
    return quantized.weight_only_linear(x, qdata, scale, group_size)


@op
def expert_linear(x: Tensor, weight: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear for each expert: x [B, S, K], or [B, S, k, K] (a value for each choice) -> [B, S, k, N], by weight[i] [N, K] and bias[i] of
    weight [E, N, K] and bias [E, N], where i are the k experts of a token: indices [B, S, k] or [B·S, k]."""
    return experts.expert_linear(x, weight, indices, bias)


@op
def quantized_expert_linear(
    x: QuantizedActivation, qdata: Tensor, scale: Tensor, indices: Tensor, row_sum: Tensor | None = None, group_size: int | None = None
) -> Tensor:  # fmt: skip
    """`quantized_linear` for each expert: qdata [E, N, K] int8, scale [E, N] or [E, N, groups], row_sum [E, N]; float32 [B, S, k, N]."""
    return experts.quantized_expert_linear(x, qdata, scale, indices, row_sum, group_size)


@op
def weight_only_expert_linear(
    x: Tensor, qdata: Tensor, scale: Tensor, indices: Tensor, group_size: int | None = None
) -> Tensor:
    """`weight_only_linear` for each expert: qdata [E, N, K] int8, scale [E, N] or [E, N, groups]; [B, S, k, N]."""
    return experts.weight_only_expert_linear(x, qdata, scale, indices, group_size)


@op
def add_expert_bias(x: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """x [B, S, k, N] plus the bias [E, N] of each choice's expert."""
    return experts.add_expert_bias(x, bias, indices)


@op
def combine_experts(y: Tensor, weights: Tensor) -> Tensor:
    """The sum of a token's choices, weighted by its router: y [B, S, k, N], weights [B, S, k] or [B·S, k] -> [B, S, N]."""
    return experts.combine_experts(y, weights)


@op
def quantize_dequantize(x: Tensor, parts: Sequence[tuple[int, int, int]], clip: float = 1.0) -> Tensor:
    """Float image of cache codes: every part (bits, start, stop) of the last dimension quantized per token and head."""
    return quantized.quantize_dequantize(x, [quantized.Part(*p) for p in parts], clip)
