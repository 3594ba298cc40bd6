"""The kernels of attention on torch tensors: append to the packed cache, and attend over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import CodePart, RowParts, address, check_operand, codes_out
from resq_compiler.backends.cpu.library import (
    MAX_ENTRY,
    MAX_HEAD,
    AttentionArgs,
    CacheImageArgs,
    CodesOut,
    Head,
    Library,
    RopeCacheArgs,
)
from torch import Tensor

from resq_compiler.errors import BackendError


@dataclass(frozen=True)
class LayerCache:
    """Packed keys and values of one layer, written in place.

    keys, values: uint8 [B, G, capacity, row bytes of the head].    start: int32 [B], tokens of each sequence that are there.
    """

    keys: Tensor
    values: Tensor
    key_head: CachedHead
    value_head: CachedHead
    start: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def check(self, kernel: str, batch: int, new: int) -> None:
        """Raise BackendError unless the tensors fit each other and `new` more tokens of `batch` sequences have room."""
        g = self.keys.shape[1]
        for name, tensor, head in (("keys", self.keys, self.key_head), ("values", self.values, self.value_head)):
            check_operand(kernel, name, tensor, torch.uint8, (batch, g, self.capacity, head.row_bytes))
            if not 1 <= head.columns <= MAX_HEAD:
                raise BackendError(f"{kernel}: {head.columns} columns a head; expected 1 to {MAX_HEAD}")
        check_operand(kernel, "start", self.start, torch.int32, (batch,))
        longest = int(self.start.max()) + new if batch else 0
        if longest > self.capacity or (batch and int(self.start.min()) < 0):
            raise BackendError(
                f"{kernel}: {new} tokens behind {self.start.tolist()} need room for {longest}, the cache has {self.capacity}"
            )


def empty_cache(batch: int, heads: int, capacity: int, key_head: CachedHead, value_head: CachedHead) -> LayerCache:
    """A cache without tokens."""
    keys, values = (
        torch.zeros(batch, heads, capacity, head.row_bytes, dtype=torch.uint8) for head in (key_head, value_head)
    )
    return LayerCache(keys, values, key_head, value_head, torch.zeros(batch, dtype=torch.int32))


def head_of(head: CachedHead) -> Head:
    return Head(head.low, head.high, head.low_bits, head.high_bits)


def rope_cache(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: LayerCache,
    basis: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    clip: float = 1.0,
    threads: int = 1,
) -> Tensor:
    """Normalize and rotate queries and keys, and append keys and values to `cache` (formula in resq_kernels.h); start stays as it is.

    Args:    q: float32 [B, S, H, D]; k, v: [B, S, G, ...]; heads and columns contiguous, tokens may be strided (slices of a stacked
             product).    rotary: (cos, sin) float32 [B or 1, S, R].    basis: [D, D] or [G, D, D].
    Returns: queries float32 [B, S, H, D].
    Raises:  BackendError: operands that do not fit each other, or a cache without room.
    """
    batch, new, heads, d = q.shape
    g = k.shape[2]
    cache.check("rope_cache", batch, new)
    strides = (
        _token_stride("q", q, (batch, new, heads, cache.key_head.columns)),
        _token_stride("k", k, (batch, new, cache.keys.shape[1], d)),
        _token_stride("v", v, (batch, new, g, cache.value_head.columns)),
    )
    if heads % g:
        raise BackendError(f"rope_cache: {heads} query heads for {g} key heads; expected a multiple")
    shared = basis is None or basis.dim() == 2
    check_operand("rope_cache", "basis", basis, torch.float32, (d, d) if shared else (g, d, d))
    check_operand("rope_cache", "q_norm", q_norm, torch.float32, (d,))
    check_operand("rope_cache", "k_norm", k_norm, torch.float32, (d,))
    cos, sin, width, batch_stride = _rotary(rotary, batch, new, d)
    out = torch.empty(batch, new, heads, d)
    arguments = RopeCacheArgs(
        batch, new, heads, g, address(q), address(k), address(v), *strides, cos, sin, width, batch_stride,
        address(basis), 1 if shared else g, address(q_norm), address(k_norm), eps, clip, head_of(cache.key_head), head_of(cache.value_head),
        address(cache.keys), address(cache.values), cache.capacity, address(cache.start), address(out),
    )  # fmt: skip
    library.run("rope_cache", arguments, threads)
    return out


def _token_stride(name: str, x: Tensor, shape: tuple[int, ...]) -> int:
    """Floats from token to token of [B, S, heads, columns]. Raises BackendError: a token is not contiguous, or tokens are not evenly
    spaced through all sequences."""
    stride = x.stride(0) if x.shape[1] == 1 else x.stride(1)
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * stride
    if x.dtype != torch.float32 or tuple(x.shape) != shape or x.stride()[2:] != (shape[3], 1) or not even:
        raise BackendError(
            f"rope_cache: {name} is {x.dtype} {tuple(x.shape)}, strides {x.stride()}; expected float32 {shape}, tokens evenly spaced"
        )
    return stride


def _rotary(
    rotary: tuple[Tensor, Tensor] | None, batch: int, new: int, d: int
) -> tuple[int | None, int | None, int, int]:
    """Addresses of cos and sin, their width, and floats from batch to batch."""
    if rotary is None:
        return None, None, 0, 0
    cos, sin = rotary
    width, shared = cos.shape[-1], cos.shape[0] == 1
    for name, table in (("cos", cos), ("sin", sin)):
        check_operand("rope_cache", name, table, torch.float32, (1 if shared else batch, new, width))
    if width % 2 or width > d:
        raise BackendError(f"rope_cache: cos has {width} columns; expected an even number, at most {d}")
    return address(cos), address(sin), width, 0 if shared else new * width


def cache_image(
    library: Library, x: Tensor, cache: Tensor, head: CachedHead, start: Tensor, total: int, clip: float = 1.0, threads: int = 1
) -> Tensor:  # fmt: skip
    """Write new tokens into a cache and read all of it as floats (formula in resq_kernels.h).

    Args:    x: float32 [B, G, S, columns].    cache: uint8 [B, G, capacity, row bytes].    start: int32 [B].
             total: tokens to read, at least start + S.
    Returns: float32 [B, G, total, columns].
    Raises:  BackendError: operands that do not fit each other.
    """
    batch, heads, new, columns = x.shape
    capacity = cache.shape[2]
    check_operand("cache_image", "x", x, torch.float32, (batch, heads, new, head.columns))
    check_operand("cache_image", "cache", cache, torch.uint8, (batch, heads, capacity, head.row_bytes))
    check_operand("cache_image", "start", start, torch.int32, (batch,))
    longest = int(start.max()) + new if batch else 0
    if not longest <= total <= capacity or not 1 <= columns <= MAX_ENTRY:
        raise BackendError(
            f"cache_image: {new} tokens of {columns} columns behind {start.tolist()}, read up to {total}; the cache has room for "
            f"{capacity}, and rows have at most {MAX_ENTRY} columns"
        )
    out = torch.empty(batch, heads, total, columns)
    arguments = CacheImageArgs(
        batch, heads, new, total, address(x), head_of(head), clip, address(cache), capacity, address(start), address(out)
    )  # fmt: skip
    library.run("cache_image", arguments, threads)
    return out


def attention(
    library: Library,
    q: Tensor,
    cache: LayerCache,
    scale: float,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    parts: Sequence[CodePart] | None = None,
    threads: int = 1,
    prefix: tuple[Tensor, Tensor] | None = None,
    slopes: Tensor | None = None,
) -> Tensor | RowParts:
    """Attention of S new tokens, which `rope_cache` has appended behind cache.start (formula in resq_kernels.h).

    Args:    q: float32 [B, S, H, D].    mask: bool or uint8 [B, slots], 0 = padding; slots at least start + S.
             window: 0 = all.    softcap: 0 = none.    sinks: float32 [H].    parts: None, or what every head's result becomes:
             parts of its columns, a run for each of the H heads.
             prefix: keys [G, P, D] and values [G, P, value columns], float32, that every query sees besides.
             slopes: float32 [H]; slopes[h] * (slot of the key - slot of the query) is added to scores.
    Returns: float32 [B, S, H, value columns], or codes of B * S rows.
    Raises:  BackendError: operands that do not fit each other.
    """
    batch, new, heads, _ = q.shape
    cache.check("attention", batch, new)
    check_operand("attention", "q", q, torch.float32, (batch, new, heads, cache.key_head.columns))
    check_operand("attention", "sinks", sinks, torch.float32, (heads,))
    check_operand("attention", "slopes", slopes, torch.float32, (heads,))
    seen = None if mask is None else mask.to(torch.uint8).contiguous()
    if seen is not None and (seen.dim() != 2 or seen.shape[0] != batch or seen.shape[1] < int(cache.start.max()) + new):
        raise BackendError(
            f"attention: mask {tuple(seen.shape)}; expected [{batch}, at least {int(cache.start.max()) + new}]"
        )
    g = cache.keys.shape[1]
    if heads % g:
        raise BackendError(f"attention: {heads} query heads for {g} key heads; expected a multiple")
    result: Tensor | RowParts
    if parts is None:
        result, codes = torch.empty(batch, new, heads, cache.value_head.columns), CodesOut(0)
    else:
        _check_parts(parts, heads, cache.value_head)
        result, codes = codes_out("attention", library, batch * new, parts)
    arguments = AttentionArgs(
        batch, new, heads, g, address(q), head_of(cache.key_head), head_of(cache.value_head), address(cache.keys),
        address(cache.values), cache.capacity, address(cache.start), address(seen), 0 if seen is None else seen.shape[1], scale,
        softcap, window, address(sinks), address(slopes), *_prefix(prefix, cache), None,
        address(result) if isinstance(result, Tensor) else None, codes,
    )  # fmt: skip
    scratch = torch.zeros(library.attention_scratch(arguments), dtype=torch.uint8)
    arguments.scratch = address(scratch) if scratch.numel() else None
    library.run("attention", arguments, threads)
    return result


def _prefix(prefix: tuple[Tensor, Tensor] | None, cache: LayerCache) -> tuple[int, int | None, int | None]:
    """Number of prefix tokens, and addresses of their keys and values."""
    if prefix is None:
        return 0, None, None
    g, count = cache.keys.shape[1], prefix[0].shape[1]
    for name, tensor, head in (("keys", prefix[0], cache.key_head), ("values", prefix[1], cache.value_head)):
        check_operand("attention", f"prefix {name}", tensor, torch.float32, (g, count, head.columns))
    return count, address(prefix[0]), address(prefix[1])


def _check_parts(parts: Sequence[CodePart], heads: int, values: CachedHead) -> None:
    got = [(p.width, p.groups) for p in parts]
    if sum(p.width for p in parts) != values.columns or any(p.groups != heads for p in parts):
        raise BackendError(
            f"attention: output parts {got} (width, groups); expected {values.columns} columns in all and {heads} groups"
        )
