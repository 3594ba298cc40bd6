"""Packing of small signed codes into bytes, in memory and on disk.

Along the last dimension (in_features): 4-bit codes two per byte, even index in the low nibble; 2-bit codes four per
byte, first index in the two lowest bits; both two's complement, the tail padded with zeros. Other widths stay one int8
per code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.errors import QuantError

_CODES_PER_BYTE = {2: 4, 4: 2}


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits take: ceil(length * bits / 8) for 2 and 4 bits, else `length`."""
    return -(-length // _CODES_PER_BYTE.get(bits, 1))


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 codes along the last dimension.

    Args:    q: [..., K] int8, in [-2^(bits-1), 2^(bits-1)-1] (checked for 2 and 4 bits).    bits: 2..8.
    Returns: uint8 [..., packed_length(K, bits)] for 2 and 4 bits; otherwise `q` itself (int8).
    Raises:  QuantError: not int8, unsupported bits, or a code outside the range.
    """
    _check(q, bits, torch.int8, "pack")
    count = _CODES_PER_BYTE.get(bits)
    if count is None:
        return q
    limit = 2 ** (bits - 1)
    if q.numel() and (int(q.min()) < -limit or int(q.max()) >= limit):
        raise QuantError(
            f"packing.pack: codes span [{int(q.min())}, {int(q.max())}], expected [{-limit}, {limit - 1}] for {bits} "
            "bits; quantize with the same width that packs"
        )
    fields = F.pad(q, (0, -q.shape[-1] % count)).view(torch.uint8) & (2**bits - 1)
    fields = fields.unflatten(-1, (-1, count))
    packed = fields[..., 0].clone()
    for i in range(1, count):
        packed |= fields[..., i] << (bits * i)
    return packed


def unpack(p: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`.

    Args:    p: uint8 [..., packed_length(length, bits)] for 2 and 4 bits, else int8 [..., length].
             length: K before packing.
    Returns: int8 [..., length], sign-extended.
    Raises:  QuantError: wrong dtype, unsupported bits, or a last dimension that does not hold `length` codes.
    """
    count = _CODES_PER_BYTE.get(bits)
    _check(p, bits, torch.int8 if count is None else torch.uint8, "unpack")
    if p.shape[-1] != packed_length(length, bits):
        raise QuantError(
            f"packing.unpack: {length} codes of {bits} bits take {packed_length(length, bits)} bytes, got "
            f"{p.shape[-1]}; pass the in_features the tensor was packed from"
        )
    if count is None:
        return p
    shifted = [(p << (8 - bits * (i + 1))).view(torch.int8) >> (8 - bits) for i in range(count)]
    return torch.stack(shifted, dim=-1).flatten(-2)[..., :length].contiguous()


def _check(t: Tensor, bits: int, dtype: torch.dtype, where: str) -> None:
    if bits not in range(2, 9):
        raise QuantError(f"packing.{where}: bits must be an integer in 2..8, got {bits!r}")
    if t.dtype != dtype or t.dim() == 0:
        raise QuantError(f"packing.{where}: expected a {dtype} tensor [..., K], got {t.dtype} {tuple(t.shape)}")
