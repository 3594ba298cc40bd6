"""Rotary frequencies that follow the length of the text (rope_type "dynamic": NTK scaling), made a function of the positions."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DYNAMIC = "dynamic"


@contextlib.contextmanager
def rope_of_positions(model: PreTrainedModel) -> Iterator[None]:
    """Inside, dynamic rotary embeddings compute their frequencies from the largest position of every call.

    transformers compares it with the longest call so far, in Python, and keeps what it computed. A model that has seen no longer text
    computes the same.
    """
    changed = [m for m in model.modules() if DYNAMIC in _kinds(m)]
    for module in changed:
        module.forward = types.MethodType(_forward, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _kinds(module: nn.Module) -> tuple[str, ...]:
    """Its kinds of rotary embedding: one, or one for each type of layer."""
    kinds = getattr(module, "rope_type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds.values()) if isinstance(kinds, dict) else ()


def _forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """What the module computes with the frequencies of these positions."""
    prefix, arguments = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    name = f"{prefix}inv_freq"
    before = module._buffers[name]
    if kind == DYNAMIC:
        module._buffers[name] = _frequencies(module, position_ids, prefix, arguments)
    try:
        return inspect.unwrap(type(module).forward)(module, x, position_ids, **arguments)
    finally:
        module._buffers[name] = before


def _frequencies(module: Any, position_ids: Tensor, prefix: str, arguments: dict[str, str]) -> Tensor:
    """Those the module began with up to the length of training, else those of the length."""
    original: Tensor = getattr(module, f"{prefix}original_inv_freq")
    length = position_ids.max() + 1
    scaled, _ = ROPE_INIT_FUNCTIONS[DYNAMIC](module.config, position_ids.device, seq_len=length, **arguments)
    return torch.where(length > module.original_max_seq_len, scaled, original.to(position_ids.device))
