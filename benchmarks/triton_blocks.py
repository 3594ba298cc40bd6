"""A decoder block on the Triton kernels, and the same block in float16 PyTorch: what `triton_kernels.py` times and counts.

Operands are made once, where `shapes.allocated_on` says: on the meta device to compile ahead of time and to count, on a GPU to time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from resq_compiler.backends.fused.formats import Codes
from resq_compiler.backends.fused.kernels import Norm, Rotation, Scores
from resq_compiler.backends.triton import shapes
from resq_compiler.backends.triton.attention import attention_quantize
from resq_compiler.backends.triton.hadamard_quantize import hadamard_quantize
from resq_compiler.backends.triton.mixed_linear import mixed_linear
from resq_compiler.backends.triton.norm_quantize import norm_quantize
from resq_compiler.backends.triton.rope_cache import rope_cache
from resq_compiler.backends.triton.shapes import BlockShape, meta, meta_cache, meta_weight
from torch import Tensor, nn


def _codes(results: tuple[Tensor | None, ...]) -> Codes:
    """What a kernel wrote, an absent part as an empty tensor."""
    low, high, scale, zero_point = results
    assert scale is not None and zero_point is not None
    nothing = scale.new_empty(scale.shape[0], 0, dtype=torch.int8)
    return Codes(nothing if low is None else low, nothing if high is None else high, scale, zero_point)


class KernelBlock:
    """Nine launches: the block of a Llama-like model as the triton backend runs it, `tokens` new of `total` in the cache."""

    def __init__(self, shape: BlockShape, tokens: int, total: int):
        self.shape, self.tokens, self.total = shape, tokens, total
        d, parts = shape.head_dim, shape.parts()
        self.x = meta(tokens, shape.hidden, random=True)
        self.angles, self.u = meta(1, tokens, d, dtype=torch.float32), meta(1, d, d)
        self.mask = torch.ones_like(meta(1, total, dtype=torch.bool))
        self.cache = meta_cache(shape, 1, total, total - tokens)
        self.qkv_weight, self.gate_up_weight = meta_weight(shape.qkv_features, parts), meta_weight(2 * shape.ffn, parts)
        self.o_weight, self.down_weight = (
            meta_weight(shape.hidden, shape.head_parts()),
            meta_weight(shape.hidden, shape.down_parts()),
        )

    def norm(self, x: Tensor) -> Codes:
        return _codes(norm_quantize(x, self.shape.parts(), Norm("rms")))

    def qkv(self, codes: Codes) -> Tensor:
        return mixed_linear(codes, self.qkv_weight, out_dtype=self.x.dtype)

    def rope(self, qkv: Tensor) -> Tensor:
        heads = qkv.view(1, self.tokens, -1, self.shape.head_dim)
        q, k, v = heads.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], dim=2)
        return rope_cache(q, k, v, Rotation(self.angles, self.angles, self.u), self.cache)

    def attend(self, q: Tensor) -> Codes:
        scores = Scores(self.mask, self.shape.head_dim**-0.5)
        return _codes(attention_quantize(q, self.cache, scores, self.shape.head_parts(), 1.0))

    def o(self, codes: Codes) -> Tensor:
        return mixed_linear(codes, self.o_weight, residual=self.x, out_dtype=self.x.dtype)

    def gate_up(self, codes: Codes) -> Tensor:
        return mixed_linear(codes, self.gate_up_weight, out_dtype=self.x.dtype)

    def hadamard(self, gate_up: Tensor) -> Codes:
        gate, up = gate_up.split(self.shape.ffn, -1)
        codes, scale, zero_point = hadamard_quantize(gate, up, self.shape.down_parts()[0])
        return _codes((codes, None, scale, zero_point))

    def down(self, codes: Codes) -> Tensor:
        return mixed_linear(codes, self.down_weight, residual=self.x, out_dtype=self.x.dtype)

    def steps(self) -> list[tuple[str, Callable[[], object]]]:
        """(name, call) of every launch in order, each on what the one before it gives."""
        made: list[tuple[str, Callable[[], object]]] = []

        def then(name: str, function: Callable, *inputs) -> object:
            made.append((name, lambda: function(*inputs)))
            return function(*inputs)

        qkv = then("q/k/v", self.qkv, then("norm+quantize", self.norm, self.x))
        x = then("o+residual", self.o, then("attention+quantize", self.attend, then("rope+U+append", self.rope, qkv)))
        gate_up = then("gate/up", self.gate_up, then("norm+quantize", self.norm, x))
        then("down+residual", self.down, then("act*up+H+quantize", self.hadamard, gate_up))
        return made

    def __call__(self) -> Tensor:
        """The whole block."""
        x = self.o(self.attend(self.rope(self.qkv(self.norm(self.x)))))
        return self.down(self.hadamard(self.gate_up(self.norm(x))))


class Float16Block(nn.Module):
    """The same block in PyTorch: fused q/k/v and gate/up, scaled_dot_product_attention, a cache that is written in place."""

    def __init__(self, shape: BlockShape, tokens: int, total: int, dtype: torch.dtype = torch.float16):
        super().__init__()
        self.shape, self.tokens, self.total, d = shape, tokens, total, shape.head_dim
        make = lambda *sizes: nn.Buffer(meta(*sizes, dtype=dtype, random=True))  # noqa: E731
        self.x, self.norms = make(1, tokens, shape.hidden), make(2, shape.hidden)
        self.qkv_weight, self.o_weight = (
            make(shape.qkv_features, shape.hidden),
            make(shape.hidden, shape.attention_features),
        )
        self.gate_up_weight, self.down_weight = make(2 * shape.ffn, shape.hidden), make(shape.hidden, shape.ffn)
        self.cos, self.sin = make(1, 1, tokens, d), make(1, 1, tokens, d)
        self.keys, self.values = make(1, shape.kv_heads, total, d), make(1, shape.kv_heads, total, d)
        self.eps = 1e-6

    def forward(self) -> Tensor:
        """Output [1, tokens, hidden]; keys and values of the new tokens enter the cache."""
        x = self.x + F.linear(
            self._attention(F.rms_norm(self.x, self.x.shape[-1:], self.norms[0], self.eps)), self.o_weight
        )
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.norms[1], self.eps), self.gate_up_weight).split(
            self.shape.ffn, -1
        )
        return x + F.linear(F.silu(gate) * up, self.down_weight)

    def _attention(self, x: Tensor) -> Tensor:
        shape, first = self.shape, self.total - self.tokens
        heads = F.linear(x, self.qkv_weight).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)
        q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        self.keys[:, :, first:], self.values[:, :, first:] = self._rotate(k), v
        causal = self.tokens > 1 and first == 0  # one token sees everything
        if self.tokens > 1 and first:
            raise NotImplementedError("a prefill behind a cache is not one of the cases")
        y = F.scaled_dot_product_attention(self._rotate(q), self.keys, self.values, is_causal=causal, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)

    def _rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin


def on_device(kind: Callable, shape: BlockShape, tokens: int, total: int, device: str) -> Callable[[], Tensor]:
    """A block with its operands on a device."""
    with shapes.allocated_on(device):
        return kind(shape, tokens, total)
