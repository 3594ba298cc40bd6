"""Tensors that are promised: a value that lies somewhere, and what is to become of it, made when something computes with it.

    Stored        where it lies: a file, a tensor of a model in memory
    ChangedRows   a float64 function of the rows of another promise, each for itself
    ChangedEach   a function of another promise, each expert of [E, N, K] for itself
    Changed       any function of another promise

A graph module holds a `Promised` in the place of the tensor: it has shape, dtype and device, and no values. `graph_tools.get_tensor` makes
them, a caller lets them go; an operator that meets a `Promised` makes it for itself. Inside `keeping()` a promise that several others
come from is made once. A product with few rows goes around a change that says how (`Around`), and never makes its result. Large
tables, embeddings and lm_head, are never made whole by those who look up rows of them or multiply with them.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from torch.utils import _pytree as pytree

from resq_compiler.numerics.float64 import PIECE
from resq_compiler.util import memory

ROWS = 4096  # made at a time, at most; the rows of vocabularies are many
TABLE = 64 * 2**20  # bytes of a matrix from which on it is worked on by rows
HELD_ROWS = 2**30  # bytes of the matrices of single experts that are held for those who ask again


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
        memory.gone(size)

    def reset(self) -> None:
        """Count from here on."""
        self.made, self.most = 0, self.held


class Held:
    """Values that are asked for again, and how often: of whole promises (None), and of single experts while these are within HELD_ROWS."""

    def __init__(self) -> None:
        self._values: dict[tuple[Promise, int | None], tuple[Tensor, float]] = {}
        self._bytes_of_rows = 0

    def get(self, promise: Promise, expert: int | None, make: Callable[[], Tensor], asked: float) -> Tensor:
        """The value that is held, or a made one, which is held if it is asked for more than once."""
        key = promise, expert
        value, left = self._values.pop(key, (None, asked))
        if value is None:
            value = make()
        elif expert is not None:
            self._bytes_of_rows -= value.nbytes
        if left > 1 and (expert is None or self._bytes_of_rows + value.nbytes <= HELD_ROWS):
            self._values[key] = value, left - 1
            self._bytes_of_rows += 0 if expert is None else value.nbytes
        return value


ledger = Ledger()
aten = torch.ops.aten
_held: Held | None = None
_until_end = False


@contextlib.contextmanager
def keeping(until_end: bool = False) -> Iterator[None]:
    """Inside, what several promises were derived from is made once, and held until all of them are made.

    until_end: those and the ones that nothing was derived from are held to the end of this.
    """
    global _held, _until_end
    before = _held, _until_end
    _held, _until_end = Held() if _held is None or until_end else _held, _until_end or until_end
    try:
        yield
    finally:
        _held, _until_end = before


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

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the value, [n, ...] for ids [n] int64; of an expert whose value is held, that one. What is only read is not held."""
        if _held is None or self.children < 2 or len(self.shape) < 3 or len(ids) > 1:
            return self._rows(ids)
        return _held.get(self, int(ids), lambda: self._rows(ids), self._asked())

    def _rows(self, ids: Tensor) -> Tensor:
        return self.whole()[ids]

    def between(self, start: int, stop: int) -> Tensor:
        """Rows start to stop of the value."""
        return self.rows(torch.arange(start, stop))

    def let_go(self) -> None:  # noqa: B027  (most lie in no file)
        """Let go of the pages of the files that the value was read from."""

    def counted_pieces(self) -> Iterator[Tensor]:
        """`pieces`, which the ledger counts until they are let go."""
        for piece in self.pieces():
            ledger.enter(piece)
            yield piece
            del piece  # before the next is made

    def times(self, x: Tensor) -> Tensor:
        """linear(x, value) of a matrix, a piece of its rows at a time, in the dtype and on the device of x."""
        y, start = x.new_empty(*x.shape[:-1], self.shape[0]), 0
        for piece in self.counted_pieces():
            y[..., start : start + len(piece)] = F.linear(x, piece.to(x.device, x.dtype))
            start += len(piece)
        return y

    def times_transposed(self, y: Tensor) -> Tensor:
        """y value, of a matrix, likewise: what comes back through `times` of a gradient."""
        x, start = y.new_zeros(*y.shape[:-1], self.shape[1]), 0
        for piece in self.counted_pieces():
            x += y[..., start : start + len(piece)] @ piece.to(y.device, y.dtype)
            start += len(piece)
        return x

    def whole(self) -> Tensor:
        """The value, or the one that is held."""
        return self.made() if _held is None else _held.get(self, None, self.made, self._asked())

    def made(self) -> Tensor:
        """The value, made now and not held."""
        value = self._whole()
        ledger.enter(value)
        return value

    def _asked(self) -> float:
        """How often the value will be asked for."""
        return math.inf if _until_end and self.children != 1 else self.children

    def _whole(self) -> Tensor:
        return filled(self)


