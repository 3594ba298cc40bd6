"""The packed key/value cache in the shape that transformers' DynamicCache expects, and its growth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from resq_compiler.backends.triton.formats import PAGE, next_power_of_two
from torch import Tensor

from resq_compiler.errors import BackendError


class PagedTensor(Tensor):
    """Keys or values of one layer, standing for [B, H, T, D] but holding packed pages (formats.py).

    `shape[2]` is the number of cached tokens; the last dimension is a placeholder of 1, since no float image exists (0 would make
    transformers take the cache for empty). Sequence b has pages
    b * n .. (b + 1) * n - 1, `n = capacity`. Appending writes into the pages; a tensor that another one has outgrown (the prefix of
    a continued cache) is copied before it is continued again, so caches behave as values.
    Selecting sequences (beam search) and cropping (assisted decoding) work; other tensor functions see zeros.
    """

    pages: Tensor
    written: list[int]

    @staticmethod
    def of(pages: Tensor, batch: int, length: int, written: list[int] | None = None) -> PagedTensor:
        """A view of `length` tokens of pages [B * n, H, page_bytes]; `written` is shared by all views of the same pages."""
        shell = torch.zeros(1, device=pages.device).expand(batch, pages.shape[1], length, 1)
        handle = torch.Tensor._make_subclass(PagedTensor, shell)
        handle.pages, handle.written = pages, [length] if written is None else written
        return handle

    @property
    def capacity(self) -> int:
        """Pages of each sequence."""
        return self.pages.shape[0] // max(1, self.shape[0])

    def appended(self, count: int) -> PagedTensor:
        """Room for `count` more tokens, to be written by a kernel: the same pages if they have it, else a grown copy."""
        batch, _, length, _ = self.shape
        needed = -(-(length + count) // PAGE)
        if self.written[0] != length or needed > self.capacity:
            return PagedTensor.of(self._copied(next_power_of_two(max(needed, self.capacity))), batch, length + count)
        self.written[0] = length + count
        return PagedTensor.of(self.pages, batch, length + count, self.written)

    def _copied(self, capacity: int) -> Tensor:
        batch = self.shape[0]
        grown = self.pages.new_empty(batch, capacity, *self.pages.shape[1:])
        grown[:, : self.capacity] = self.pages.unflatten(0, (batch, self.capacity))
        return grown.flatten(0, 1)

    def _selected(self, index: Tensor) -> PagedTensor:
        chosen = self.pages.unflatten(0, (self.shape[0], self.capacity)).index_select(0, index.to(self.pages.device))
        return PagedTensor.of(chosen.flatten(0, 1), len(index), self.shape[2])

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handle = args[0] if args else None
        if isinstance(handle, PagedTensor) and func is Tensor.index_select and args[1] == 0:
            return handle._selected(args[2])
        if isinstance(handle, PagedTensor) and func is Tensor.repeat_interleave and kwargs and kwargs.get("dim") == 0:
            rows = torch.arange(handle.shape[0], device=handle.device).repeat_interleave(int(args[1]))
            return handle._selected(rows)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if (
            func is Tensor.__getitem__
            and isinstance(handle, PagedTensor)
            and isinstance(result, Tensor)
            and result.dim() == 4
        ):
            return _sliced(handle, args[1], result)
        return result


def _sliced(handle: PagedTensor, index: Any, result: Tensor) -> Tensor:
    """handle[..., :n, :] keeps n tokens; handle[index, ...] keeps sequences."""
    if result.shape[0] == handle.shape[0] and result.shape[2] <= handle.shape[2] and not isinstance(index, Tensor):
        return PagedTensor.of(handle.pages, handle.shape[0], result.shape[2], handle.written)
    rows = index[0] if isinstance(index, tuple) else index
    if isinstance(rows, Tensor) and rows.dim() == 1:
        return handle._selected(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)
    raise BackendError(
        f"the packed cache cannot be indexed with {index!r}; it takes [..., :tokens, :] and an index of sequences"
    )


def fresh(batch: int, heads: int, page_bytes: int, tokens: int, device: torch.device) -> PagedTensor:
    """An empty cache with room for `tokens` tokens of each sequence, rounded up to a power of two of pages."""
    capacity = next_power_of_two(max(1, -(-tokens // PAGE)))
    pages = torch.empty(batch * capacity, heads, page_bytes, dtype=torch.int8, device=device)
    return PagedTensor.of(pages, batch, 0)


def block_table(batch: int, capacity: int, device: torch.device) -> Tensor:
    """Page numbers [B, capacity] int32 of the layout above."""
    return torch.arange(batch * capacity, dtype=torch.int32, device=device).view(batch, capacity)
