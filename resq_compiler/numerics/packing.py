"""Packing of small signed codes into bytes, in memory and on disk.

Along the last dimension (in_features) codes of b bits, two's complement, follow each other from the lowest bit of the first byte on,
eight of them in b bytes; the tail is padded with zeros. So 4-bit codes lie two per byte, even index in the low nibble, and 2-bit codes
four per byte. 8-bit codes stay int8.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.errors import QuantError


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits take: ceil(length * bits / 8)."""
    return -(-length * bits // 8)


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack int8 codes along the last dimension.

    Args:    q: [..., K] int8, in [-2^(bits-1), 2^(bits-1)-1].    bits: 2..8.
    Returns: uint8 [..., packed_length(K, bits)]; at 8 bits `q` itself (int8).
    Raises:  QuantError: not int8, unsupported bits, or a code outside the range.
    """
    _check(q, bits, torch.int8, "pack")
    if bits == 8:
        return q
    limit = 2 ** (bits - 1)
    if q.numel() and (int(q.min()) < -limit or int(q.max()) >= limit):
        raise QuantError(
            f"packing.pack: codes span [{int(q.min())}, {int(q.max())}], expected [{-limit}, {limit - 1}] for {bits} "
            "bits; quantize with the same width that packs"
        )
    count, size = _unit(bits)
    fields = F.pad(q, (0, -q.shape[-1] % count)).view(torch.uint8) & (2**bits - 1)
    if size == 1:
        packed = _combine(fields, count, bits)
    else:
        word = _combine(fields.long(), count, bits)
        packed = torch.stack([(word >> (8 * i)) & 255 for i in range(size)], dim=-1).to(torch.uint8).flatten(-2)
    return packed[..., : packed_length(q.shape[-1], bits)].contiguous()


def unpack(p: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack`.

    Args:    p: uint8 [..., packed_length(length, bits)]; at 8 bits int8 [..., length].
             length: K before packing.
    Returns: int8 [..., length], sign-extended.
    Raises:  QuantError: wrong dtype, unsupported bits, or a last dimension that does not hold `length` codes.
    """
    _check(p, bits, torch.int8 if bits == 8 else torch.uint8, "unpack")
    if p.shape[-1] != packed_length(length, bits):
        raise QuantError(
            f"packing.unpack: {length} codes of {bits} bits take {packed_length(length, bits)} bytes, got "
            f"{p.shape[-1]}; pass the in_features the tensor was packed from"
        )
    if bits == 8:
        return p
    count, size = _unit(bits)
    word = p
    if size > 1:
        bytes_ = F.pad(p, (0, -p.shape[-1] % size)).long().unflatten(-1, (-1, size))
        word = (bytes_ << torch.arange(0, 8 * size, 8, device=p.device)).sum(-1)
    shifted = [
        ((word >> (bits * i)).to(torch.uint8) << (8 - bits)).view(torch.int8) >> (8 - bits) for i in range(count)
    ]
    return torch.stack(shifted, dim=-1).flatten(-2)[..., :length].contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and how many bytes."""
    size = bits // math.gcd(bits, 8)
    return size * 8 // bits, size


def _combine(fields: Tensor, count: int, bits: int) -> Tensor:
    """Every `count` fields as one number, the first in its lowest bits."""
    grouped = fields.unflatten(-1, (-1, count))
    number = grouped[..., 0].clone()
    for i in range(1, count):
        number |= grouped[..., i] << (bits * i)
    return number


def _check(t: Tensor, bits: int, dtype: torch.dtype, where: str) -> None:
    if bits not in range(2, 9):
        raise QuantError(f"packing.{where}: bits must be an integer in 2..8, got {bits!r}")
    if t.dtype != dtype or t.dim() == 0:
        raise QuantError(f"packing.{where}: expected a {dtype} tensor [..., K], got {t.dtype} {tuple(t.shape)}")
