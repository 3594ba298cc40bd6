"""Packing: round trips, and the byte layout against bytes written out by hand."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import QuantError
from resq_compiler.numerics.packing import pack, packed_length, unpack


def codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (4, 7), (2, 3, 13), (6,), (2, 64), (0, 5)])
def test_round_trip(bits: int, shape: tuple[int, ...]) -> None:
    q = codes(shape, bits)
    p = pack(q, bits)
    assert p.shape == (*shape[:-1], packed_length(shape[-1], bits))
    assert torch.equal(unpack(p, bits, shape[-1]), q)


def test_every_code_of_every_position_survives() -> None:
    for bits in (2, 3, 4):
        grid = torch.cartesian_prod(*[torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)] * 3)
        assert torch.equal(unpack(pack(grid, bits), bits, 3), grid)


@pytest.mark.parametrize("bits", range(2, 8))
def test_codes_follow_each_other_bit_by_bit(bits: int) -> None:
    """Against Python's own integers: the packed bytes, read as one little-endian number."""
    q = codes((13,), bits)
    whole = sum((int(code) % 2**bits) << (bits * i) for i, code in enumerate(q))
    assert bytes(pack(q, bits).tolist()) == whole.to_bytes(packed_length(13, bits), "little")


def test_layout_is_the_one_on_disk() -> None:
    assert pack(torch.tensor([1, -2, 7], dtype=torch.int8), 4).tolist() == [0xE1, 0x07]
    assert pack(torch.tensor([1, -2, 0, -1, -2], dtype=torch.int8), 2).tolist() == [0b11_00_10_01, 0b10]


@pytest.mark.parametrize(
    ("q", "bits", "message"),
    [
        (torch.tensor([8], dtype=torch.int8), 4, "codes span"),
        (torch.tensor([-3], dtype=torch.int8), 2, "codes span"),
        (torch.tensor([1.0]), 4, "int8"),
        (torch.tensor([1], dtype=torch.int8), 9, "2..8"),
    ],
)
def test_pack_refuses(q: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(QuantError, match=message):
        pack(q, bits)


def test_unpack_refuses_a_wrong_length() -> None:
    with pytest.raises(QuantError, match="in_features"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
