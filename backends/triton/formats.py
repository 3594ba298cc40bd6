"""Byte layouts shared by the Triton kernels, the lowering pass and the packed key/value cache.

Codes are signed; the disk format (`resq_compiler.numerics.packing`) is the same nibble order without the row padding.

    part        one precision of a linear input: `groups` runs of `width` columns, each with its own scale and zero-point
    packed      4-bit container: two codes a byte, even column in the low nibble, two's complement; holds codes of 2, 3 and 4 bits
    int8        one code a byte; holds codes of 5 to 8 bits
    stride      bytes of one group in a row, zero padded: to 32 (64 from 512 bytes on) when the row is one group, so that the
                K loop needs no mask and every row starts on a 128-bit boundary; to 16 when there are several groups

    activations low  [M, groups * stride_low]   high [M, groups * stride_high]      int8 storage
                scale, zero_point [M, parts * groups]   float32, int32; columns [low groups | high groups]
    weights     low  [N, groups * stride_low]   high [N, groups * stride_high]      int8 storage
                scale [parts, N] float32        row_sum [parts * groups, N] int32 = sum of the codes, for the zero-points
    cache       per layer one int8 tensor for keys and one for values, [pages, Hkv, page_bytes]; a page holds PAGE tokens of a
                head as blocks: low [PAGE, low_bytes], high [PAGE, high_bytes], scale [PAGE, 2] float32, zero_point [PAGE, 2]
                int8, rows padded to 8 bytes; token t of sequence b is in page block_table[b, t // PAGE] (int32)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.packing import pack, unpack

PAGE = 64
MIN_DOT_BYTES = 32


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def next_power_of_two(value: int) -> int:
    """Smallest power of two that is at least `value` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


@dataclass(frozen=True)
class PartLayout:
    """Where the codes of one part lie in a row: `groups` runs of `width` columns of `bits`-bit codes."""

    bits: int
    width: int
    groups: int = 1

    @property
    def packed(self) -> bool:
        return self.bits <= 4

    @property
    def columns(self) -> int:
        return self.width * self.groups

    @property
    def stride(self) -> int:
        used = (self.width + 1) // 2 if self.packed else self.width
        if self.groups > 1:
            return round_up(used, 16)
        return round_up(used, 64 if used >= 512 else MIN_DOT_BYTES)

    @property
    def row_bytes(self) -> int:
        return self.stride * self.groups


@dataclass(frozen=True)
class HeadLayout:
    """Bytes of one cached head: columns [0, low) of at most 4 bits, columns [low, low + high) of at most 8 bits."""

    low: int
    high: int
    low_bits: int = 4
    high_bits: int = 8

    @property
    def head_dim(self) -> int:
        return self.low + self.high

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


def head_layout(parts: tuple[tuple[int, int, int], ...]) -> HeadLayout:
    """The layout of cache parts (bits, start, stop): at most one of <= 4 bits, then at most one of > 4.

    Raises: QuantError: other combinations, which the cache kernels do not hold.
    """
    containers = [bits <= 4 for bits, _, _ in parts]
    if containers not in ([True], [False], [True, False]):
        raise QuantError(f"cache parts {parts} (bits, start, stop): expected one of <= 4 bits and/or one of > 4 bits")
    widths = {small: (bits, stop - start) for small, (bits, start, stop) in zip(containers, parts, strict=True)}
    low_bits, low = widths.get(True, (4, 0))
    high_bits, high = widths.get(False, (8, 0))
    return HeadLayout(low, high, low_bits, high_bits)


def pack_rows(codes: Tensor, layout: PartLayout) -> Tensor:
    """Lay codes out as `layout` says, zero padded.

    Args:    codes: [..., groups * width] int8.
    Returns: [..., layout.row_bytes] int8.
    Raises:  QuantError: the last dimension is not layout.columns.
    """
    if codes.shape[-1] != layout.columns:
        raise QuantError(f"pack_rows: {codes.shape[-1]} columns, but the layout has {layout.groups} x {layout.width}")
    grouped = codes.unflatten(-1, (layout.groups, layout.width))
    rows = pack(grouped, 4).view(torch.int8) if layout.packed else grouped
    return torch.nn.functional.pad(rows, (0, layout.stride - rows.shape[-1])).flatten(-2).contiguous()


def unpack_rows(rows: Tensor, layout: PartLayout) -> Tensor:
    """Inverse of `pack_rows`: [..., layout.row_bytes] int8 -> [..., layout.columns] int8."""
    grouped = rows.unflatten(-1, (layout.groups, layout.stride))
    if not layout.packed:
        return grouped[..., : layout.width].flatten(-2)
    used = grouped[..., : (layout.width + 1) // 2].view(torch.uint8)
    return unpack(used, 4, layout.width).flatten(-2)


@dataclass(frozen=True)
class PackedWeight:
    """Weight of one or several stacked linears as `mixed_linear` reads it; fields as in the module docstring."""

    low: Tensor | None
    high: Tensor | None
    scale: Tensor
    row_sum: Tensor
    layouts: tuple[PartLayout, ...]

    @property
    def out_features(self) -> int:
        return self.scale.shape[1]


def pack_weight(parts: list[tuple[Tensor, Tensor, PartLayout]]) -> PackedWeight:
    """Pack the parts of a linear: at most one 4-bit container and one int8 part, low first.

    Args:    parts: (qdata [N, columns] int8, scale [N] float32, layout) of each part.
    Raises:  QuantError: two parts need the same container.
    """
    packed = [layout.packed for _, _, layout in parts]
    if packed not in ([True], [False], [True, False]):
        raise QuantError(
            f"pack_weight: parts of {[p[2].bits for p in parts]} bits; expected one of <= 4 and/or one of > 4"
        )
    sums = [q.unflatten(-1, (la.groups, la.width)).sum(-1, dtype=torch.int32).T for q, _, la in parts]
    rows = {layout.packed: pack_rows(q, layout) for q, _, layout in parts}
    scale = torch.stack([s.to(torch.float32) for _, s, _ in parts]).contiguous()
    return PackedWeight(
        rows.get(True), rows.get(False), scale, torch.cat(sums).contiguous(), tuple(p[2] for p in parts)
    )
