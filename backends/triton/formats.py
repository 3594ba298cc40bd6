"""The bytes the Triton kernels read and write.

Codes are signed; the disk format (`resq_compiler.numerics.packing`) is the same nibble order without the row padding.

    packed      4-bit container: two codes a byte, even column in the low nibble, two's complement; holds codes of 2, 3 and 4 bits
    int8        one code a byte; holds codes of 5 to 8 bits
    stride      bytes of one group in a row, zero padded: to 32 (64 from 512 bytes on) when the row is one group, so that the
                K loop needs no mask and every row starts on a 128-bit boundary; to 16 when there are several groups

    activations low [M, groups * stride], high [M, groups * stride]       weights the same, a row for each output
    cache       per layer one int8 tensor for keys and one for values, [pages, Hkv, page_bytes]; a page holds PAGE tokens of a
                head as blocks: low [PAGE, low_bytes], high [PAGE, high_bytes], scale [PAGE, 2] float32, zero_point [PAGE, 2]
                int8, rows padded to 8 bytes; token t of sequence b is in page table[b, t // PAGE] (int32); the pages of sequence b
                are b * n .. (b + 1) * n - 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from resq_compiler.backends.fused.formats import CacheFormat, CodeFormat, HeadParts, InputPart
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.packing import pack, unpack
from resq_compiler.numerics.quantized import QuantizedActivation, dequantize, quantize_activation

PAGE = 64
MIN_DOT_BYTES = 32


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def next_power_of_two(value: int) -> int:
    """Smallest power of two that is at least `value` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class PartLayout(InputPart):
    """Where the codes of one part lie in a row: `groups` runs of `width` columns of `bits`-bit codes."""

    @staticmethod
    def of(part: InputPart) -> PartLayout:
        """The layout of a part."""
        return PartLayout(part.bits, part.width, part.groups)

    @property
    def stride(self) -> int:
        used = (self.width + 1) // 2 if self.is_low else self.width
        if self.groups > 1:
            return round_up(used, 16)
        return round_up(used, 64 if used >= 512 else MIN_DOT_BYTES)

    @property
    def row_bytes(self) -> int:
        return self.stride * self.groups


