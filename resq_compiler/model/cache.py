"""The cache of a compiled model: transformers' DynamicCache outside, plain tensors in graph order inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import CacheSpec


def opened(cache: Cache | None, specs: Sequence[CacheSpec], input_ids: Tensor) -> tuple[DynamicCache, list[Tensor]]:
    """The cache to fill and its tensors in graph order. A fresh cache of another class is replaced by a plain one: masks do windows.

    Raises BackendError: a cache of another class that holds tokens.
    """
    if isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers):
        plain = cache
    elif cache is None or cache.get_seq_length() == 0:
        plain = DynamicCache()
    else:
        raise BackendError(
            f"past_key_values: expected the DynamicCache that forward returned, got a filled {type(cache).__name__}"
        )
    if plain.get_seq_length() == 0:
        return plain, empty(specs, input_ids)
    return plain, [t for layer in _layers(plain) for t in (layer.keys, layer.values) if t is not None]


def empty(specs: Sequence[CacheSpec], input_ids: Tensor) -> list[Tensor]:
    """Tensors of a cache that holds no tokens yet, float32, for ids [B, S]."""
    shapes = [(len(input_ids), s.num_heads, 0, width) for s in specs for width in (s.key_dim, s.value_dim)]
    return [torch.zeros(shape, dtype=torch.float32, device=input_ids.device) for shape in shapes]


def filled(cache: DynamicCache, present: Sequence[Tensor]) -> DynamicCache:
    """The cache with what the graph returned."""
    while len(cache.layers) < len(present) // 2:
        cache.layers.append(DynamicLayer())
    for layer, key, value in zip(_layers(cache), present[::2], present[1::2], strict=True):
        layer.keys, layer.values = key, value
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
    return cache


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
