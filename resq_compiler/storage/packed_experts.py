"""Codes of experts that have bits of their own, in a file: rows of each packed at its width, one expert behind the other, as bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resq_compiler.errors import CheckpointError
from resq_compiler.ir.promises import Stored
from resq_compiler.numerics import packing


def stops(bits: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Where the bytes of each expert end; shape [E, N, K] of all codes. Raises CheckpointError: not so many experts."""
    experts, *rows, width = shape
    if experts != len(bits):
        raise CheckpointError(f"codes {list(shape)} with bits of {len(bits)} experts; the file is damaged")
    return list(itertools.accumulate(math.prod(rows) * packing.packed_length(width, b) for b in bits))


def pack(codes: Tensor, bits: Sequence[int]) -> Tensor:
    """uint8 [bytes] of codes int8 [E, N, K]."""
    packed = [packing.pack(mine.contiguous(), b) for mine, b in zip(codes, bits, strict=True)]
    return torch.cat([one.view(torch.uint8).flatten() for one in packed])


def promise(packed: Tensor, bits: Sequence[int], shape: Sequence[int]) -> Stored:
    """The codes int8 [E, N, K] of what `pack` made; experts are unpacked when they are asked for."""
    ends, (_, rows, width) = stops(bits, shape), shape
    starts = [0, *ends]

    def one(expert: int) -> Tensor:
        lying = packed[starts[expert] : ends[expert]].view(rows, -1)
        return packing.unpack(lying.view(torch.int8) if bits[expert] == 8 else lying, bits[expert], width)

    return Stored(shape, torch.int8, lambda start, stop: torch.stack([one(i) for i in range(start, stop)]), packed)
