"""Rotary embeddings with two sets of factors, for short and for long texts (LongRoPE, as in Phi-3.5)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def short_length(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which a model uses its short factors; None where it has one set, or keeps the keys of both in one cache.

    One more token and every position has the long factors, so keys that were cached before are of another model. Families that
    name the length at the top of their configuration (Phi-3) compute them again, as transformers does; others go on with them.
    """
    rope_type = (config.get("rope_parameters") or {}).get("rope_type")
    length = config.get("original_max_position_embeddings")
    return int(length) if rope_type == "longrope" and length else None


def forget_long_factors(model: nn.Module) -> None:
    """Drop the frequencies of long texts that rotary embeddings keep beside their buffers once they have computed: they make them again."""
    for module, name in _long_factors(model):
        delattr(module, name)


@contextlib.contextmanager
def long_factors_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards these frequencies are what they were: what a capture leaves there belongs to it."""
    before = {(module, name): getattr(module, name) for module, name in _long_factors(model)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute .*long_inv_freq was assigned during export")
            yield
    finally:
        forget_long_factors(model)
        for (module, name), value in before.items():
            setattr(module, name, value)


def _long_factors(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in model.modules() for name in vars(module) if name.endswith("long_inv_freq")]
