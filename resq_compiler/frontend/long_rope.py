"""Rotary embeddings with two sets of factors, for short and for long texts (LongRoPE, as in Phi-3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def short_length(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which a model uses its short factors; None where it has one set, or keeps the keys of both in one cache.

    One more token and every position has the long factors, so keys that were cached before are of another model. Families that
    name the length at the top of their configuration (Phi-3) compute them again, as transformers does; others go on with them.
    """
    rope_type = (config.get("rope_parameters") or {}).get("rope_type")
    length = config.get("original_max_position_embeddings")
    return int(length) if rope_type == "longrope" and length else None
