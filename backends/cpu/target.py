"""The CPU kernels as a provider of the fused operators: formats of the library, and calls on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from resq_compiler.backends.cpu import attention, formats, kernels, latent
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.cpu.experts import ExpertWeight, combined_linear, grouped_linear, sort_rows
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import CodePart, LinearWeight, RowParts
from resq_compiler.backends.fused import plain
from resq_compiler.backends.fused.experts import Between, PackedExperts, Routing
from resq_compiler.backends.fused.formats import CodeFormat, Codes, HeadParts, InputPart, PackedWeight
from resq_compiler.backends.fused.kernels import Kernels, LayerCache, Norm, Rotation, Scores
from resq_compiler.backends.fused.target import ALL_SCORES, Target
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import hadamard_plan

TRANSPOSED = {"none": None, "hadamard": False, "transposed": True}
"""What the kernel is asked for, by the name of a transform (fused.experts.TRANSFORMS)."""


class TiledCodes(CodeFormat):
    """Rows with sums of their runs, weights in tiles of 64 outputs (formats)."""

    tile_rows = formats.TILE

    def is_centred(self, part: InputPart) -> bool:
        return part.bits <= formats.CENTRED_BITS

    def row_bytes(self, part: InputPart) -> int:
        return part.groups * (formats.stride(part.width) + 4)

    def pack_rows(self, codes: Tensor, part: InputPart) -> Tensor:
        return formats.pack_rows(codes, part.groups)

    def unpack_rows(self, rows: Tensor, part: InputPart) -> Tensor:
        return formats.unpack_rows(rows, part.width, part.groups)

    def pack_weight(self, codes: Tensor, part: InputPart) -> Tensor:
        return formats.pack_weight(codes, part.weight_bits, part.groups).view(torch.int8)

    def weight_shape(self, part: InputPart, out_features: int) -> tuple[int, ...]:
        return formats.tile_shape(out_features, part.width, part.weight_bits, part.groups)

    def unpack_weight(self, packed: Tensor, part: InputPart, start: int, stop: int) -> Tensor:
        tiles = packed[start // formats.TILE : -(-stop // formats.TILE)].view(torch.uint8)
        first = start // formats.TILE * formats.TILE
        return formats.unpack_weight(tiles, stop - first, part.width, part.weight_bits, part.groups)[start - first :]


class RowCache(plain.RowCache):
    """Tokens one behind the other, in rows of the library."""

    def allocate(self, batch: int, heads: int, parts: HeadParts, tokens: int, device: torch.device) -> Tensor:
        return torch.empty(batch, heads, tokens, _head(parts).row_bytes, dtype=torch.int8, device=device)

    def write(
        self, cache: Tensor, table: Tensor | None, start: Tensor, x: Tensor, parts: HeadParts, clip: float
    ) -> None:
        rows = formats.pack_cache(x.transpose(1, 2), _head(parts), clip).view(torch.int8)
        for b, first in enumerate(start.tolist()):
            cache[b, :, first : first + x.shape[1]] = rows[b]

    def read(self, cache: Tensor, table: Tensor | None, parts: HeadParts, total: int) -> Tensor:
        return formats.unpack_cache(cache[:, :, :total].view(torch.uint8), _head(parts))


def _head(parts: HeadParts) -> CachedHead:
    return CachedHead(*parts.attribute)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _parts(parts: Sequence[InputPart], clips: Sequence[float]) -> list[CodePart]:
    return [CodePart(p.bits, p.width, p.groups, clip) for p, clip in zip(parts, clips, strict=True)]


def _codes(made: RowParts, parts: Sequence[InputPart], lead: torch.Size) -> Codes:
    """Quantized rows with leading dimensions; empty tensors for parts that are absent."""
    rows = {part.is_low: row for part, row in zip(parts, made.rows, strict=True)}
    nothing = made.scale.new_empty(*lead, 0, dtype=torch.int8)
    low, high = (rows[is_low].view(*lead, -1) if is_low in rows else nothing for is_low in (True, False))
    return Codes(low, high, made.scale.view(*lead, -1), made.zero_point.view(*lead, -1))


def _check_float32(operator: str, dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise BackendError(f"cpu kernels: {operator} gives float32, not {dtype}; lower with dtype=torch.float32")


def _row_parts(x: Codes, parts: Sequence[InputPart]) -> RowParts:
    """Quantized rows, without leading dimensions."""
    widths, groups, bits = zip(*((p.width, p.groups, p.bits) for p in parts), strict=True)
    return RowParts(tuple(_rows(x.of(p)) for p in parts), widths, groups, bits, _rows(x.scale), _rows(x.zero_point))


def _linear_weight(weight: PackedWeight) -> LinearWeight:
    tiles = tuple(weight.of(p).view(torch.uint8) for p in weight.parts)
    return LinearWeight(tiles, tuple(p.weight_bits for p in weight.parts), weight.scale, weight.row_sum)


def _expert_weight(weight: PackedExperts) -> ExpertWeight:
    return ExpertWeight(weight.codes.view(torch.uint8), weight.scale, weight.row_sum, weight.bits, weight.bias)


def _cache(cache: LayerCache) -> attention.LayerCache:
    tensors = (cache.keys.view(torch.uint8), cache.values.view(torch.uint8))
    return attention.LayerCache(*tensors, _head(cache.key_parts), _head(cache.value_parts), cache.start)


class CpuKernels(Kernels):
    """One call of the installed library for each operator, in as many threads as PyTorch uses."""

    def norm_quantize(self, x: Tensor, parts: tuple[InputPart, ...], norm: Norm, clips: tuple[float, ...]) -> Codes:
        weights = (norm.kind, norm.weight, norm.bias, norm.eps)
        made = kernels.norm_quantize(libraries.library(), _rows(x), _parts(parts, clips), *weights, _threads())
        return _codes(made, parts, x.shape[:-1])

    def mixed_linear(
        self, x: Codes, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        _check_float32("mixed_linear", dtype)
        rows = _row_parts(x, weight.parts)
        extra = None if residual is None else _rows(residual)
        y = kernels.mixed_linear(libraries.library(), rows, _linear_weight(weight), bias, extra, _threads())
        return y.view(*x.scale.shape[:-1], weight.out_features)

    def hadamard_quantize(
        self, gate: Tensor, up: Tensor | None, parts: tuple[InputPart, ...], activation: str, transpose: bool,
        clips: tuple[float, ...],
    ) -> Codes:  # fmt: skip
        other = None if up is None else _rows(up)
        operands = (_rows(gate), other, _parts(parts, clips), activation, transpose)
        return _codes(kernels.hadamard_quantize(libraries.library(), *operands, _threads()), parts, gate.shape[:-1])

    def experts(
        self, x: Codes, routing: Routing, gate_up: PackedExperts, down: PackedExperts, between: Between, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        _check_float32("experts", dtype)
        library, tokens, choices = libraries.library(), x.scale.shape[:-1].numel(), routing.indices.shape[-1]
        groups, order = sort_rows(routing.indices.view(tokens, choices), gate_up.scale.shape[0])
        token, share = order // choices, routing.weights.flatten().float()[order]
        rows = _row_parts(x, gate_up.parts)
        mine = replace(
            rows, rows=tuple(r[token] for r in rows.rows), scale=rows.scale[token], zero_point=rows.zero_point[token]
        )
        h = grouped_linear(library, mine, _expert_weight(gate_up), groups, _threads())
        gate, up = [piece.contiguous() for piece in h.chunk(2, -1)] if between.gated else (h, None)
        hidden = kernels.hadamard_quantize(
            library, gate, up, _parts(between.parts, between.clips), between.activation, TRANSPOSED[between.transform],
            _threads(), between.limit, between.slope,
        )  # fmt: skip
        weight = _expert_weight(down)
        y = combined_linear(library, hidden, weight, groups, token.int(), share, tokens, threads=_threads())
        return y.view(*x.scale.shape[:-1], down.out_features)

    def rope_cache(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: LayerCache, clip: float) -> Tensor:
        d, u = cache.key_parts.head_dim, rotation.u
        heads = [_evenly(x).unflatten(-1, (-1, d)) for x in (q, k, v)]
        tables = (rotation.cos.contiguous(), rotation.sin.contiguous()) if rotation.cos.shape[-1] else None
        basis = u[0] if u is not None and len(u) == 1 else u
        return attention.rope_cache(
            libraries.library(), heads[0], heads[1], heads[2], tables, _cache(cache), basis, rotation.q_norm, rotation.k_norm,
            rotation.eps, clip, _threads(),
        )  # fmt: skip

    def cache_image(
        self, x: Tensor, cache: Tensor, table: Tensor | None, start: Tensor, total: int, parts: HeadParts, clip: float
    ) -> Tensor:
        packed = cache.view(torch.uint8)
        operands = (x.contiguous(), packed, _head(parts), start, total, clip)
        return attention.cache_image(libraries.library(), *operands, _threads())

    def latent_attention(
        self, q: Tensor, vectors: Tensor, rotary: Tensor, cache: LayerCache, mask: Tensor, weight: PackedWeight, own: int, scale: float,
        clip: float,
    ) -> Tensor:  # fmt: skip
        vector_entry, rotary_entry = (
            latent.Entry(rows.view(torch.uint8), new.contiguous(), _head(parts))
            for rows, new, parts in ((cache.values, vectors, cache.value_parts), (cache.keys, rotary, cache.key_parts))
        )
        expansion = latent.Expansion(_linear_weight(weight), tuple(p.width for p in weight.parts), q.shape[1], own)
        return latent.latent_attention(
            libraries.library(), q.contiguous(), vector_entry, rotary_entry, cache.start, mask, expansion, scale, clip, _threads()
        )  # fmt: skip

    def attention(self, q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
        y = _attend(q, cache, scores, None)
        assert isinstance(y, Tensor)
        return y

    def attention_quantize(
        self, q: Tensor, cache: LayerCache, scores: Scores, parts: tuple[InputPart, ...], clip: float
    ) -> Codes:
        made = _attend(q, cache, scores, _parts(parts, [clip] * len(parts)))
        assert isinstance(made, RowParts)
        return _codes(made, parts, q.shape[:2])


def _attend(q: Tensor, cache: LayerCache, scores: Scores, parts: list[CodePart] | None) -> Tensor | RowParts:
    prefix = None if scores.prefix is None else (scores.prefix[0][0], scores.prefix[1][0])
    options = (scores.scale, scores.mask, scores.window or 0, scores.softcap or 0.0, scores.sinks, parts, _threads())
    return attention.attention(libraries.library(), q, _cache(cache), *options, prefix, scores.slopes)


def _evenly(x: Tensor) -> Tensor:
    """x [B, S, columns] as the kernel takes it: a slice of the columns of a contiguous tensor, or a copy."""
    slice_of_rows = x.stride(-1) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if slice_of_rows and x.shape[1] > 1 else x.contiguous()


def _threads() -> int:
    return torch.get_num_threads()


def why_not_columns(columns: int) -> str | None:
    """None when the kernels take rows of so many columns, else the reason."""
    limit = libraries.MAX_COLUMNS
    return f"{columns} input columns, the kernels take at most {limit}" if columns > limit else None


def why_not_transform(columns: int) -> str | None:
    """None when the kernel multiplies rows of so many columns by a Hadamard matrix, else the reason."""
    count, limit = len(hadamard_plan(columns).factors), libraries.MAX_FACTORS
    return f"{columns} columns need {count} factors, the kernel takes {limit}" if count > limit else None


def why_not_head(columns: int) -> str | None:
    """None when the kernels of attention take heads of so many columns, else the reason."""
    limit = libraries.MAX_HEAD
    return f"heads of {columns} columns, the kernels take at most {limit}" if columns > limit else None


def why_not_entry(columns: int) -> str | None:
    """None when the kernel reads cached rows of so many columns as floats, else the reason."""
    limit = libraries.MAX_ENTRY
    return f"cached vectors of {columns} columns, the kernels take at most {limit}" if columns > limit else None


CPU = Target(
    "cpu",
    TiledCodes(),
    RowCache(),
    CpuKernels(),
    why_not_columns,
    why_not_transform,
    why_not_head,
    ALL_SCORES,
    any_parts=True,
    why_not_entry=why_not_entry,
)
