"""The cache of a compiled model: transformers' Cache outside, plain tensors in graph order inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import CacheSpec


class GrowingLayer(DynamicLayer):
    """A layer of a cache that holds every token; masks do sliding windows. `reset` empties it, as it does in a static cache."""

    def reset(self) -> None:
        super().__init__()


def opened(cache: Cache | None, specs: Sequence[CacheSpec], input_ids: Tensor) -> tuple[Cache, list[Tensor]]:
    """The cache to fill and its tensors in graph order; none given, a new one.

    A cache that holds nothing yet is used whatever its class: `filled` gives it growing layers, so that the caller's object goes on.
    Raises BackendError: no cache, one of another class that holds tokens, or one of another model or batch.
    """
    if cache is None:
        return DynamicCache(), empty(specs, input_ids)
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise BackendError(f"past_key_values: expected a cache of one decoder; got {type(cache).__name__}")
    if cache.get_seq_length() == 0:
        return cache, empty(specs, input_ids)
    past = [t for layer in cache.layers if type(layer) in (DynamicLayer, GrowingLayer) for t in _entry(layer)]
    if len(past) != 2 * len(cache.layers):
        raise BackendError(
            f"past_key_values: expected the cache that forward returned, got a filled {type(cache).__name__}"
        )
    expected = [(len(input_ids), s.num_heads) for s in specs for _ in range(2)]
    if [t.shape[:2] for t in past] != expected or len({t.shape[2] for t in past}) != 1:
        raise BackendError(
            f"past_key_values: expected {len(specs)} layers with {specs[0].num_heads} heads for a batch of {len(input_ids)}; got "
            f"{len(cache.layers)} layers, the first {list(past[0].shape)} [batch, heads, tokens, width]: it is of another model or batch"
        )
    return cache, past


def empty(specs: Sequence[CacheSpec], input_ids: Tensor) -> list[Tensor]:
    """Tensors of a cache that holds no tokens yet, float32, for ids [B, S]."""
    shapes = [(len(input_ids), s.num_heads, 0, width) for s in specs for width in (s.key_dim, s.value_dim)]
    return [torch.zeros(shape, dtype=torch.float32, device=input_ids.device) for shape in shapes]


def filled(cache: Cache, present: Sequence[Tensor]) -> Cache:
    """The cache with what the graph returned."""
    layers = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    if len(layers) != len(present) // 2 or len(cache.layers) != len(layers):
        layers = [GrowingLayer() for _ in range(len(present) // 2)]
        cache.layers = list(layers)
    for layer, key, value in zip(layers, present[::2], present[1::2], strict=True):
        layer.keys, layer.values = key, value
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    return cache


def _entry(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values
