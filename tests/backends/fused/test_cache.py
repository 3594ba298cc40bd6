"""Packed caches behave as values, whatever format holds their codes."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.cache import CacheTensor, fresh
from resq_compiler.backends.fused.formats import HeadParts

from resq_compiler.errors import BackendError
from resq_compiler.numerics.quantized import quantize_dequantize

CPU, PARTS = torch.device("cpu"), HeadParts(13, 3)


class Written:
    """A cache with `count` random tokens of two sequences of three heads."""

    def __init__(self, target, generator, count: int, room: int = 64):
        self.format = target.cache
        self.x = torch.randn(2, count, 3, PARTS.head_dim, generator=generator)
        self.handle = fresh(self.format, 2, 3, PARTS, room, CPU).appended(count)
        self.write(self.handle, 0, self.x)

    def write(self, handle: CacheTensor, start: int, x) -> None:
        table = self.format.table(2, handle.capacity, CPU)
        self.format.write(handle.packed, table, torch.full((2,), start, dtype=torch.int32), x, PARTS, 1.0)

    def image(self, handle: CacheTensor):
        table = self.format.table(handle.shape[0], handle.capacity, CPU)
        return self.format.read(handle.packed, table, PARTS, handle.shape[2])

    @property
    def law(self):
        return quantize_dequantize(self.x.transpose(1, 2), PARTS.spans)


def test_what_is_read_is_the_law(target, generator):
    made = Written(target, generator, 70, room=100)
    assert torch.equal(made.image(made.handle), made.law)


def test_appending_writes_in_place_and_branches_are_copies(target, generator):
    made = Written(target, generator, 5)
    first, second = made.handle.appended(1), made.handle.appended(1)
    assert first.packed.data_ptr() == made.handle.packed.data_ptr()
    assert second.packed.data_ptr() != made.handle.packed.data_ptr() and second.shape == (2, 3, 6, 1)
    more = [torch.randn(2, 1, 3, 16, generator=generator) for _ in range(2)]
    for handle, x in zip((first, second), more, strict=True):
        made.write(handle, 5, x)
    for handle, x in zip((first, second), more, strict=True):
        expected = torch.cat([made.law, quantize_dequantize(x.transpose(1, 2), PARTS.spans)], 2)
        assert torch.equal(made.image(handle), expected)


def test_growing_keeps_what_is_there(target, generator):
    made = Written(target, generator, 60)
    grown = made.handle.appended(100)
    assert grown.shape == (2, 3, 160, 1) and grown.capacity >= 160
    assert torch.equal(made.image(grown)[:, :, :60], made.law)


def test_selecting_sequences_and_cropping(target, generator):
    made = Written(target, generator, 5)
    for swapped in (made.handle.index_select(0, torch.tensor([1, 0])), made.handle[torch.tensor([1, 0])]):
        assert torch.equal(made.image(swapped), made.law.flip(0))
    repeated = made.handle.repeat_interleave(2, dim=0)
    assert torch.equal(made.image(repeated), made.law.repeat_interleave(2, 0))
    kept = made.handle[torch.tensor([False, True])]
    assert torch.equal(made.image(kept), made.law[1:])
    cropped = made.handle[..., :3, :]
    assert isinstance(cropped, CacheTensor) and torch.equal(made.image(cropped), made.law[:, :, :3])
    with pytest.raises(BackendError, match="cannot be indexed with"):
        made.handle[:1]
