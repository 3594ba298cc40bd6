"""Triton's kernels as a provider of the fused operators: leading dimensions become rows, parts become layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from resq_compiler.backends.fused.experts import Between, PackedExperts, Routing
from resq_compiler.backends.fused.formats import Codes, InputPart, PackedWeight
from resq_compiler.backends.fused.kernels import Kernels, LayerCache, Norm, Rotation, Scores
from resq_compiler.backends.fused.target import Target
from resq_compiler.backends.fused.torch_kernels import between_experts
from resq_compiler.backends.triton import (
    attention,
    grouped_linear,
    hadamard_quantize,
    mixed_linear,
    norm_quantize,
    rope_cache,
)
from resq_compiler.backends.triton.formats import PaddedRows, PagedCache, PartLayout
from torch import Tensor


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 2 else x


def _layouts(parts: Sequence[InputPart]) -> tuple[PartLayout, ...]:
    return tuple(PartLayout.of(part) for part in parts)


def _codes(results: Sequence[Tensor | None], lead: torch.Size) -> Codes:
    """Results of a kernel, with leading dimensions instead of rows and empty tensors for the parts that are absent."""
    low, high, scale, zero_point = results
    assert scale is not None and zero_point is not None
    nothing = scale.new_empty(*lead, 0, dtype=torch.int8)
    low, high = (nothing if t is None else t.view(*lead, -1) for t in (low, high))
    return Codes(low, high, scale.view(*lead, -1), zero_point.view(*lead, -1))


class TritonKernels(Kernels):
    """One launch for each operator (hadamard_quantize: one for each part)."""

    def norm_quantize(self, x: Tensor, parts: tuple[InputPart, ...], norm: Norm, clips: tuple[float, ...]) -> Codes:
        layouts = _layouts(parts)
        return _codes(norm_quantize.norm_quantize(_rows(x), layouts, norm, clips), x.shape[:-1])

    def mixed_linear(
        self, x: Codes, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        rows = Codes(*(_rows(t) for t in x))
        extra = None if residual is None else _rows(residual)
        y = mixed_linear.mixed_linear(rows, weight, bias, extra, dtype)
        return y.view(*x.scale.shape[:-1], y.shape[-1])

    def experts(
        self,
        x: Codes,
        routing: Routing,
        gate_up: PackedExperts,
        down: PackedExperts,
        between: Between,
        dtype: torch.dtype,
    ) -> Tensor:
        rows, choices = Codes(*(_rows(t) for t in x)), routing.indices.shape[-1]
        count = len(rows.scale) * choices
        blocks = grouped_linear.row_blocks(routing.indices.reshape(count), len(gate_up.scale))
        hidden = self._between(grouped_linear.grouped_linear(rows, gate_up, blocks, choices, count), between)
        y = grouped_linear.grouped_linear(hidden, down, blocks, 1, count)
        shares = routing.weights.reshape(-1, choices, 1).float()
        total = (y.view(-1, choices, y.shape[-1]) * shares).sum(1)
        return total.to(dtype).view(*x.scale.shape[:-1], y.shape[-1])

    def _between(self, y: Tensor, between: Between) -> Codes:
        """Codes of what down reads; what the kernel of the transform does not compute is left to PyTorch."""
        parts, clips = between.parts, between.clips
        if between.transform == "none":
            return self.norm_quantize(between_experts(y, between), parts, Norm(), clips)
        transposed = between.transform == "transposed"
        if between.activation == "clamped":
            return self.hadamard_quantize(between_experts(y, between), None, parts, "none", transposed, clips)
        gate, up = y.chunk(2, -1) if between.gated else (y, None)
        return self.hadamard_quantize(gate, up, parts, between.activation, transposed, clips)

    def hadamard_quantize(
        self, gate: Tensor, up: Tensor | None, parts: tuple[InputPart, ...], activation: str, transpose: bool,
        clips: tuple[float, ...],
    ) -> Codes:  # fmt: skip
        results: dict[bool, Tensor] = {}
        scales, zero_points, start = [], [], 0
        for layout, clip in zip(_layouts(parts), clips, strict=True):
            columns = slice(start, start + layout.columns)
            start += layout.columns
            other = None if up is None else _rows(up)[:, columns]
            codes, scale, zero_point = hadamard_quantize.hadamard_quantize(
                _rows(gate)[:, columns], other, layout, activation, transpose, clip
            )
            results[layout.is_low] = codes
            scales.append(scale)
            zero_points.append(zero_point)
        four = (results.get(True), results.get(False), torch.cat(scales, 1), torch.cat(zero_points, 1))
        return _codes(four, gate.shape[:-1])

    def rope_cache(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: LayerCache, clip: float) -> Tensor:
        d = cache.key_parts.head_dim
        q, k, v = (x.unflatten(-1, (-1, d)) for x in (q, k, v))
        return rope_cache.rope_cache(q, k, v, rotation, cache, clip)

    def attention(self, q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
        return attention.attention(q, cache, scores)

    def attention_quantize(
        self, q: Tensor, cache: LayerCache, scores: Scores, parts: tuple[InputPart, ...], clip: float
    ) -> Codes:
        return _codes(attention.attention_quantize(q, cache, scores, _layouts(parts), clip), q.shape[:2])


def why_not_columns(columns: int) -> str | None:
    """None when one program can normalize and quantize a row of so many columns, else the reason."""
    limit = norm_quantize.MAX_COLUMNS
    return f"{columns} input columns, one pass holds at most {limit}" if columns > limit else None


TRITON = Target("triton", PaddedRows(), PagedCache(), TritonKernels(), why_not_columns, hadamard_quantize.why_not_fused)
