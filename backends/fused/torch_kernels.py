"""The fused operators in PyTorch: what every kernel must compute. On any format: operands are unpacked, results packed.

Built from the functions that the quantized graph calls, in the same order, so that both give the same bits in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from resq_compiler.backends.fused.experts import Between, PackedExperts, Routing
from resq_compiler.backends.fused.formats import (
    CacheFormat,
    CodeFormat,
    Codes,
    HeadParts,
    InputPart,
    PackedWeight,
    centred,
)
from resq_compiler.backends.fused.kernels import Kernels, LayerCache, Norm, Rotation, Scores
from torch import Tensor

from resq_compiler.ir import ops
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear, quantize_activation

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class TorchKernels(Kernels):
    """The torch form of every operator."""

    def __init__(self, codes: CodeFormat, cache: CacheFormat):
        self.codes, self.cache = codes, cache

    def norm_quantize(self, x: Tensor, parts: tuple[InputPart, ...], norm: Norm, clips: tuple[float, ...]) -> Codes:
        return self._quantized(_split(_normalized(x.float(), norm), parts), parts, clips)

    def mixed_linear(
        self, x: Codes, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        y: Tensor | None = None
        first = 0
        for i, part in enumerate(weight.parts):
            groups = slice(first, first + part.groups)
            first += part.groups
            rows = self.codes.unpack_rows(x.of(part), part)
            quantized = QuantizedActivation(rows, x.scale[..., groups], x.zero_point[..., groups], part.bits)
            qdata = self.codes.unpack_weight(weight.of(part), part, 0, weight.out_features)
            product = integer_linear(quantized, qdata, weight.scale[i])
            y = product if y is None else y + product
        assert y is not None
        y = y if bias is None else y + bias.float()
        return (y if residual is None else y + residual.float()).to(dtype)

    def hadamard_quantize(
        self, gate: Tensor, up: Tensor | None, parts: tuple[InputPart, ...], activation: str, transpose: bool,
        clips: tuple[float, ...],
    ) -> Codes:  # fmt: skip
        h = _ACTIVATIONS[activation](gate.float().contiguous())
        h = h if up is None else h * up.float()
        return self._quantized([ops.hadamard(piece, transpose) for piece in _split(h, parts)], parts, clips)

    def rope_cache(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: LayerCache, clip: float) -> Tensor:
        d = cache.key_parts.head_dim
        queries, keys, values = (ops.split_heads(x.float().contiguous(), x.shape[-1] // d) for x in (q, k, v))
        queries = _turned(queries, rotation.q_norm, rotation)
        keys = _turned(keys, rotation.k_norm, rotation)
        written = ((cache.keys, keys, cache.key_parts), (cache.values, values, cache.value_parts))
        for tensor, x, parts in written:
            self.cache.write(tensor, cache.table, cache.start, x.transpose(1, 2), parts, clip)
        return queries.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format, copy=True)

    def cache_image(
        self, x: Tensor, cache: Tensor, table: Tensor | None, start: Tensor, total: int, parts: HeadParts, clip: float
    ) -> Tensor:
        self.cache.write(cache, table, start, x.float().transpose(1, 2), parts, clip)
        return self.cache.read(cache, table, parts, total)

    def latent_attention(
        self, q: Tensor, vectors: Tensor, rotary: Tensor, cache: LayerCache, mask: Tensor, weight: PackedWeight, own: int, scale: float,
        clip: float,
    ) -> Tensor:  # fmt: skip
        _, heads, new, _ = q.shape
        at = (cache.start, mask.shape[1])
        shared = self.cache_image(rotary, cache.keys, cache.table, *at, cache.key_parts, clip)
        c = ops.merge_heads(self.cache_image(vectors, cache.values, cache.table, *at, cache.value_parts, clip))
        k = ops.split_heads(self._made(c, weight, 0, heads * own), heads)
        v = ops.split_heads(self._made(c, weight, heads * own, weight.out_features), heads)
        keys = torch.cat((k, shared.expand(-1, heads, -1, -1)), -1)
        visible = _visible(cache.start, new, mask, None)
        output = ops.attention(q.float(), keys, v, visible, scale)
        return output.masked_fill(~visible.any(-1, keepdim=True), 0.0).transpose(1, 2).contiguous().to(q.dtype)

    def _made(self, x: Tensor, weight: PackedWeight, start: int, stop: int) -> Tensor:
        """Rows start:stop of the weight, its codes as floats, times x [..., columns]."""
        products = [
            ops.weight_only_linear(
                piece.contiguous(),
                self.codes.unpack_weight(weight.of(part), part, start, stop),
                weight.scale[i, start:stop],
            )
            for i, (piece, part) in enumerate(zip(_split(x, weight.parts), weight.parts, strict=True))
        ]
        return products[0] if len(products) == 1 else products[0] + products[1]

    def attention(self, q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
        return self._attended(q, cache, scores).to(q.dtype)

    def attention_quantize(
        self, q: Tensor, cache: LayerCache, scores: Scores, parts: tuple[InputPart, ...], clip: float
    ) -> Codes:
        output = self._attended(q, cache, scores)
        pieces = [piece.flatten(2) for piece in output.split([part.width for part in parts], -1)]
        return self._quantized(pieces, parts, (clip,) * len(parts))

    def _attended(self, q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
        """The output [B, S, H, D] float32."""
        new = q.shape[1]
        total = min(scores.mask.shape[1], int(cache.start.max()) + new)
        keys = self.cache.read(cache.keys, cache.table, cache.key_parts, total)
        values = self.cache.read(cache.values, cache.table, cache.value_parts, total)
        visible = _visible(cache.start, new, scores.mask[:, :total], scores.window)
        queries = q.float().transpose(1, 2)
        mask = visible if scores.slopes is None else _with_slopes(visible, scores.slopes, cache.start)
        if scores.prefix is not None:
            keys, values = (ops.prepend(*pair) for pair in zip(scores.prefix, (keys, values), strict=True))
            visible = mask = ops.see_prefix(visible, scores.prefix[0].shape[2])
        output = ops.attention(queries, keys, values, mask, scores.scale, scores.softcap, scores.sinks)
        return output.masked_fill(~visible.any(-1, keepdim=True), 0.0).transpose(1, 2).contiguous()

    def experts(
        self, x: Codes, routing: Routing, gate_up: PackedExperts, down: PackedExperts, between: Between, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        made = [self._rows_of(x, i, part) for i, part in enumerate(gate_up.parts)]
        h = between_experts(self._expert_linear(made, gate_up, routing.indices), between)
        pieces = [_transformed(piece, between.transform) for piece in _split(h, between.parts)]
        quantized = [
            quantize_activation(piece, part.bits, 1, clip)
            for piece, part, clip in zip(pieces, between.parts, between.clips, strict=True)
        ]
        y = self._expert_linear(quantized, down, routing.indices)
        return ops.combine_experts(y, routing.weights).to(dtype)

    def _rows_of(self, x: Codes, i: int, part: InputPart) -> QuantizedActivation:
        """One part, which has one run."""
        rows = self.codes.unpack_rows(x.of(part), part)
        return QuantizedActivation(rows, x.scale[..., i : i + 1], x.zero_point[..., i : i + 1], part.bits)

    def _expert_linear(self, x: Sequence[QuantizedActivation], weight: PackedExperts, indices: Tensor) -> Tensor:
        """[B, S, k, N]"""
        y: Tensor | None = None
        for i, part in enumerate(x):
            codes = weight.unpacked(self.codes, i)
            product = ops.quantized_expert_linear(part, codes, weight.scale[:, i], indices)
            y = product if y is None else y + product
        assert y is not None
        return y if weight.bias is None else ops.add_expert_bias(y, weight.bias, indices)

    def _quantized(self, pieces: Sequence[Tensor], parts: Sequence[InputPart], clips: Sequence[float]) -> Codes:
        """Codes of pieces [..., part.columns], one for each part."""
        rows, scales, zero_points = {}, [], []
        for x, part, clip in zip(pieces, parts, clips, strict=True):
            quantized = quantize_activation(x, part.bits, part.groups, clip)
            quantized = centred(quantized) if self.codes.is_centred(part) else quantized
            rows[part.is_low] = self.codes.pack_rows(quantized.qdata, part)
            scales.append(quantized.scale)
            zero_points.append(quantized.zero_point)
        nothing = scales[0].new_empty(*scales[0].shape[:-1], 0, dtype=torch.int8)
        low, high = rows.get(True, nothing), rows.get(False, nothing)
        return Codes(low, high, torch.cat(scales, -1), torch.cat(zero_points, -1))


def between_experts(y: Tensor, between: Between) -> Tensor:
    """act(gate) * up of [..., gate | up], or act(gate)."""
    gate, up = y.chunk(2, -1) if between.gated else (y, None)
    if between.activation == "clamped":
        gate = gate.clamp(max=between.limit)
        gate, up = (
            gate * torch.sigmoid(gate * between.slope),
            None if up is None else up.clamp(-between.limit, between.limit) + 1,
        )
    else:
        gate = _ACTIVATIONS[between.activation](gate)
    return gate if up is None else gate * up


def _transformed(x: Tensor, transform: str) -> Tensor:
    return x if transform == "none" else ops.hadamard(x, transform == "transposed")


def _with_slopes(visible: Tensor, slopes: Tensor, start: Tensor) -> Tensor:
    """A mask [B, 1, S, T] as something to add to the scores of each head, with its slope times the distance to the key."""
    new, total = visible.shape[-2:]
    queries = start[:, None] + torch.arange(new, device=start.device)
    distance = torch.arange(total, device=start.device) - queries[..., None]
    added = slopes[:, None, None] * distance[:, None]
    return added.masked_fill(~visible, torch.finfo(added.dtype).min)


def _split(x: Tensor, parts: Sequence[InputPart]) -> list[Tensor]:
    """The columns of each part."""
    return list(x.split([part.columns for part in parts], -1))


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "rms":
        return ops.rms_norm(x, norm.weight, norm.eps)
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return x


def _turned(x: Tensor, weight: Tensor | None, rotation: Rotation) -> Tensor:
    """Heads [B, H, S, D], normalized, rotated and in the basis u."""
    x = x if weight is None else ops.rms_norm(x, weight.float(), rotation.eps)
    if rotation.cos.shape[-1]:
        x = ops.rope(x, rotation.cos[:, None], rotation.sin[:, None])
    if rotation.u is None:
        return x
    u = rotation.u.float()
    return ops.project(x, u[0]) if u.shape[0] == 1 else ops.project_heads(x, u)


def _visible(start: Tensor, new: int, mask: Tensor, window: int | None) -> Tensor:
    """Which tokens each new one sees: [B, 1, S, T]."""
    keys = torch.arange(mask.shape[1], device=mask.device)
    slots = start[:, None] + torch.arange(new, device=mask.device)
    visible = keys <= slots[..., None]
    if window is not None:
        visible = visible & (keys > slots[..., None] - window)
    return (visible & mask[:, None]).unsqueeze(1)
