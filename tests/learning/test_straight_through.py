"""Forward the integer law to the bit, backward the identity where nothing is cut off."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.learning import straight_through as ste
from resq_compiler.numerics.quantized import (
    FLT_MIN,
    QuantSpec,
    dequantize,
    quantize_activation,
    quantize_dequantize,
    quantize_static,
)
from resq_compiler.numerics.weights import QuantizedWeight, part_scale, round_to_codes


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_images_are_those_of_the_law(bits, groups, clip):
    x = draw(3, 5, 24)
    assert torch.equal(ste.image(x, bits, groups, clip), dequantize(quantize_activation(x, bits, groups, clip)))


def test_images_of_the_cache_and_of_static_scales():
    x, parts = draw(2, 3, 5, 16), ((4, 0, 14), (8, 14, 16))
    assert torch.equal(ste.cache_image(x, parts, 0.9), quantize_dequantize(x, parts, 0.9))
    scale, zero = torch.tensor([0.2, 0.4]), torch.tensor([-1, 2], dtype=torch.int32)
    assert torch.equal(ste.static_image(x, 4, scale, zero), dequantize(quantize_static(x, 4, scale, zero)))


@pytest.mark.parametrize("group_size", [None, 32])
def test_images_of_weights(group_size):
    w = draw(6, 70)
    scale = part_scale(w, 4, group_size)
    codes = QuantizedWeight(round_to_codes(w, scale, 4, group_size), scale, 4, group_size)
    assert torch.equal(ste.weight_image(w, scale, 4, group_size), codes.dequantize())


def test_gradients():
    """Of x the identity, but for what a clip cuts off; of a scale the rounding error, as LSQ has it; of a clip the cut, not zero."""
    x = draw(1, 64).requires_grad_()
    ste.image(x, 8).sum().backward()
    inner = torch.ones(64, dtype=torch.bool)
    inner[[int(x.argmax()), int(x.argmin())]] = False
    torch.testing.assert_close(
        x.grad[0, inner], torch.ones(62), rtol=0, atol=0.05
    )  # the range moves with two values alone
    w, scale = draw(2, 5), torch.tensor([0.3, 0.5], requires_grad=True)
    ste.weight_image(w, scale, 4).sum().backward()
    expected = (w / scale.detach()[:, None]).round().sub(w / scale.detach()[:, None]).sum(1)
    torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-5)
    clip = torch.tensor(0.8, requires_grad=True)
    ste.image(draw(4, 64), 4, 1, clip).square().sum().backward()
    assert float(clip.grad) > 0  # a wider range keeps more energy


def composed_image(x, bits, groups, clip):
    """The law in operators that torch differentiates."""
    spec, grouped = QuantSpec(bits, symmetric=False), x.unflatten(-1, (groups, -1))
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0) * clip, grouped.amax(-1, keepdim=True).clamp(min=0) * clip
    scale = ((high - low) / spec.levels).clamp(min=FLT_MIN)
    zero_point = ste.rounded(-low / scale) + spec.qmin
    codes = (ste.rounded(grouped / scale) + zero_point).clamp(spec.qmin, spec.qmax)
    return ((codes - zero_point) * scale).flatten(-2)


@pytest.mark.parametrize("shift", [0.0, 10.0], ids=["both signs", "one sign"])
@pytest.mark.parametrize("bits, groups, clip", [(2, 1, 0.6), (4, 1, 1.0), (4, 3, 0.8), (8, 1, 0.9)])
def test_gradients_are_those_of_the_law_in_single_operators(bits, groups, clip, shift):
    """Of values and of the clip; rows of zeros have no range and give no gradient but their own."""
    x, weights = draw(4, 5, 24) + shift, torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    found = []
    for image in (composed_image, ste.image):
        value, share = x.clone().requires_grad_(), torch.tensor(clip, requires_grad=True)
        (image(value, bits, groups, share) * weights).sum().backward()
        found.append((value.grad, share.grad))
    (expected, of_clip), (got, got_clip) = found
    expected[0, 0] = weights[
        0, 0
    ]  # products with the smallest scale are denormal, and lost where a processor is told to flush them
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got_clip, of_clip, rtol=1e-3, atol=1e-2)