class Stored(Promise):
    """read: rows start to stop of what lies somewhere, in any float dtype. source: the tensor it reads from, if there is one.
    pick: rows of some numbers, where they are found faster together than one by one."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[int, int], Tensor], source: Tensor | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        super().__init__(shape, dtype)
        self._read, self._source, self._pick = read, source, pick

    def let_go(self) -> None:
        if self._source is not None:
            memory.page_out_tensor(self._source)

    def pieces(self) -> Iterator[Tensor]:
        count, numbers = self.shape[0] if self.shape else 1, math.prod(self.shape[1:])
        step = max(1, min(ROWS // math.prod(self.shape[1:-1]), PIECE // max(4 * numbers, 1)))
        for start in range(0, count, step):
            yield self._read(start, min(start + step, count)).to(self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        if self._pick is not None:
            value = self._pick(ids).to(self.dtype)
        else:
            value = torch.empty(len(ids), *self.shape[1:], dtype=self.dtype)
            for place, row in enumerate(ids.tolist()):
                value[place] = self._read(row, row + 1)[0]
        ledger.enter(value)
        return value

    def between(self, start: int, stop: int) -> Tensor:
        value = self._read(start, stop).to(self.dtype)
        ledger.enter(value)
        return value

    def _whole(self) -> Tensor:
        return self._read(0, self.shape[0] if self.shape else 1).to(self.dtype)


class Stacked(Promise):
    """Matrices [E, N, K] of the experts of a mixture, each of others below each other: `experts` has those of every expert."""

    def __init__(self, experts: Sequence[Sequence[Promise]]):
        rows = sum(matrix.shape[0] for matrix in experts[0])
        super().__init__((len(experts), rows, *experts[0][0].shape[1:]), experts[0][0].dtype)
        self._experts = experts

    def pieces(self) -> Iterator[Tensor]:
        for matrices in self._experts:
            yield torch.cat([matrix.made() for matrix in matrices])[None]

    def rows(self, ids: Tensor) -> Tensor:
        return torch.cat([torch.cat([matrix.made() for matrix in self._experts[i]])[None] for i in ids.tolist()])


class Kept(Stored):
    """Rows, the second last dimension, of a tensor of a safetensors file, in its own dtype."""

    def __init__(self, file: Path, name: str, like: Tensor, start: int):
        super().__init__(like.shape, like.dtype, lambda first, last: self.mapped()[first:last].clone())
        self.file, self.name, self._place = file, name, slice(start, start + like.shape[-2])

    def mapped(self) -> Tensor:
        """The value in its file: pages are read when somebody looks at them."""
        with safe_open(self.file, framework="pt") as opened:
            value: Tensor = opened.get_tensor(self.name)[..., self._place, :]
            return value


@dataclass(frozen=True)
class Around:
    """linear(x, change(W)) as after(linear(before(x), W)), both in float64: less work where x has few rows. None: nothing to do."""

    before: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None


class Change(Promise):
    """What becomes of another promise. around: how a product with it can do without."""

    def __init__(self, of: Promise, shape: Sequence[int] | None, around: Around | None):
        super().__init__(of.shape if shape is None else shape, of.dtype)
        self.of, self.around = of, around

    def times(self, x: Tensor) -> Tensor:
        if self.around is None or not self._is_less(x):
            return super().times(x)
        before, after = self.around.before, self.around.after
        y = self.of.times(x if before is None else before(x.double()).to(x.dtype))
        return y if after is None else after(y.double()).to(x.dtype)

    def times_transposed(self, y: Tensor) -> Tensor:
        if self.around is None or not self._is_less(y):
            return super().times_transposed(y)
        before, after = self.around.before, self.around.after
        x = self.of.times_transposed(y if after is None else pulled_back(after, y, self.of.shape[0]))
        return x if before is None else pulled_back(before, x, self.shape[1])

    def _is_less(self, x: Tensor) -> bool:
        """Whether going around is less work for so many rows."""
        assert self.around is not None
        return x.shape[:-1].numel() < self.shape[0 if self.around.after is None else 1]


class ChangedRows(Change):
    """change: a float64 function of rows, each for itself; its result is rounded once."""

    def __init__(self, of: Promise, change: Callable[[Tensor], Tensor], around: Around | None = None):
        super().__init__(of, None, around)
        self._change = change

    def pieces(self) -> Iterator[Tensor]:
        for piece in self.of.pieces():
            yield self._change(piece.double()).to(self.dtype)

    def _rows(self, ids: Tensor) -> Tensor:
        value = self._change(self.of.rows(ids).double()).to(self.dtype)
        ledger.enter(value)
        return value


class ChangedEach(Promise):
    """change: a function of the matrices of some experts [n, ...], each for itself, and of the numbers of these experts."""

    def __init__(self, of: Promise, change: Callable[[Tensor, Tensor], Tensor], shape: Sequence[int] | None = None):
        super().__init__(of.shape if shape is None else shape, of.dtype)
        self.of, self._change = of, change

    def pieces(self) -> Iterator[Tensor]:
        start = 0
        for piece in self.of.pieces():
            yield self._change(piece, torch.arange(start, start + len(piece)))
            start += len(piece)

    def _rows(self, ids: Tensor) -> Tensor:
        value = self._change(self.of.rows(ids), ids)
        ledger.enter(value)
        return value


class Changed(Change):
    """change: a function of the whole value."""

    def __init__(
        self, of: Promise, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None, around: Around | None = None
    ):  # fmt: skip
        super().__init__(of, shape, around)
        self._change = change

    def pieces(self) -> Iterator[Tensor]:
        yield from self.whole().split(ROWS)

    def _whole(self) -> Tensor:
        value = self._change(self.of.whole())
        assert value.shape == self.shape, f"{tuple(value.shape)} where {tuple(self.shape)} was announced"
        return value


def promise_of(value: Tensor) -> Promise:
    """What a tensor stands for, or a promise of the tensor itself; see in_memory."""
    return value.promise if isinstance(value, Promised) else in_memory(value)


def filled(promise: Promise, device: torch.device | None = None) -> Tensor:
    """The whole value, from its pieces; on the device."""
    value, start = torch.empty(promise.shape, dtype=promise.dtype, device=device), 0
    for piece in promise.pieces():
        value[start : start + len(piece)] = piece
        start += len(piece)
    assert start == promise.shape[0], f"{start} of {promise.shape[0]} rows were made"
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
    value, dtype = value.detach(), torch.float32 if value.is_floating_point() else value.dtype
    return Stored(value.shape, dtype, lambda start, stop: value[start:stop] if value.dim() else value, value)


def looked_up(table: Promise, ids: Tensor) -> Tensor:
    """embedding(table, ids), of a promise."""
    different, place = ids.unique(return_inverse=True)
    return table.rows(different.cpu()).to(ids.device)[place]


class _Product(torch.autograd.Function):
    """linear(x, weight, bias) with a weight that is promised, a piece of its rows at a time; gradients of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Promise, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = weight.times(x)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (y,) = gradients
        return ctx.weight.times_transposed(y), None, None


