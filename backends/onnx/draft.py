"""An ONNX model whose large tensors are not made yet: one after the other is, some rows at a time, when the model is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

APART_FROM = 1024  # bytes of a tensor, with the header of a Python object, as onnx counts them


@dataclass(frozen=True)
class LargeArray:
    """An initializer. pieces: makes its values anew at every call, as arrays that follow each other in memory.

    element: ONNX's element type; values of INT4 come as uint8, two in a byte.
    """

    name: str
    element: int
    dims: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @staticmethod
    def of(name: str, array: np.ndarray) -> LargeArray:
        """An array that is there."""
        return LargeArray(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, lambda: (array,))

    @property
    def nbytes(self) -> int:
        count = math.prod(self.dims)
        if self.element == TensorProto.INT4:
            return (count + 1) // 2
        return count * helper.tensor_dtype_to_np_dtype(self.element).itemsize

    def array(self) -> np.ndarray:
        """All values; not a copy where they come in one piece."""
        first, *others = self.pieces()
        return (np.concatenate([first, *others]) if others else first).reshape(self.dims)

    def proto(self) -> onnx.TensorProto:
        """Without the values."""
        return TensorProto(name=self.name, data_type=self.element, dims=self.dims)


@dataclass(frozen=True)
class Draft:
    """A model and its large tensors, by name; the initializers of `proto` that stand for them have no values."""

    proto: onnx.ModelProto
    large: Mapping[str, LargeArray]

    @property
    def nbytes(self) -> int:
        """Of the files."""
        return self.proto.ByteSize() + sum(array.nbytes for array in self.large.values())

    def whole(self) -> onnx.ModelProto:
        """The model with all its values, in memory."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for tensor in model.graph.initializer:
            if tensor.name in self.large:
                tensor.raw_data = b"".join(piece.tobytes() for piece in self.large[tensor.name].pieces())
        return model

    def save(self, file: Path) -> None:
        """One file that holds everything."""
        onnx.save(self.whole(), file)

    def save_apart(self, file: Path, data: str) -> None:
        """Large tensors in a file `data` beside it, one piece of them in memory at a time; the bytes are those of onnx's own writer."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        with (file.parent / data).open("wb") as opened:
            for tensor in model.graph.initializer:
                pieces = self._stored_apart(tensor)
                if pieces is not None:
                    start = opened.tell()
                    opened.writelines(pieces)  # which holds none while the next is made
                    _point_to(tensor, data, start, opened.tell() - start)
        onnx.save(model, file)

    def _stored_apart(self, tensor: onnx.TensorProto) -> Iterable[bytes | memoryview] | None:
        """The bytes of a tensor that goes into the other file; None of a small one."""
        large = self.large.get(tensor.name)
        if large is not None:
            return map(_bytes_of, large.pieces())
        return (tensor.raw_data,) if sys.getsizeof(tensor.raw_data) >= APART_FROM else None


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).data


def _point_to(tensor: onnx.TensorProto, file: str, start: int, length: int) -> None:
    """Let a tensor of a model say where its values are."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", start), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
