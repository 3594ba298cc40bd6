"""The clip that is computed against the clip that is best on normal samples, through the quantizer itself."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.numerics.clip import best_clip
from resq_compiler.numerics.quantized import dequantize, quantize_activation


@pytest.mark.parametrize(("width", "bits"), [(56, 3), (504, 4), (1344, 4), (3584, 4), (14336, 4), (504, 3), (3584, 5)])
def test_no_other_clip_is_clearly_better(width, bits):
    """Samples need not agree on the very best (the minimum is flat), but none may beat it by 1 % in mean square error."""
    x = torch.randn(max(64, 2**19 // width), width, generator=torch.Generator().manual_seed(width + bits))
    errors = {
        clip: float((dequantize(quantize_activation(x, bits, clip=clip)) - x).square().mean())
        for clip in [round(0.3 + 0.01 * i, 2) for i in range(71)]
    }
    assert errors[best_clip(width, bits)] < 1.01 * min(errors.values())


def test_bounds():
    assert best_clip(8, 4) == best_clip(1, 4) == best_clip(10**6, 8) == 1.0
    assert best_clip(14336, 4) < best_clip(1344, 4) < best_clip(504, 4) < 1
