"""How codes lie in memory for the CPU kernels; the layouts are described in kernels/src/resq_kernels.h.

Packing happens once, when a model is exported or lowered; kernels read these bytes as they are, for one row as for many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.errors import QuantError

TILE = 64
NIBBLE_BITS = 4
"""Codes of up to so many bits are stored two a byte."""


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
    """Activation codes of one part with the sums of every run behind them.

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
