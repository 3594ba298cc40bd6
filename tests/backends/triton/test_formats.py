"""Byte layouts: nibble order, padding, round trips, agreement with the disk format."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from resq_compiler.backends.triton import device
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, PartLayout, pack_rows, unpack_rows

from resq_compiler.numerics.packing import pack


def test_even_column_is_the_low_nibble_and_rows_are_zero_padded():
    row = pack_rows(torch.tensor([[1, -2, 7]], dtype=torch.int8), PartLayout(4, 3))
    assert row.shape == (1, 32)
    assert row[0, :2].view(torch.uint8).tolist() == [0xE1, 0x07]
    assert not row[0, 2:].any()


@pytest.mark.parametrize(
    ("bits", "width", "groups"), [(4, 504, 1), (8, 72, 1), (4, 71, 1), (3, 13, 3), (4, 56, 9), (6, 9, 4), (2, 5, 1)]
)
def test_rows_round_trip(bits, width, groups, generator):
    layout = PartLayout(bits, width, groups)
    codes = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (5, width * groups), generator=generator, dtype=torch.int8
    )
    rows = pack_rows(codes, layout)
    assert rows.shape == (5, layout.row_bytes) and layout.stride % 16 == 0
    assert torch.equal(unpack_rows(rows, layout), codes)


@pytest.mark.parametrize(("width", "stride"), [(504, 256), (3584, 1792), (1022, 512), (3136, 1600), (1, 32)])
def test_stride_of_one_group(width, stride):
    assert PartLayout(4, width).stride == stride


def test_bytes_of_a_cached_token():
    layout = HeadLayout(112, 16)
    assert (layout.low_bytes, layout.high_bytes, layout.head_dim) == (56, 16, 128)
    assert layout.page_bytes == PAGE * 82  # against 256 bytes a token in float16


def _execute(ptx: str, word: int) -> int:
    """What straight-line PTX of shl and and leaves in $0 for the word $1."""
    registers = {"$1": word}
    operations = {"shl.b32": lambda a, b: a << b & 0xFFFFFFFF, "and.b32": lambda a, b: a & b}
    for statement in filter(None, (s.strip() for s in ptx.strip("{} ").split(";"))):
        name, _, operands = statement.partition(" ")
        if name != ".reg":
            target, a, b = (o.strip() for o in operands.split(","))
            registers[target] = operations[name](registers[a], registers[b] if b in registers else int(b, 0))
    return registers["$0"]


@pytest.mark.parametrize(
    ("function", "column"), [(device.even_columns, 0), (device.odd_columns, 1)], ids=["even", "odd"]
)
def test_the_assembly_of_unpacking_is_sixteen_times_the_nibble(function, column, generator):
    """On NVIDIA, four bytes at a time; nothing leaks from one byte into the next."""
    (ptx,) = re.findall(r'"((?:\{ |and)[^"]*)"', inspect.getsource(function.fn))
    codes = torch.cat([torch.arange(-8, 8), torch.randint(-8, 8, (1008,), generator=generator)]).to(torch.int8)
    words = pack(codes, 4).numpy().view("<u4")
    unpacked = torch.tensor([_execute(ptx, int(word)) for word in words], dtype=torch.int64)
    columns = torch.from_numpy(unpacked.numpy().astype("<u4").view("i1"))
    assert torch.equal(columns, codes[column::2] * 16)
