"""Operands on the meta device for model shapes, to compile kernels ahead of time and to count their bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from resq_compiler.backends.fused.formats import Codes, PackedWeight
from resq_compiler.backends.fused.kernels import LayerCache
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, PartLayout
from torch import Tensor


@dataclass(frozen=True)
class BlockShape:
    """A decoder block: widths, and the share of columns at 8 bits (1/8)."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def parts(self) -> tuple[PartLayout, ...]:
        """The input of q/k/v and gate/up: 7/8 of the columns at 4 bits, the rest at 8."""
        return PartLayout(4, self.hidden * 7 // 8), PartLayout(8, self.hidden // 8)

    def head_parts(self) -> tuple[PartLayout, ...]:
        """The input of o: the same split in every head, a scale for each."""
        return PartLayout(4, self.head_dim * 7 // 8, self.heads), PartLayout(8, self.head_dim // 8, self.heads)

    def down_parts(self) -> tuple[PartLayout, ...]:
        """The input of down, behind the Hadamard transform: all at 4 bits."""
        return (PartLayout(4, self.ffn),)

    def cache(self) -> HeadLayout:
        return HeadLayout(self.head_dim * 7 // 8, self.head_dim // 8)

    @property
    def qkv_features(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_features(self) -> int:
        return self.heads * self.head_dim


SMOLLM2_135M = BlockShape("smollm2-135m", 576, 9, 3, 64, 1536)
LLAMA3_8B = BlockShape("llama-3-8b", 4096, 32, 8, 128, 14336)
GEMMA2_2B = BlockShape("gemma-2-2b", 2304, 8, 4, 256, 9216)  # the widest heads


_DEVICES = ["meta"]
_FLOATS = [torch.float16]


@contextlib.contextmanager
def allocated_on(device: str) -> Iterator[None]:
    """Within it, `meta` makes zeros on a device: the same calls can be compiled ahead of time and timed."""
    _DEVICES.append(device)
    try:
        yield
    finally:
        _DEVICES.pop()


@contextlib.contextmanager
def floats_of(dtype: torch.dtype) -> Iterator[None]:
    """Within it, `meta` makes tensors of this dtype where the caller names none: what a model's floats are (else float16)."""
    _FLOATS.append(dtype)
    try:
        yield
    finally:
        _FLOATS.pop()


def meta(*shape: int, dtype: torch.dtype | None = None, random: bool = False) -> Tensor:
    """An unallocated tensor; where `allocated_on` allocates, zeros, or `random` codes or small floats: power depends on data."""
    device, dtype = _DEVICES[-1], dtype or _FLOATS[-1]
    if not random or device == "meta":
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype, device=device, generator=generator)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).mul(0.02).to(dtype)


def meta_weight(features: int, layouts: tuple[PartLayout, ...]) -> PackedWeight:
    """A packed weight of `features` stacked outputs, unallocated or random."""
    rows = {la.is_low: meta(features, la.row_bytes, dtype=torch.int8, random=True) for la in layouts}
    scale = meta(len(layouts), features, dtype=torch.float32, random=True)
    sums = meta(sum(la.groups for la in layouts), features, dtype=torch.int32)
    nothing = meta(features, 0, dtype=torch.int8)
    return PackedWeight(rows.get(True, nothing), rows.get(False, nothing), scale, sums, layouts)


def meta_activation(rows: int, layouts: tuple[PartLayout, ...]) -> Codes:
    """Unallocated packed activations."""
    codes = {la.is_low: meta(rows, la.row_bytes, dtype=torch.int8) for la in layouts}
    groups = sum(la.groups for la in layouts)
    scale = meta(rows, groups, dtype=torch.float32)
    low, high = (codes.get(is_low, meta(rows, 0, dtype=torch.int8)) for is_low in (True, False))
    return Codes(low, high, scale, meta(rows, groups, dtype=torch.int32))


def meta_cache(shape: BlockShape, batch: int, tokens: int, before: int = 0) -> LayerCache:
    """Unallocated cache of one layer with room for `tokens`, `before` of them there."""
    pages = -(-tokens // PAGE)
    keys, values = (meta(batch * pages, shape.kv_heads, shape.cache().page_bytes, dtype=torch.int8) for _ in range(2))
    table = torch.arange(batch * pages, dtype=torch.int32, device=keys.device).view(batch, pages)
    start = torch.full((batch,), before, dtype=torch.int32, device=keys.device)
    return LayerCache(keys, values, table, start, shape.cache(), shape.cache())