@dataclass(frozen=True)
class HeadLayout(HeadParts):
    """Bytes of one cached head."""

    @staticmethod
    def of(parts: HeadParts) -> HeadLayout:
        """The layout of the parts of a head."""
        return HeadLayout(parts.low, parts.high, parts.low_bits, parts.high_bits)

    @property
    def low_bytes(self) -> int:
        return round_up((self.low + 1) // 2, 8)

    @property
    def high_bytes(self) -> int:
        return round_up(self.high, 8)

    @property
    def page_bytes(self) -> int:
        return PAGE * (self.low_bytes + self.high_bytes + 2 * 4 + 2)

    def constants(self, suffix: str) -> dict[str, int]:
        """The compile-time constants kernels take: widths, bits and row bytes, with a suffix."""
        values = dict(LOW=self.low, HIGH=self.high, BITS_L=self.low_bits, BITS_H=self.high_bits)
        values |= dict(BYTES_L=self.low_bytes, BYTES_H=self.high_bytes, PAGE_BYTES=self.page_bytes)
        return {name + suffix: value for name, value in values.items()}


def pack_rows(codes: Tensor, layout: PartLayout) -> Tensor:
    """Lay codes out as `layout` says, zero padded.

    Args:    codes: [..., groups * width] int8.
    Returns: [..., layout.row_bytes] int8.
    Raises:  QuantError: the last dimension is not layout.columns.
    """
    if codes.shape[-1] != layout.columns:
        raise QuantError(f"pack_rows: {codes.shape[-1]} columns, but the layout has {layout.groups} x {layout.width}")
    grouped = codes.unflatten(-1, (layout.groups, layout.width))
    rows = pack(grouped, 4).view(torch.int8) if layout.is_low else grouped
    return torch.nn.functional.pad(rows, (0, layout.stride - rows.shape[-1])).flatten(-2).contiguous()


def unpack_rows(rows: Tensor, layout: PartLayout) -> Tensor:
    """Inverse of `pack_rows`: [..., layout.row_bytes] int8 -> [..., layout.columns] int8."""
    grouped = rows.unflatten(-1, (layout.groups, layout.stride))
    if not layout.is_low:
        return grouped[..., : layout.width].flatten(-2)
    used = grouped[..., : (layout.width + 1) // 2].view(torch.uint8)
    return unpack(used, 4, layout.width).flatten(-2)


class PaddedRows(CodeFormat):
    """Activations and weights in padded rows."""

    def row_bytes(self, part: InputPart) -> int:
        return PartLayout.of(part).row_bytes

    def pack_rows(self, codes: Tensor, part: InputPart) -> Tensor:
        return pack_rows(codes, PartLayout.of(part))

    def unpack_rows(self, rows: Tensor, part: InputPart) -> Tensor:
        return unpack_rows(rows, PartLayout.of(part))

    def pack_weight(self, codes: Tensor, part: InputPart) -> Tensor:
        return self.pack_rows(codes, part)

    def weight_shape(self, part: InputPart, out_features: int) -> tuple[int, ...]:
        return out_features, PartLayout.of(part).row_bytes

    def unpack_weight(self, packed: Tensor, part: InputPart, start: int, stop: int) -> Tensor:
        return self.unpack_rows(packed[start:stop], part)


class PagedCache(CacheFormat):
    """Keys or values in pages."""

    table_input: ClassVar[bool] = True

    def allocate(self, batch: int, heads: int, parts: HeadParts, tokens: int, device: torch.device) -> Tensor:
        pages = batch * next_power_of_two(max(1, -(-tokens // PAGE)))
        return torch.empty(pages, heads, HeadLayout.of(parts).page_bytes, dtype=torch.int8, device=device)

    def capacity(self, cache: Tensor, batch: int) -> int:
        return PAGE * (cache.shape[0] // max(1, batch))

    def grown(self, cache: Tensor, batch: int, tokens: int) -> Tensor:
        held = cache.shape[0] // batch
        pages = next_power_of_two(max(-(-tokens // PAGE), held))
        larger = cache.new_empty(batch, pages, *cache.shape[1:])
        larger[:, :held] = cache.unflatten(0, (batch, held))
        return larger.flatten(0, 1)

    def selected(self, cache: Tensor, batch: int, index: Tensor) -> Tensor:
        return cache.unflatten(0, (batch, -1)).index_select(0, index.to(cache.device)).flatten(0, 1)

    def table(self, batch: int, capacity: int, device: torch.device) -> Tensor:
        pages = capacity // PAGE
        return torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)

    def write(
        self, cache: Tensor, table: Tensor | None, start: Tensor, x: Tensor, parts: HeadParts, clip: float
    ) -> None:
        assert table is not None
        layout = HeadLayout.of(parts)
        for b, first in enumerate(start.tolist()):
            for i, token in enumerate(x[b], first):
                write_token(cache[int(table[b, i // PAGE])], i % PAGE, token, layout, clip)

    def read(self, cache: Tensor, table: Tensor | None, parts: HeadParts, total: int) -> Tensor:
        assert table is not None
        layout = HeadLayout.of(parts)
        chosen = cache[table[:, : -(-total // PAGE)].long()].transpose(1, 2)  # [B, Hkv, n, page_bytes]
        low, high, scales, zero_points = chosen.split(_block_sizes(layout), -1)
        scales = _tokens(scales.contiguous().view(torch.float32), total)
        zero_points = _tokens(zero_points, total).int()
        pieces = []
        for bits, first, last in layout.spans:
            block, of_part = (low, slice(0, 1)) if bits <= 4 else (high, slice(1, 2))
            codes = _tokens(block, total)
            used = codes[..., : (last - first + 1) // 2].contiguous().view(torch.uint8)
            codes = unpack(used, 4, last - first) if bits <= 4 else codes[..., : last - first]
            pieces.append(dequantize(QuantizedActivation(codes, scales[..., of_part], zero_points[..., of_part], bits)))
        return torch.cat(pieces, -1)


def _block_sizes(layout: HeadLayout) -> list[int]:
    """Bytes of the blocks of a page: low codes, high codes, scales, zero points."""
    return [PAGE * layout.low_bytes, PAGE * layout.high_bytes, PAGE * 8, PAGE * 2]


def _tokens(blocks: Tensor, total: int) -> Tensor:
    """Blocks [B, H, pages, PAGE * n] as the first rows [B, H, total, n]."""
    return blocks.unflatten(-1, (PAGE, -1)).flatten(2, 3)[:, :, :total]


def write_token(page: Tensor, row: int, x: Tensor, layout: HeadLayout, clip: float) -> None:
    """Codes and parameters of one token, x [Hkv, D], into row `row` of page [Hkv, page_bytes]."""
    low, high, scales, zero_points = page.split(_block_sizes(layout), -1)
    for bits, first, last in layout.spans:
        xq = quantize_activation(x[:, first:last], bits, 1, clip)
        index, block = (0, low) if bits <= 4 else (1, high)
        codes = pack(xq.qdata, 4).view(torch.int8) if bits <= 4 else xq.qdata
        block.unflatten(-1, (PAGE, -1))[:, row, : codes.shape[1]] = codes
        scales.unflatten(-1, (PAGE, 2, 4))[:, row, index] = xq.scale.view(torch.int8)
        zero_points.unflatten(-1, (PAGE, 2))[:, row, index] = xq.zero_point[:, 0].to(torch.int8)
