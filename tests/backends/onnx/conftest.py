"""Helpers of the ONNX tests: graphs of tiny compiled models and what ONNX Runtime makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resq_compiler.frontend.capture import concrete_example

pytest.importorskip("onnx", reason="the ONNX backend needs onnx")
pytest.importorskip("onnxruntime", reason="the ONNX backend needs onnxruntime")

PAST = 7


def input_names(compiled) -> list[str]:
    names = ["input_ids", "attention_mask", "position_ids"]
    return names + [
        f"past_key_values.{i}.{kind}" for i in range(len(compiled.cache_specs)) for kind in ("key", "value")
    ]


def example(compiled, past=PAST, new=5):
    """Left-padded inputs as tensors in graph order, and the same by ONNX name."""
    tensors = concrete_example(compiled.config.get_text_config().vocab_size, compiled.cache_specs, new=new, past=past)
    return tensors, {name: t.numpy() for name, t in zip(input_names(compiled), tensors, strict=True)}


@torch.no_grad()
def reference(compiled, tensors) -> list[np.ndarray]:
    """What the reference backend computes."""
    return [t.numpy() for t in compiled.graph_module(*tensors)]


def visible(tensors) -> np.ndarray:
    """bool [B, S]: new tokens that are not padding."""
    return tensors[1][:, -tensors[0].shape[1] :].bool().numpy()


def relative(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
