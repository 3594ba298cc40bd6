"""Images of codes without zero points are the law's, but for the one place that images.py names."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.builder import GraphBuilder
from resq_compiler.backends.onnx.images import parts_image
from resq_compiler.backends.onnx.session import open_session

from resq_compiler.ir import ops

PARTS = [((4, 0, 56), (8, 56, 64)), ((4, 0, 64),), ((2, 0, 8), (4, 8, 56), (8, 56, 64)), ((3, 0, 30), (6, 30, 64))]


def image(x: np.ndarray, parts) -> np.ndarray:
    """What ONNX Runtime makes of parts_image."""
    builder = GraphBuilder(23)
    builder.input("x", TensorProto.FLOAT, x.shape)
    name = parts_image(SimpleNamespace(b=builder), "x", parts)
    builder.output(name, TensorProto.FLOAT, x.shape)
    session = open_session(builder.model("image", {}, "0").SerializeToString(), threads=1)
    return session.run(None, {"x": x})[0]


def law(x: np.ndarray, parts) -> np.ndarray:
    """The reference backend."""
    turned = torch.from_numpy(x).transpose(1, 2)  # [B, heads, S, D]
    return ops.quantize_dequantize(turned, parts, 1.0).transpose(1, 2).numpy()


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zeros", "outlier", "tiny"])
def test_image_is_the_law(parts, kind):
    random = np.random.default_rng(5)
    x = random.standard_normal((2, 40, 3, 64)).astype(np.float32)
    changed = {
        "positive": np.abs(x) + 1, "negative": -np.abs(x) - 1, "zeros": x * 0, "outlier": x * np.where(np.arange(64) == 7, 1000, 1),
        "tiny": x * 1e-20,
    }.get(kind, x).astype(np.float32)  # fmt: skip
    assert np.array_equal(image(changed, parts), law(changed, parts))


def test_range_symmetric_to_the_last_bit_gains_one_step():
    """hi = -lo: both ends round up, and the law's clamp would take the top one back."""
    x = np.linspace(-7.5, 7.5, 64, dtype=np.float32)[None, None, None]
    parts = ((4, 0, 64),)
    off = image(x, parts) != law(x, parts)
    assert off.sum() == 1 and x[off] == 7.5
    assert image(x, parts)[off] == 8 and law(x, parts)[off] == 7  # the scale is 1
