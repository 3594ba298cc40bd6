"""The mixed-precision linear: integers exact, parts, groups, both forms."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.triton import mixed_linear as module
from resq_compiler.backends.triton.formats import PartLayout, pack_rows, pack_weight
from resq_compiler.backends.triton.mixed_linear import mixed_linear, mixed_linear_ref

from resq_compiler.errors import BackendError
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear


def _codes(bits, shape, generator):
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


def _operands(rows, n, layouts, generator):
    """Packed activations and weight, and their unpacked parts."""
    x = {la.packed: _codes(la.bits, (rows, la.columns), generator) for la in layouts}
    scale = torch.rand(rows, sum(la.groups for la in layouts), generator=generator) + 0.1
    zero_point = torch.cat([_codes(la.bits, (rows, la.groups), generator) for la in layouts], 1).int()
    parts = [
        (_codes(la.bits, (n, la.columns), generator), torch.rand(n, generator=generator) + 0.1, la) for la in layouts
    ]
    packed = {la.packed: pack_rows(x[la.packed], la) for la in layouts}
    return (packed.get(True), packed.get(False), scale, zero_point, pack_weight(parts)), x, parts


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
def test_bit_exact_against_the_integer_law(rows, n, layouts, extras, generator):
    operands, x, parts = _operands(rows, n, layouts, generator)
    bias = torch.randn(n, generator=generator) if extras else None
    residual = torch.randn(rows, n, generator=generator) if extras else None
    expected = None
    for i, (qdata, weight_scale, layout) in enumerate(parts):
        xq = QuantizedActivation(x[layout.packed], operands[2][:, i : i + 1], operands[3][:, i : i + 1], layout.bits)
        y = integer_linear(xq, qdata, weight_scale)
        expected = y if expected is None else expected + y
    if extras:
        expected = expected + bias + residual
    assert torch.equal(mixed_linear(*operands, bias, residual), expected)
    assert torch.equal(mixed_linear_ref(*operands, bias, residual), expected)


@pytest.mark.parametrize(
    ("rows", "groups", "low", "high"), [(33, 9, 56, 8), (5, 9, 56, 8), (3, 4, 13, 3), (20, 3, 224, 32)]
)
def test_one_scale_a_head(rows, groups, low, high, generator):
    layouts = (PartLayout(4, low, groups), PartLayout(8, high, groups))
    operands, _, _ = _operands(rows, 45, layouts, generator)
    # float32 sums over the groups in another order: relative 1e-6 of the terms
    torch.testing.assert_close(mixed_linear(*operands), mixed_linear_ref(*operands), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("split", [1, 2, 3, 8])
@pytest.mark.parametrize("groups", [1, 5])
def test_every_split_of_k_gives_the_same(split, groups, generator, monkeypatch):
    layouts = (PartLayout(4, 520, groups), PartLayout(8, 70, groups))
    operands, _, _ = _operands(3, 150, layouts, generator)
    usual = module.decode_tiles
    monkeypatch.setattr(module, "decode_tiles", lambda *a: usual(*a) | dict(SPLIT=split, BLOCK_L=64, BLOCK_H=32))
    expected = mixed_linear_ref(*operands)
    for _ in range(2):  # the second launch finds the arrival counters reset
        y = mixed_linear(*operands)
        if groups == 1:
            assert torch.equal(y, expected)
        else:  # as above
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-1)


def test_largest_codes_do_not_overflow():
    layout = PartLayout(4, 60000)
    x, w = torch.full((1, 60000), -8, dtype=torch.int8), torch.full((2, 60000), -8, dtype=torch.int8)
    weight = pack_weight([(w, torch.ones(2), layout)])
    y = mixed_linear(pack_rows(x, layout), None, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), weight)
    assert y.tolist() == [[60000 * 64.0] * 2]


def test_residual_may_be_a_slice_and_rows_may_be_none(generator):
    operands, _, _ = _operands(20, 24, MIXED, generator)
    wide = torch.randn(20, 60, generator=generator)
    assert torch.equal(mixed_linear(*operands, None, wide[:, 12:36]), mixed_linear_ref(*operands, None, wide[:, 12:36]))
    nothing = [t[:0] if isinstance(t, torch.Tensor) else t for t in operands]
    assert mixed_linear(*nothing).shape == (0, 24)


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("groups", [1, 3])
def test_padding_of_activations_may_hold_anything(rows, groups, generator):
    """hadamard_quantize does not write it; the weight's padding is zero."""
    layouts = (PartLayout(4, 71, groups), PartLayout(8, 9, groups))
    (low, high, *rest), _, _ = _operands(rows, 45, layouts, generator)
    expected = mixed_linear(low, high, *rest)
    low.unflatten(-1, (groups, -1))[..., 36:] = 0x55
    high.unflatten(-1, (groups, -1))[..., 9:] = 0x55
    assert torch.equal(mixed_linear(low, high, *rest), expected)


def test_float16_output_is_rounded_once(generator):
    operands, _, _ = _operands(20, 24, MIXED, generator)
    assert torch.equal(mixed_linear(*operands, out_dtype=torch.float16), mixed_linear_ref(*operands).half())


def test_refusals(generator):
    operands, _, _ = _operands(4, 24, MIXED, generator)
    with pytest.raises(BackendError, match="expected \\(4, 64\\) contiguous"):
        mixed_linear(operands[0][:, :32], *operands[1:])
    with pytest.raises(BackendError, match="the weight has 2 groups"):
        mixed_linear(*operands[:2], operands[2][:, :1], *operands[3:])
