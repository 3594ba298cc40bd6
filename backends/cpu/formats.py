"""How codes lie in memory for the CPU kernels; the layouts are described in kernels/src/resq_kernels.h.

Packing happens once, when a model is exported or lowered; kernels read these bytes as they are, for one row as for many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import quantize_activation

TILE = 64
NIBBLE_BITS = 4
"""Codes of up to so many bits are stored two a byte."""
CENTRED_BITS = 7
"""Rows hold codes of up to so many bits less their zero point."""


@dataclass(frozen=True)
class CachedHead:
    """A cached head: columns [0, low) in codes of at most 4 bits, the `high` columns behind them in codes of 5 to 8 bits."""

    low: int
    high: int
    low_bits: int = 4
    high_bits: int = 8

    @property
    def columns(self) -> int:
        return self.low + self.high

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """(bits, start, stop) of the parts there are."""
        both = ((self.low_bits, 0, self.low), (self.high_bits, self.low, self.columns))
        return [span for span in both if span[2] > span[1]]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token: codes, a zero point and a scale for each part."""
        return (self.low + 1) // 2 + self.high + 5 * len(self.spans)


def pack_cache(x: Tensor, head: CachedHead, clip: float = 1.0) -> Tensor:
    """Quantize keys or values as the kernels do: x [..., columns] -> cache rows uint8 [..., row bytes]."""
    codes, zero_points, scales = [], [], []
    for bits, start, stop in head.spans:
        xq = quantize_activation(x[..., start:stop], bits, 1, clip)
        stored = (xq.qdata.short() + 2 ** (bits - 1)).to(torch.uint8)
        codes.append(_pack_halves(stored) if bits <= NIBBLE_BITS else stored)
        zero_points.append((xq.zero_point + 2 ** (bits - 1)).to(torch.uint8))
        scales.append(xq.scale.view(torch.uint8))
    return torch.cat([*codes, *zero_points, *scales], -1)


def unpack_cache(rows: Tensor, head: CachedHead) -> Tensor:
    """The float image of cache rows: float32 [..., columns]."""
    parts, images, start = len(head.spans), [], 0
    scales = rows[..., head.row_bytes - 4 * parts :].clone(memory_format=torch.contiguous_format).view(torch.float32)
    zero_points = rows[..., head.row_bytes - 5 * parts : head.row_bytes - 4 * parts].float()
    for i, (bits, first, last) in enumerate(head.spans):
        size = (last - first + 1) // 2 if bits <= NIBBLE_BITS else last - first
        stored = rows[..., start : start + size]
        codes = _unpack_halves(stored, last - first) if bits <= NIBBLE_BITS else stored
        images.append((codes.float() - zero_points[..., i : i + 1]) * scales[..., i : i + 1])
        start += size
    return torch.cat(images, -1)


def _pack_halves(stored: Tensor) -> Tensor:
    half = stored.shape[-1] // 2
    return torch.cat((stored[..., :half] | stored[..., half : 2 * half] << 4, stored[..., 2 * half :]), -1)


def _unpack_halves(packed: Tensor, width: int) -> Tensor:
    pairs = packed[..., : width // 2]
    return torch.cat((pairs & 15, pairs >> 4, packed[..., width // 2 :]), -1)


def stride(width: int) -> int:
    """Columns of a run, padding included."""
    return -(-width // 8) * 8


def _runs(codes: Tensor, groups: int, where: str) -> Tensor:
    """[..., groups * width] as [..., groups, stride], padded with zeros."""
    if codes.dtype != torch.int8 or codes.shape[-1] % groups:
        raise QuantError(
            f"{where}: got {codes.dtype} {tuple(codes.shape)}, expected int8 with a multiple of {groups} columns"
        )
    runs = codes.unflatten(-1, (groups, -1))
    return F.pad(runs, (0, stride(runs.shape[-1]) - runs.shape[-1]))


def pack_rows(codes: Tensor, groups: int = 1) -> Tensor:
    """Activation codes of one part, less their zero point up to CENTRED_BITS, with the sums of every run behind them.

    Args:    codes: [..., groups * width] int8.
    Returns: [..., groups * (stride + 4)] int8.
    Raises:  QuantError: codes are not int8, or groups does not divide their columns.
    """
    runs = _runs(codes, groups, "pack_rows")
    sums = runs.sum(-1, dtype=torch.int32).contiguous().view(torch.int8)
    return torch.cat((runs.flatten(-2), sums), -1)


def unpack_rows(rows: Tensor, width: int, groups: int = 1) -> Tensor:
    """Inverse of `pack_rows`: [..., groups * width] int8."""
    codes = rows[..., : groups * stride(width)].unflatten(-1, (groups, -1))
    return codes[..., :width].flatten(-2)


def pack_weight(codes: Tensor, bits: int, groups: int = 1) -> Tensor:
    """Weight codes of one part as tiles of 64 output channels.

    Args:    codes: [N, groups * width] int8, of at most `bits` bits.    bits: 2..8, which says how many bytes they take.
    Returns: uint8 [ceil(N / 64), bytes of a tile].
    Raises:  QuantError: as pack_rows.
    """
    runs = _runs(codes, groups, "pack_weight")
    runs = F.pad(runs, (0, 0, 0, 0, 0, -runs.shape[0] % TILE))
    offset = 8 if bits <= NIBBLE_BITS else 128
    stored = (runs.short() + offset).to(torch.uint8)
    # [tile, 16 channels i, channel c, group, block, half, column j] -> [tile, group, block, half, i, c, j]
    blocks = stored.view(-1, 4, 16, groups, runs.shape[-1] // 8, 2, 4).permute(0, 3, 4, 5, 1, 2, 6)
    if bits <= NIBBLE_BITS:
        blocks = blocks[:, :, :, 0] | blocks[:, :, :, 1] << 4
    return blocks.flatten(1).contiguous()


def tile_shape(channels: int, width: int, bits: int, groups: int = 1) -> tuple[int, int]:
    """Of what `pack_weight` makes: tiles and bytes of one."""
    return -(-channels // TILE), groups * stride(width) * (TILE // 2 if bits <= NIBBLE_BITS else TILE)


def unpack_weight(tiles: Tensor, channels: int, width: int, bits: int, groups: int = 1) -> Tensor:
    """Inverse of `pack_weight`: [channels, groups * width] int8."""
    blocks = stride(width) // 8
    if bits <= NIBBLE_BITS:
        pairs = tiles.view(-1, groups, blocks, 4, 16, 4)
        stored = torch.stack((pairs & 15, pairs >> 4), 3)
    else:
        stored = tiles.view(-1, groups, blocks, 2, 4, 16, 4)
    rows = stored.permute(0, 4, 5, 1, 2, 3, 6).reshape(-1, groups, 8 * blocks)[:channels, :, :width]
    return (rows.short() - (8 if bits <= NIBBLE_BITS else 128)).to(torch.int8).flatten(1)
