"""Latent attention on torch tensors: append to the packed cache, and attend over vectors that keys and values are made from."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import torch
from resq_compiler.backends.cpu.attention import head_of
from resq_compiler.backends.cpu.formats import TILE, CachedHead
from resq_compiler.backends.cpu.kernels import (
    CodePart,
    LinearWeight,
    RowParts,
    address,
    check_operand,
    codes_out,
    mixed_linear,
)
from resq_compiler.backends.cpu.library import (
    MAX_ENTRY,
    MAX_HEAD,
    MAX_PARTS,
    CacheCodesArgs,
    CodesOut,
    LatentAttentionArgs,
    Library,
    LinearPart,
    Part,
)
from torch import Tensor

from resq_compiler.errors import BackendError


@dataclass(frozen=True)
class Entry:
    """One of the two cached rows of a token, written in place.

    rows: uint8 [B, 1, capacity, row bytes].    new: float32 [B, 1, S, columns] of the new tokens.
    """

    rows: Tensor
    new: Tensor
    head: CachedHead

    def cut(self, widths: tuple[int, ...]) -> list[CodePart]:
        """Parts of so many columns, each within one of the head's."""
        starts = itertools.accumulate(widths[:-1], initial=0)
        bits = (self.head.low_bits if start < self.head.low else self.head.high_bits for start in starts)
        return [CodePart(b, width) for b, width in zip(bits, widths, strict=True)]

    def check(self, name: str, batch: int, tokens: int, capacity: int, most: int) -> None:
        """Raise BackendError unless the tensors fit each other and the kernel."""
        check_operand("latent_attention", f"new {name}", self.new, torch.float32, (batch, 1, tokens, self.head.columns))
        check_operand(
            "latent_attention", f"cached {name}", self.rows, torch.uint8, (batch, 1, capacity, self.head.row_bytes)
        )
        if not 1 <= self.head.columns <= most:
            raise BackendError(f"latent_attention: {self.head.columns} columns of {name}; expected 1 to {most}")


@dataclass(frozen=True)
class Expansion:
    """What makes the keys of all heads, `own` columns each, and then their values, from a vector. widths: of the parts of the weight."""

    weight: LinearWeight
    widths: tuple[int, ...]
    heads: int
    own: int

    @property
    def values(self) -> int:
        return self.weight.channels // self.heads - self.own

    def check(self, library: Library, columns: int) -> None:
        """Raise BackendError unless its tensors fit vectors of so many columns, and the kernel."""
        weight, parts = self.weight, len(self.widths)
        fits = weight.channels == self.heads * (self.own + self.values) and sum(self.widths) == columns
        if not fits or not 0 < self.own <= MAX_HEAD or not 0 < self.values <= MAX_HEAD or parts > MAX_PARTS:
            raise BackendError(
                f"latent_attention: {weight.channels} channels of {self.heads} heads with keys of {self.own} columns, parts {self.widths}; "
                f"expected at most {MAX_PARTS} parts, of {columns} columns in all, and keys and values of 1 to {MAX_HEAD} columns"
            )
        tiles = -(-weight.channels // TILE)
        for tensor, width, bits in zip(weight.tiles, self.widths, weight.bits, strict=True):
            check_operand(
                "latent_attention", "weight", tensor, torch.uint8, (tiles, library.tile_bytes(width, 1, bits))
            )
        check_operand("latent_attention", "weight scale", weight.scale, torch.float32, (parts, weight.channels))


def cache_codes(
    library: Library, entry: Entry, start: Tensor, total: int, clip: float, widths: tuple[int, ...] = (), threads: int = 1
) -> RowParts | None:  # fmt: skip
    """Append new rows; with widths the codes of all `total` rows, in parts of so many columns (formula in resq_kernels.h)."""
    batch, heads, new, _ = entry.new.shape
    made, out = None, CodesOut(0)
    if widths:
        made, out = codes_out("cache_codes", library, batch * heads * total, entry.cut(widths))
    arguments = CacheCodesArgs(
        batch, heads, new, total, address(entry.new), head_of(entry.head), clip, address(entry.rows), entry.rows.shape[2],
        address(start), out,
    )  # fmt: skip
    library.run("cache_codes", arguments, threads)
    return made


def latent_attention(
    library: Library, q: Tensor, vectors: Entry, rotary: Entry, start: Tensor, mask: Tensor, expansion: Expansion, scale: float,
    clip: float = 1.0, threads: int = 1, expand: bool | None = None,
) -> Tensor:  # fmt: skip
    """Append S new tokens and attend to all that are there (formula in resq_kernels.h).

    Args:    q: float32 [B, H, S, own + rotary columns].    start: int32 [B].    mask: bool [B, slots], slots at least start + S.
             expand: make keys and values of all tokens first; None: where that is less work.
    Returns: float32 [B, S, H, value columns].
    Raises:  BackendError: operands that do not fit each other.
    """
    batch, heads, new, _ = q.shape
    capacity, total = vectors.rows.shape[2], int(start.max()) + new
    expansion.check(library, vectors.head.columns)
    shape = (batch, expansion.heads, new, expansion.own + rotary.head.columns)
    check_operand("latent_attention", "q", q, torch.float32, shape)
    vectors.check("vectors", batch, new, capacity, MAX_ENTRY)
    rotary.check("rotary columns", batch, new, capacity, MAX_HEAD)
    check_operand("latent_attention", "start", start, torch.int32, (batch,))
    seen = mask.to(torch.uint8).contiguous()
    if seen.dim() != 2 or seen.shape[0] != batch or not total <= min(seen.shape[1], capacity):
        raise BackendError(
            f"latent_attention: mask {tuple(seen.shape)}, room for {capacity} tokens; expected [{batch}, at least {total}] and room"
        )
    out = torch.empty(batch, new, heads, expansion.values)
    arguments = LatentAttentionArgs(
        batch, new, heads, expansion.own, expansion.values, address(q), head_of(vectors.head), head_of(rotary.head),
        address(vectors.rows), address(rotary.rows), capacity, address(start), address(seen), seen.shape[1], scale,
        len(expansion.widths), _parts(expansion), address(expansion.weight.scale), None, total, address(out),
    )  # fmt: skip
    expands = library.latent_expands(arguments) if expand is None else expand
    cache_codes(library, rotary, start, total, clip, threads=threads)
    codes = cache_codes(library, vectors, start, total, clip, expansion.widths if expands else (), threads)
    made = None if codes is None else mixed_linear(library, codes, expansion.weight, threads=threads)
    arguments.expanded = address(made)
    library.run("latent_attention", arguments, threads)
    return out


def _parts(expansion: Expansion) -> ctypes.Array[LinearPart]:
    parts = (LinearPart * MAX_PARTS)()
    for i, (width, bits) in enumerate(zip(expansion.widths, expansion.weight.bits, strict=True)):
        parts[i] = LinearPart(Part(width, 1, 8, 1.0), bits, None, address(expansion.weight.tiles[i]))
    return parts
