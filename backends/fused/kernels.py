"""What a provider of kernels implements: one method for each fused operator, on operands packed as its target says.

B sequences of S new tokens, H query heads and G key/value heads of D columns. Leading dimensions of activations are kept. Integers are
those of numerics/quantized.py bit for bit; between them arithmetic is float32 (or wider), rounded once to the type of a float result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from resq_compiler.backends.fused.experts import Between, PackedExperts, Routing
from resq_compiler.backends.fused.formats import Codes, HeadParts, InputPart, PackedWeight
from torch import Tensor

from resq_compiler.errors import BackendError

NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")
EXPERT_ACTIVATIONS = (*ACTIVATIONS, "clamped")
"""clamped: g * sigmoid(slope * g) of g = min(gate, limit), times 1 + up, up being clamped to [-limit, limit] (gpt-oss)."""


@dataclass(frozen=True)
class Norm:
    """kind "none", "rms": x / sqrt(mean(x^2) + eps) * weight, or "layer": (x - mean) / sqrt(var + eps) * weight + bias; [K] each."""

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of a layer. table: where blocks are, for targets that have them. start [B] int32: tokens before the new ones."""

    keys: Tensor
    values: Tensor
    table: Tensor | None
    start: Tensor
    key_parts: HeadParts
    value_parts: HeadParts


@dataclass(frozen=True)
class Rotation:
    """What happens to queries and keys: norm per head (weights [D]), rotary embedding cos, sin [B or 1, S, R], basis u [1 or G, D, D]."""

    cos: Tensor
    sin: Tensor
    u: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Scores are scale * q . k, then softcap * tanh(scores / softcap); a query sees its last `window` keys where mask [B, T] is True.

    slopes [H]: slope * (slot of the key - slot of the query) is added. sinks [H]: one more score of each head, which has no value.
    prefix: keys and values [1, G, P, D] that every query sees besides. Targets say which of the three they take.
    """

    mask: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    prefix: tuple[Tensor, Tensor] | None = None
    slopes: Tensor | None = None


class Kernels(ABC):
    """The fused operators of a target."""

    @abstractmethod
    def norm_quantize(self, x: Tensor, parts: tuple[InputPart, ...], norm: Norm, clips: tuple[float, ...]) -> Codes:
        """x [..., K], normalized, its columns cut into parts and each quantized per token (and group). clips: of each part."""

    @abstractmethod
    def mixed_linear(
        self, x: Codes, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """[..., N] of dtype: the integer products of all parts, scaled and added; then bias [N], then residual [..., N]."""

    @abstractmethod
    def hadamard_quantize(
        self, gate: Tensor, up: Tensor | None, parts: tuple[InputPart, ...], activation: str, transpose: bool,
        clips: tuple[float, ...],
    ) -> Codes:  # fmt: skip
        """activation(gate) * up, [..., n]; the columns of each part times a Hadamard matrix of their own, and quantized per token."""

    @abstractmethod
    def rope_cache(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, cache: LayerCache, clip: float) -> Tensor:
        """q [B, S, H * D] -> [B, S, H, D], normalized, rotated and times u; k likewise, and v as it is, quantized into the cache."""

    def cache_image(
        self, x: Tensor, cache: Tensor, table: Tensor | None, start: Tensor, total: int, parts: HeadParts, clip: float
    ) -> Tensor:
        """x [B, G, S, D] quantized into a cache; the float image of its first `total` tokens, [B, G, total, D].

        Raises: BackendError: the target has no such kernel, nor a `why_not_entry`.
        """
        raise BackendError(
            f"{type(self).__name__}: no kernel reads cached vectors as floats; use the backends reference or cpu"
        )

    def latent_attention(
        self, q: Tensor, vectors: Tensor, rotary: Tensor, cache: LayerCache, mask: Tensor, weight: PackedWeight, own: int, scale: float,
        clip: float,
    ) -> Tensor:  # fmt: skip
        """vectors [B, 1, S, r] and rotary [B, 1, S, R] quantized into a cache, whose values are vectors c and keys rotary columns;
        then attention over keys [W_k c | rotary] and values W_v c: q [B, H, S, own + R] -> [B, S, H, value columns]. weight: the keys of
        all heads, `own` rows each, and below them their values; what is multiplied are the codes that are cached. A query that sees
        nothing gives 0.

        Raises: BackendError: the target has no such kernel, nor a `why_not_entry`.
        """
        raise BackendError(f"{type(self).__name__}: no kernel of latent attention; use the backends reference or cpu")

    @abstractmethod
    def attention(self, q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
        """softmax(scores) v over the cache, which holds the new tokens: q [B, S, H, D] -> the same. A query that sees nothing gives 0."""

    @abstractmethod
    def attention_quantize(
        self, q: Tensor, cache: LayerCache, scores: Scores, parts: tuple[InputPart, ...], clip: float
    ) -> Codes:
        """The same, quantized per token and head in parts of its columns: [low of all heads | high of all heads]. Only targets with
        `any_parts` are asked for others than the values' own."""

    @abstractmethod
    def experts(
        self, x: Codes, routing: Routing, gate_up: PackedExperts, down: PackedExperts, between: Between, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        """[..., N] of dtype: the formula in `experts`, x [...] with a row for each token."""
