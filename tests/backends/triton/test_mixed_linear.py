"""The mixed-precision linear: integers exact, parts, groups, both forms."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.formats import Codes
from resq_compiler.backends.fused.packing import pack_weight
from resq_compiler.backends.triton import mixed_linear as module
from resq_compiler.backends.triton.formats import PaddedRows, PartLayout, pack_rows
from resq_compiler.backends.triton.mixed_linear import mixed_linear

from resq_compiler.errors import BackendError
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear


def _codes(bits, shape, generator):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


def _operands(rows, n, layouts, generator):
    """Packed activations and weight, and their unpacked parts."""
    x = {la.is_low: _codes(la.bits, (rows, la.columns), generator) for la in layouts}
    scale = torch.rand(rows, sum(la.groups for la in layouts), generator=generator) + 0.1
    zero_point = torch.cat([_codes(la.bits, (rows, la.groups), generator) for la in layouts], 1).int()
    parts = [
        (_codes(la.bits, (n, la.columns), generator), torch.rand(n, generator=generator) + 0.1, la) for la in layouts
    ]
    nothing = torch.empty(rows, 0, dtype=torch.int8)
    packed = {la.is_low: pack_rows(x[la.is_low], la) for la in layouts}
    codes = Codes(packed.get(True, nothing), packed.get(False, nothing), scale, zero_point)
    return (codes, pack_weight(PaddedRows(), parts)), x, parts


def _expected(reference, operands, bias=None, residual=None, dtype=torch.float32):
    return reference.mixed_linear(*operands, bias, residual, dtype)


def _by_groups(codes, weight):
    """The formula for several groups, every sum in float64."""
    y, first = 0.0, 0
    for i, part in enumerate(weight.parts):
        rows, columns = (PaddedRows().unpack_rows(t.of(part), part) for t in (codes, weight))
        x, w = (t.unflatten(-1, (part.groups, -1)).double() for t in (rows, columns))
        groups = slice(first, first + part.groups)
        first += part.groups
        centred = (x - codes.zero_point[:, groups, None]) * codes.scale[:, groups, None].double()
        y = y + torch.einsum("mgk,ngk->mn", centred, w) * weight.scale[i].double()
    return y


MIXED = (PartLayout(4, 71), PartLayout(8, 9))
ONE_GROUP = [
    (37, 29, MIXED),
    (1, 64, MIXED),
    (16, 200, (PartLayout(4, 1030),)),
    (130, 17, (PartLayout(8, 301),)),
    (5, 33, (PartLayout(3, 71), PartLayout(6, 40))),
    (33, 130, (PartLayout(4, 504), PartLayout(8, 72))),
]


@pytest.mark.parametrize(("rows", "n", "layouts"), ONE_GROUP)
@pytest.mark.parametrize("extras", [False, True])
def test_bit_exact_against_the_integer_law(rows, n, layouts, extras, generator, reference):
    operands, x, parts = _operands(rows, n, layouts, generator)
    bias = torch.randn(n, generator=generator) if extras else None
    residual = torch.randn(rows, n, generator=generator) if extras else None
    expected = None
    for i, (qdata, weight_scale, layout) in enumerate(parts):
        parameters = (t[:, i : i + 1] for t in (operands[0].scale, operands[0].zero_point))
        xq = QuantizedActivation(x[layout.is_low], *parameters, layout.bits)
        y = integer_linear(xq, qdata, weight_scale)
        expected = y if expected is None else expected + y
    if extras:
        expected = expected + bias + residual
    assert torch.equal(mixed_linear(*operands, bias, residual), expected)
    assert torch.equal(_expected(reference, operands, bias, residual), expected)


def assert_rounded(y, exact):
    """Integer sums of each group are exact; some twenty float32 roundings follow: 2^-24 of the largest sum for each, at most."""
    assert (y - exact).abs().max() <= 20 * 2.0**-24 * exact.abs().max()


@pytest.mark.parametrize(
    ("rows", "groups", "low", "high"), [(33, 9, 56, 8), (5, 9, 56, 8), (3, 4, 13, 3), (20, 3, 224, 32)]
)
def test_one_scale_a_head(rows, groups, low, high, generator):
    layouts = (PartLayout(4, low, groups), PartLayout(8, high, groups))
    operands, _, _ = _operands(rows, 45, layouts, generator)
    assert_rounded(mixed_linear(*operands), _by_groups(*operands))


@pytest.mark.parametrize(("rows", "n", "layouts"), [case for case in ONE_GROUP if case[0] > 16])
def test_expanded_operands_give_the_same(rows, n, layouts, generator, reference, expanded):
    operands, _, _ = _operands(rows, n, layouts, generator)
    assert torch.equal(mixed_linear(*operands), _expected(reference, operands))


@pytest.mark.parametrize(("rows", "groups", "low", "high"), [(33, 9, 56, 8), (20, 3, 224, 32)])
def test_expanded_operands_with_a_scale_a_head(rows, groups, low, high, generator, expanded):
    operands, _, _ = _operands(rows, 45, (PartLayout(4, low, groups), PartLayout(8, high, groups)), generator)
    assert_rounded(mixed_linear(*operands), _by_groups(*operands))


@pytest.mark.parametrize("split", [1, 2, 3, 8])
@pytest.mark.parametrize("groups", [1, 5])
def test_every_split_of_k_gives_the_same(split, groups, generator, monkeypatch, reference):
    layouts = (PartLayout(4, 520, groups), PartLayout(8, 70, groups))
    operands, _, _ = _operands(3, 150, layouts, generator)
    usual = module.decode_tiles
    monkeypatch.setattr(module, "decode_tiles", lambda *a: usual(*a) | dict(SPLIT=split, BLOCK_L=64, BLOCK_H=32))
    first, second = mixed_linear(*operands), mixed_linear(*operands)
    assert torch.equal(first, second)  # the second launch finds the arrival counters reset
    if groups == 1:
        assert torch.equal(first, _expected(reference, operands))
    else:
        assert_rounded(first, _by_groups(*operands))


def test_largest_codes_do_not_overflow():
    layout = PartLayout(4, 60000)
    x, w = torch.full((1, 60000), -8, dtype=torch.int8), torch.full((2, 60000), -8, dtype=torch.int8)
    weight = pack_weight(PaddedRows(), [(w, torch.ones(2), layout)])
    nothing, zero = torch.empty(1, 0, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.int32)
    y = mixed_linear(Codes(pack_rows(x, layout), nothing, torch.ones(1, 1), zero), weight)
    assert y.tolist() == [[60000 * 64.0] * 2]


def test_residual_may_be_a_slice_and_rows_may_be_none(generator, reference):
    operands, _, _ = _operands(20, 24, MIXED, generator)
    wide = torch.randn(20, 60, generator=generator)
    extra = wide[:, 12:36]
    assert torch.equal(mixed_linear(*operands, None, extra), _expected(reference, operands, None, extra))
    assert mixed_linear(Codes(*(t[:0] for t in operands[0])), operands[1]).shape == (0, 24)


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("groups", [1, 3])
def test_padding_of_activations_may_hold_anything(rows, groups, generator):
    """hadamard_quantize does not write it; the weight's padding is zero."""
    layouts = (PartLayout(4, 71, groups), PartLayout(8, 9, groups))
    (codes, weight), _, _ = _operands(rows, 45, layouts, generator)
    expected = mixed_linear(codes, weight)
    codes.low.unflatten(-1, (groups, -1))[..., 36:] = 0x55
    codes.high.unflatten(-1, (groups, -1))[..., 9:] = 0x55
    assert torch.equal(mixed_linear(codes, weight), expected)


def test_float16_output_is_rounded_once(generator, reference):
    operands, _, _ = _operands(20, 24, MIXED, generator)
    assert torch.equal(mixed_linear(*operands, out_dtype=torch.float16), _expected(reference, operands).half())


def test_refusals(generator):
    (codes, weight), _, _ = _operands(4, 24, MIXED, generator)
    with pytest.raises(BackendError, match="expected \\(4, 64\\) contiguous"):
        mixed_linear(codes._replace(low=codes.low[:, :32]), weight)
    with pytest.raises(BackendError, match="the weight has 2 groups"):
        mixed_linear(codes._replace(scale=codes.scale[:, :1]), weight)
