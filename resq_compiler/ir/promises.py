"""Tensors that are promised: a value that lies somewhere, and what is to become of it, made when something computes with it.

    Stored        where it lies: a file, a tensor of a model in memory
    ChangedRows   a float64 function of the rows of another promise, each for itself
    Changed       any function of another promise

A graph module holds a `Promised` in the place of the tensor: it has shape, dtype and device, and no values. `graph_tools.get_tensor` makes
them, a caller lets them go; an operator that meets a `Promised` makes it for itself. Inside `keeping()` a promise that several others
come from is made once.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

ROWS = 4096  # made at a time; the rows of vocabularies are many


@dataclass
class Ledger:
    """What was made of promises: how often, the bytes that are held now, and the most that ever were since `reset`."""

    made: int = 0
    held: int = 0
    most: int = 0

    def enter(self, value: Tensor) -> None:
        """Count a value until it is let go."""
        self.made += 1
        self.held += value.nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(value, self._leave, value.nbytes).atexit = False

    def _leave(self, size: int) -> None:
        self.held -= size

    def reset(self) -> None:
        """Count from here on."""
        self.made, self.most = 0, self.held


ledger = Ledger()
_kept: dict[Promise, tuple[Tensor, float]] | None = None
"""Values that are asked for again, and how often."""
_until_end = False


@contextlib.contextmanager
def keeping(until_end: bool = False) -> Iterator[None]:
    """Inside, what several promises were derived from is made once, and held until all of them are made.

    until_end: those and the ones that nothing was derived from are held to the end of this.
    """
    global _kept, _until_end
    before = _kept, _until_end
    _kept, _until_end = {} if _kept is None or until_end else _kept, _until_end or until_end
    try:
        yield
    finally:
        _kept, _until_end = before


class Promise(ABC):
    """A value of a shape and dtype that can be made. children: how many promises were derived from it, if several."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype):
        self.shape, self.dtype, self.children = torch.Size(shape), dtype, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def pieces(self) -> Iterator[Tensor]:
        """The value, some thousands of rows at a time where it can be made so."""

    def whole(self) -> Tensor:
        """The value, or the one that is kept."""
        value, left = (None, self._asked()) if _kept is None else _kept.pop(self, (None, self._asked()))
        if value is None:
            value = self._whole()
            ledger.enter(value)
        if _kept is not None and left > 1:
            _kept[self] = value, left - 1
        return value

    def _asked(self) -> float:
        """How often the value will be asked for."""
        return math.inf if _until_end and self.children != 1 else self.children

    def _whole(self) -> Tensor:
        first, *others = self.pieces()
        return torch.cat([first, *others]) if others else first


class Stored(Promise):
    """read: rows start to stop of what lies somewhere, in any float dtype."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[int, int], Tensor]):
        super().__init__(shape, dtype)
        self._read = read

    def pieces(self) -> Iterator[Tensor]:
        count = self.shape[0] if self.shape else 1
        for start in range(0, count, ROWS):
            yield self._read(start, min(start + ROWS, count)).to(self.dtype)

    def _whole(self) -> Tensor:
        return self._read(0, self.shape[0] if self.shape else 1).to(self.dtype)


class Kept(Stored):
    """Rows, the second last dimension, of a tensor of a safetensors file, in its own dtype."""

    def __init__(self, file: Path, name: str, like: Tensor, start: int):
        super().__init__(like.shape, like.dtype, lambda first, last: self.mapped()[first:last].clone())
        self.file, self.name, self._rows = file, name, slice(start, start + like.shape[-2])

    def mapped(self) -> Tensor:
        """The value in its file: pages are read when somebody looks at them."""
        with safe_open(self.file, framework="pt") as opened:
            value: Tensor = opened.get_tensor(self.name)[..., self._rows, :]
            return value


class ChangedRows(Promise):
    """change: a float64 function of rows, each for itself; its result is rounded once."""

    def __init__(self, of: Promise, change: Callable[[Tensor], Tensor]):
        super().__init__(of.shape, of.dtype)
        self.of, self._change = of, change

    def pieces(self) -> Iterator[Tensor]:
        for piece in self.of.pieces():
            yield self._change(piece.double()).to(self.dtype)

    def _whole(self) -> Tensor:
        value, start = torch.empty(self.shape, dtype=self.dtype), 0
        for piece in self.pieces():
            value[start : start + len(piece)] = piece
            start += len(piece)
        return value


class Changed(Promise):
    """change: a function of the whole value."""

    def __init__(self, of: Promise, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None):
        super().__init__(of.shape if shape is None else shape, of.dtype)
        self.of, self._change = of, change

    def pieces(self) -> Iterator[Tensor]:
        yield from self.whole().split(ROWS)

    def _whole(self) -> Tensor:
        value = self._change(self.of.whole())
        assert value.shape == self.shape, f"{tuple(value.shape)} where {tuple(self.shape)} was announced"
        return value


def written(promise: Promise, file: Path) -> Tensor:
    """The value, in a file, a piece in memory at a time; pages of it are read when somebody looks at them.

    What a file holds as it is stays there.
    """
    mapped = promise.mapped() if isinstance(promise, Kept) else None
    if mapped is not None and mapped.is_contiguous():
        return mapped
    aside = file.with_name(f".{file.name}.partial")
    with aside.open("wb") as opened:
        for piece in promise.pieces():
            opened.write(piece.contiguous().numpy().data)
    aside.replace(file)  # one that was mapped before stays as it is
    size = math.prod(promise.shape)
    return torch.from_file(str(file), shared=False, size=size, dtype=promise.dtype).reshape(promise.shape)


def in_memory(value: Tensor) -> Stored:
    """A promise of a tensor that is there, in float32 if it is a float."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return Stored(value.shape, dtype, lambda start, stop: value.detach()[start:stop] if value.dim() else value.detach())


class Promised(Tensor):
    """Stands for the value of a promise in a graph module; never holds it."""

    promise: Promise

    @staticmethod
    def __new__(cls, promise: Promise) -> Promised:
        """A tensor of the promise's shape and dtype on the CPU, without memory."""
        stand_in = cls._make_wrapper_subclass(cls, promise.shape, dtype=promise.dtype, device=torch.device("cpu"))
        stand_in.promise = promise
        return stand_in

    def make(self) -> Tensor:
        """The value."""
        return self.promise.whole()

    def __deepcopy__(self, memo: dict[int, Any]) -> Promised:
        return Promised(self.promise)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Promised({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Operators make what they meet; a detached one is promised still."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].promise)
        made: dict[int, Tensor] = {}

        def value(x: Any) -> Any:
            return made.setdefault(id(x), x.make()) if isinstance(x, Promised) else x

        return func(*pytree.tree_map(value, args), **pytree.tree_map(value, kwargs or {}))
