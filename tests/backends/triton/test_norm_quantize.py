"""Norm + split + quantization: codes equal to the integer law."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.kernels import Norm
from resq_compiler.backends.triton.formats import PartLayout, unpack_rows
from resq_compiler.backends.triton.norm_quantize import norm_quantize

from resq_compiler.errors import BackendError
from resq_compiler.numerics.quantized import quantize_activation

CASES = [
    ("rms", (PartLayout(4, 504), PartLayout(8, 72)), True, False),
    ("rms", (PartLayout(8, 41),), False, False),
    ("layer", (PartLayout(4, 71), PartLayout(8, 9)), True, True),
    ("none", (PartLayout(4, 71), PartLayout(8, 9)), False, False),
    ("none", (PartLayout(4, 57),), False, False),
    ("none", (PartLayout(4, 14, 3), PartLayout(8, 2, 3)), False, False),
    ("none", (PartLayout(3, 13, 3), PartLayout(6, 3, 3)), False, False),
    ("rms", (PartLayout(4, 126, 4), PartLayout(8, 72)), True, False),
    ("layer", (PartLayout(4, 27, 3), PartLayout(8, 9)), True, True),
    ("rms", (PartLayout(4, 33, 2),), False, False),
]


@pytest.mark.parametrize(
    ("norm", "layouts", "has_weight", "has_bias"), CASES, ids=lambda v: v if isinstance(v, str) else None
)
@pytest.mark.parametrize("clip", [(1.0, 1.0), (0.9, 1.0), (0.9, 0.8)])
def test_equals_the_reference(norm, layouts, has_weight, has_bias, clip, generator, kernels, reference):
    k = sum(layout.columns for layout in layouts)
    # integers: their squares add exactly in float32, so the order of a reduction cannot move a code
    x = torch.randint(-40, 41, (5, k), generator=generator).float()
    weight = torch.rand(k, generator=generator) + 0.5 if has_weight else None
    bias = torch.randn(k, generator=generator) if has_bias else None
    arguments = (x, layouts, Norm(norm, weight, bias, 1e-5), clip[: len(layouts)])
    ours, expected = kernels.norm_quantize(*arguments), reference.norm_quantize(*arguments)
    assert torch.equal(ours.low, expected.low) and torch.equal(ours.high, expected.high)  # padding bytes included
    # LayerNorm's mean is rounded in another order: one unit in the last place, and again in the inverse root
    torch.testing.assert_close(ours.scale, expected.scale, rtol=3e-7, atol=0)
    assert torch.equal(ours.zero_point, expected.zero_point)


def test_without_a_norm_it_is_the_integer_law(generator):
    x = torch.randn(7, 80, generator=generator)
    low, high, scale, zero_point = norm_quantize(x, (PartLayout(4, 70), PartLayout(8, 10)))
    for i, (rows, part, layout) in enumerate(
        ((low, x[:, :70], PartLayout(4, 70)), (high, x[:, 70:], PartLayout(8, 10)))
    ):
        law = quantize_activation(part, layout.bits)
        assert torch.equal(unpack_rows(rows, layout), law.qdata)
        assert torch.equal(scale[:, i], law.scale[:, 0]) and torch.equal(zero_point[:, i], law.zero_point[:, 0])


def test_extreme_rows(generator, kernels, reference):
    x = torch.randn(4, 40, generator=generator)
    x[0] = 0.0
    x[1] *= 1e30
    x[2] = x[2].abs() * 1e-40  # subnormal
    layouts = (PartLayout(4, 40),)
    arguments = (x, layouts, Norm(), (1.0,))
    for got, expected in zip(kernels.norm_quantize(*arguments), reference.norm_quantize(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_strided_rows_and_no_rows(generator, kernels, reference):
    wide = torch.randn(6, 100, generator=generator)
    layouts = (PartLayout(4, 30), PartLayout(8, 10))
    arguments = (wide[:, 20:60], layouts, Norm(), (1.0, 1.0))
    pairs = zip(kernels.norm_quantize(*arguments), reference.norm_quantize(*arguments), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert norm_quantize(wide[:0, :40], layouts)[0].shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_computed_in_float32(dtype, generator):
    x = torch.randn(3, 80, generator=generator).to(dtype)
    layouts = (PartLayout(4, 71), PartLayout(8, 9))
    for got, expected in zip(norm_quantize(x, layouts), norm_quantize(x.float(), layouts), strict=True):
        assert torch.equal(got, expected)


def test_refusals():
    x = torch.zeros(2, 40)
    with pytest.raises(BackendError, match="cannot cover 40 columns"):
        norm_quantize(x, (PartLayout(4, 30),))
    with pytest.raises(BackendError, match="cannot cover 40 columns"):
        norm_quantize(x, (PartLayout(8, 20), PartLayout(4, 20)))
    with pytest.raises(BackendError, match="strides"):
        norm_quantize(torch.zeros(40, 2).T, (PartLayout(4, 40),))
