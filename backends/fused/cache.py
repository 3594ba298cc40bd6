"""A packed key/value cache in the shape that transformers' DynamicCache expects, and its growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from resq_compiler.backends.fused.formats import CacheFormat, HeadParts
from torch import Tensor

from resq_compiler.errors import BackendError


class CacheTensor(Tensor):
    """Keys or values of one layer, standing for [B, H, T, D] but holding the codes of a target's cache format.

    `shape[2]` is the number of cached tokens; the last dimension is a placeholder of 1, since no float image exists (0 would make
    transformers take the cache for empty). Appending writes into `packed`; a tensor that another one has outgrown (the prefix of a
    continued cache) is copied before it is continued again, so caches behave as values.
    Selecting sequences (beam search) and cropping (assisted decoding) work; other tensor functions see zeros.
    """

    packed: Tensor
    written: list[int]
    cache_format: CacheFormat

    @staticmethod
    def of(
        packed: Tensor, shape: Sequence[int], cache_format: CacheFormat, written: list[int] | None = None
    ) -> CacheTensor:
        """A view of the first tokens of `packed`; shape (B, H, tokens). `written` is shared by all views of the same tensor."""
        batch, heads, length = shape
        shell = torch.zeros(1, device=packed.device).expand(batch, heads, length, 1)
        handle = torch.Tensor._make_subclass(CacheTensor, shell)
        handle.packed, handle.cache_format = packed, cache_format
        handle.written = [length] if written is None else written
        return handle

    @property
    def capacity(self) -> int:
        """Tokens that each sequence has room for."""
        return self.cache_format.capacity(self.packed, self.shape[0])

    def appended(self, count: int) -> CacheTensor:
        """Room for `count` more tokens, to be written by a kernel: the same memory if it has it, else a grown copy."""
        batch, heads, length, _ = self.shape
        shape = (batch, heads, length + count)
        if self.written[0] != length or length + count > self.capacity:
            return CacheTensor.of(self.cache_format.grown(self.packed, batch, length + count), shape, self.cache_format)
        self.written[0] = length + count
        return CacheTensor.of(self.packed, shape, self.cache_format, self.written)

    def _selected(self, index: Tensor) -> CacheTensor:
        batch, heads, length, _ = self.shape
        chosen = self.cache_format.selected(self.packed, batch, index)
        return CacheTensor.of(chosen, (len(index), heads, length), self.cache_format)

    def _sliced(self, index: Any, result: Tensor) -> CacheTensor:
        """self[..., :n, :] keeps n tokens; self[index, ...] keeps sequences."""
        kept = tuple(result.shape[:3])
        if kept[0] == self.shape[0] and kept[2] <= self.shape[2] and not isinstance(index, Tensor):
            return CacheTensor.of(self.packed, kept, self.cache_format, self.written)
        rows = index[0] if isinstance(index, tuple) else index
        if isinstance(rows, Tensor) and rows.dim() == 1:
            return self._selected(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)
        raise BackendError(
            f"the packed cache cannot be indexed with {index!r}; it takes [..., :tokens, :] and an index of sequences"
        )

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handle = args[0] if args else None
        if isinstance(handle, CacheTensor) and func is Tensor.index_select and args[1] == 0:
            return handle._selected(args[2])
        if isinstance(handle, CacheTensor) and func is Tensor.repeat_interleave and kwargs and kwargs.get("dim") == 0:
            rows = torch.arange(handle.shape[0], device=handle.device).repeat_interleave(int(args[1]))
            return handle._selected(rows)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        indexed = func is Tensor.__getitem__ and isinstance(result, Tensor) and result.dim() == 4
        return handle._sliced(args[1], result) if indexed and isinstance(handle, CacheTensor) else result


def fresh(
    cache_format: CacheFormat, batch: int, heads: int, parts: HeadParts, tokens: int, device: torch.device
) -> CacheTensor:
    """An empty cache with room for `tokens` tokens of each sequence."""
    packed = cache_format.allocate(batch, heads, parts, tokens, device)
    return CacheTensor.of(packed, (batch, heads, 0), cache_format)
