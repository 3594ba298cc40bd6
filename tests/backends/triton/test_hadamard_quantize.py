"""Gate x up + Hadamard + quantization."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.triton.formats import PartLayout, unpack_rows
from resq_compiler.backends.triton.hadamard_quantize import hadamard_quantize, why_not_fused

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import hadamard_matrix
from resq_compiler.numerics.quantized import quantize_activation


@pytest.mark.parametrize("n", [1, 4, 16, 256, 1024, 4096])
def test_bit_exact_where_arithmetic_is_exact(n, generator, kernels, reference):
    """Integers, and sqrt(n) a power of two: every sum is exact, so codes must not differ anywhere."""
    gate, up = (torch.randint(-6, 7, (3, n), generator=generator).float() for _ in range(2))
    layout = PartLayout(4, n)
    arguments = (gate, up, (layout,), "none", False, (1.0,))
    ours, expected = kernels.hadamard_quantize(*arguments), reference.hadamard_quantize(*arguments)
    assert torch.equal(unpack_rows(ours.low, layout), unpack_rows(expected.low, layout))
    law = quantize_activation(((gate * up).double() @ hadamard_matrix(n) / n**0.5).float(), 4)
    assert torch.equal(unpack_rows(ours.low, layout), law.qdata)
    assert torch.equal(ours.scale, law.scale) and torch.equal(ours.zero_point, law.zero_point)


@pytest.mark.parametrize(("n", "groups"), [(64, 2), (256, 2), (1024, 8), (4096, 32), (4096, 1)])
@pytest.mark.parametrize("bits", [4, 6])
def test_groups_of_columns(n, groups, bits, generator, kernels, reference):
    """Exact arithmetic again: a scale for every group of the transformed row, in the order of its columns."""
    gate, up = (torch.randint(-6, 7, (3, n), generator=generator).float() for _ in range(2))
    layout = PartLayout(bits, n // groups, groups)
    arguments = (gate, up, (layout,), "none", False, (0.9,))
    ours, expected = kernels.hadamard_quantize(*arguments), reference.hadamard_quantize(*arguments)
    law = quantize_activation(
        ((gate * up).double() @ hadamard_matrix(n) / n**0.5).float().unflatten(-1, (groups, -1)), bits, clip=0.9
    )
    assert torch.equal(unpack_rows(ours.of(layout), layout), law.qdata.flatten(-2))
    assert torch.equal(ours.scale, law.scale[..., 0]) and torch.equal(ours.zero_point, law.zero_point[..., 0])
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, expected, strict=True))  # padding bytes included


@pytest.mark.parametrize(("n", "groups"), [(96, 3), (1344, 12), (8960, 70)])
def test_groups_of_rows_with_padded_factors(n, groups, generator, kernels, reference):
    gate, up = torch.randn(2, 3, n, generator=generator)
    layout = PartLayout(4, n // groups, groups)
    arguments = (gate, up, (layout,), "silu", False, (1.0,))
    ours, expected = kernels.hadamard_quantize(*arguments), reference.hadamard_quantize(*arguments)
    torch.testing.assert_close(ours.scale, expected.scale, rtol=3e-6, atol=0)  # sums in another order
    difference = (unpack_rows(ours.low, layout).int() - unpack_rows(expected.low, layout).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.mark.parametrize("n", [12, 96, 160, 1536, 4864, 8960, 14336])
@pytest.mark.parametrize(
    ("activation", "gated", "bits"), [("silu", True, 4), ("gelu_tanh", False, 8), ("gelu", True, 3)]
)
def test_any_width(n, activation, gated, bits, generator, kernels, reference):
    stacked = torch.randn(3, 2 * n, generator=generator)
    gate, up = stacked[:, :n], stacked[:, n:] if gated else None
    layout = PartLayout(bits, n)
    arguments = (gate, up, (layout,), activation, False, (1.0,))
    ours, expected = kernels.hadamard_quantize(*arguments), reference.hadamard_quantize(*arguments)
    # sums of up to 14336 terms in another order, and erf / exp of another library
    torch.testing.assert_close(ours.scale, expected.scale, rtol=3e-6, atol=0)
    assert torch.equal(ours.zero_point, expected.zero_point)
    difference = (unpack_rows(ours.of(layout), layout).int() - unpack_rows(expected.of(layout), layout).int()).abs()
    # a value within 1e-6 of a rounding boundary may fall on the other side: one step, rarely
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_transpose_is_the_inverse(generator):
    x = torch.randn(2, 1536, generator=generator)
    layout = PartLayout(8, 1536)
    y = x.double() @ hadamard_matrix(1536) / 1536**0.5
    codes, scale, zero_point = hadamard_quantize(y.float(), None, layout, "none", transpose=True)
    back = (unpack_rows(codes, layout) - zero_point) * scale
    assert (back - x).abs().max() <= scale.max() * 0.501  # half a step, and float32 rounding


def test_float16_slices_and_no_rows(generator):
    stacked = torch.randn(4, 400, generator=generator).half()
    layout = PartLayout(4, 192)
    ours = hadamard_quantize(stacked[:, 8:200], stacked[:, 200:392], layout)
    expected = hadamard_quantize(stacked[:, 8:200].float(), stacked[:, 200:392].float(), layout)
    assert torch.equal(unpack_rows(ours[0], layout), unpack_rows(expected[0], layout))
    assert all(torch.equal(a, b) for a, b in zip(ours[1:], expected[1:], strict=True))
    nothing = hadamard_quantize(stacked[:0, :192], None, layout)
    assert nothing[0].shape == (0, 96) and nothing[1].shape == (0, 1)


def test_huge_and_zero_rows_stay_finite(reference):
    gate = torch.zeros(2, 192)
    gate[1] = 1e20
    codes, scale, zero_point = hadamard_quantize(gate, None, PartLayout(4, 192), "none")
    expected = reference.hadamard_quantize(gate, None, (PartLayout(4, 192),), "none", False, (1.0,))
    torch.testing.assert_close(scale, expected.scale, rtol=3e-6, atol=0)  # as above
    assert torch.equal(unpack_rows(codes, PartLayout(4, 192))[0], torch.full((192,), -8, dtype=torch.int8))
    assert zero_point[0] == -8


def test_refusals():
    assert why_not_fused(14336) is None
    assert "block diagonal" in why_not_fused(46)
    assert "pad to 32768" in why_not_fused(28672)
    assert "factor of order 172" in why_not_fused(11008)
    with pytest.raises(BackendError, match="28672 columns pad to 32768"):
        hadamard_quantize(torch.zeros(1, 28672), None, PartLayout(4, 28672))