def pulled_back(change: Callable[[Tensor], Tensor], gradient: Tensor, width: int) -> Tensor:
    """The gradient of rows of a width, from that of what a linear function in float64 makes of them."""
    rows = gradient.new_zeros(*gradient.shape[:-1], width, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(change(rows), rows, gradient.double())
    return found.to(gradient.dtype)


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
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Lookups and products in tables, and in what has a matrix for each expert, make no more of them than they need at a time."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__getitem__ and is_stack(args[0]) and isinstance(args[1], int):
                return args[0].promise.rows(torch.tensor([args[1]]))[0]
            if func is aten.embedding.default and is_table(args[0]):
                return looked_up(args[0].promise, args[1])
            if func is aten.linear.default and (is_table(args[1]) or goes_around(args[1])):
                return _Product.apply(args[0], args[1].promise, args[2] if len(args) > 2 else None)
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Operators make what they meet; a detached one is promised still."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0].promise)
        made: dict[int, Tensor] = {}

        def value(x: Any) -> Any:
            return made.setdefault(id(x), x.make()) if isinstance(x, Promised) else x

        return func(*pytree.tree_map(value, args), **pytree.tree_map(value, kwargs or {}))


def is_table(value: Any) -> TypeGuard[Promised]:
    """Whether a value is promised, and a matrix too large to be made whole for a few rows, or for a product."""
    return isinstance(value, Promised) and len(value.promise.shape) == 2 and value.promise.nbytes >= TABLE


def goes_around(value: Any) -> TypeGuard[Promised]:
    """Whether a value is a matrix that is promised, and a product with few rows can do without it."""
    return isinstance(value, Promised) and isinstance(value.promise, Change) and value.promise.around is not None


def is_stack(value: Any) -> TypeGuard[Promised]:
    """Whether a value is promised, and holds the matrices of experts, too large to be made whole for those that are used."""
    return isinstance(value, Promised) and len(value.promise.shape) == 3 and value.promise.nbytes >= TABLE
