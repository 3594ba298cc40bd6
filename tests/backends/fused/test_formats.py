"""Parts, packed weights and what no tensor holds."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.formats import HeadParts, InputPart, head_parts, input_parts
from resq_compiler.backends.fused.packing import pack_weight

from resq_compiler.errors import QuantError


def _codes(bits, shape, generator):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


def test_parts_of_flat_lists():
    parts = input_parts([4, 8], [4, 8], [504, 72], [1])
    assert input_parts([4, 8], [4, 8], [36, 72], [14, 1]) == (InputPart(4, 36, 14), InputPart(8, 72))
    assert parts == (InputPart(4, 504), InputPart(8, 72)) and [part.is_low for part in parts] == [True, False]
    assert InputPart(3, 13, 4).columns == 52
    assert (
        InputPart(8, 504).weight_bits == 8
        and InputPart(8, 504, weight_bits=4).is_low
        and not InputPart(4, 9, 1, 8).is_low
    )


def test_parts_of_a_cached_head():
    parts = head_parts(((4, 0, 112), (8, 112, 128)))
    assert parts == HeadParts(112, 16) and parts.head_dim == 128
    assert HeadParts(*parts.attribute) == parts and parts.spans == ((4, 0, 112), (8, 112, 128))
    assert head_parts(((6, 0, 16),)) == HeadParts(0, 16, 4, 6)
    with pytest.raises(QuantError, match=r"cache parts \(\(2, 0, 4\), \(4, 4, 16\)\)"):
        head_parts(((2, 0, 4), (4, 4, 16)))


@pytest.mark.parametrize("part", [InputPart(4, 71), InputPart(8, 9), InputPart(3, 13, 3), InputPart(6, 9, 4)], ids=str)
def test_codes_round_trip(part, target, generator):
    codes = _codes(part.bits, (5, part.columns), generator)
    rows = target.codes.pack_rows(codes, part)
    assert rows.shape == (5, target.codes.row_bytes(part)) and rows.dtype == torch.int8
    assert torch.equal(target.codes.unpack_rows(rows, part), codes)
    weight = target.codes.pack_weight(codes, part)
    assert torch.equal(target.codes.unpack_weight(weight, part, 1, 4), codes[1:4])


def test_a_packed_weight(target, generator):
    parts = (InputPart(4, 6, 2), InputPart(8, 3, 2))
    codes = [_codes(part.bits, (7, part.columns), generator) for part in parts]
    weight = pack_weight(target.codes, [(q, torch.ones(7), part) for q, part in zip(codes, parts, strict=True)])
    low = [] if target.codes.is_centred(parts[0]) else [codes[0][:, :6], codes[0][:, 6:]]
    sums = [q.sum(1) for q in (*low, codes[1][:, :3], codes[1][:, 3:])]
    assert torch.equal(weight.row_sum, torch.stack(sums).int())
    assert weight.out_features == 7 and weight.parts == parts
    for part, q in zip(parts, codes, strict=True):
        assert torch.equal(target.codes.unpack_weight(weight.of(part), part, 0, 7), q)


def test_two_parts_of_one_tensor_are_refused(target):
    q, s = torch.zeros(2, 4, dtype=torch.int8), torch.ones(2)
    with pytest.raises(QuantError, match=r"parts of \[2, 4\] bits"):
        pack_weight(target.codes, [(q, s, InputPart(2, 4)), (q, s, InputPart(4, 4))])
