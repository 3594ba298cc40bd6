"""A small writer of ONNX graphs: nodes, constants and the model around them. Knows nothing of quantization or of FX."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from resq_compiler.backends.onnx.draft import Draft, LargeArray

from resq_compiler.errors import BackendError

IR_VERSION = {21: 10, 23: 11}  # the IR that came with each opset: what released runtimes accept together
SMALL_CONSTANT = 1024  # elements up to which equal constants are stored once

Dims = Sequence[int | str]


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node, such as the body of a Loop."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


class GraphBuilder:
    """Collects the nodes of one ONNX graph. Values are tensor names; `constant` and `op` return the names they make."""

    def __init__(self, opset: int):
        self.opset = opset
        self.domains: dict[str, int] = {"": opset}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto | LargeArray] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.types: list[onnx.ValueInfoProto] = []  # of values between nodes, where ONNX Runtime cannot find them
        self._scope = ""
        self._count: dict[str, int] = {}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._named: set[str] = set()

    def scope(self, name: str) -> None:
        """Names of later nodes start with this: the FX node they come from."""
        self._scope = name

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Names of nodes made in this context start with `name` and the scope outside."""
        outer, self._scope = self._scope, f"{name}_{self._scope}"
        try:
            yield
        finally:
            self._scope = outer

    def fresh(self, label: str) -> str:
        """A tensor or node name that is not taken."""
        stem = f"{self._scope}/{label}" if self._scope else label
        index = self._count.get(stem, 0)
        self._count[stem] = index + 1
        return stem if index == 0 else f"{stem}_{index}"

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node with one output, of that name where one is given. Returns the output's name."""
        name = self.fresh(kind)
        return self._append(kind, name, inputs, [output or name], attributes)[0]

    def several(self, kind: str, *inputs: str, outputs: Sequence[str], **attributes: Any) -> list[str]:
        """Append a node with outputs of these names. Returns them."""
        return self._append(kind, self.fresh(kind), inputs, list(outputs), attributes)

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        """Pieces of x of these sizes along an axis; x itself where there is one."""
        if len(sizes) == 1:
            return [x]
        lengths, name = self.ints(*sizes), self.fresh("Split")
        outputs = [name, *(f"{name}:{i}" for i in range(1, len(sizes)))]
        return self._append("Split", name, [x, lengths], outputs, {"axis": axis})

    def join(self, pieces: Sequence[str], axis: int = -1) -> str:
        """Pieces side by side along an axis; the piece itself where there is one."""
        return pieces[0] if len(pieces) == 1 else self.op("Concat", *pieces, axis=axis)

    def _append(
        self, kind: str, name: str, inputs: Sequence[str], outputs: list[str], attributes: dict[str, Any]
    ) -> list[str]:
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=name, **attributes))
        return outputs

    def loop(self, count: str, carried: str, step: Callable[[str, str], str]) -> str:
        """Append a Loop that runs `count` times and carries a sequence of float32 tensors.

        step(number, carried) makes the nodes of its body, which may read values of this graph, and returns what is carried on. Constants
        of the body are this graph's, where they are laid out once.
        """
        number, running, before = (self.fresh(f"loop_{what}") for what in ("number", "running", "carried"))
        outer, self.nodes = self.nodes, []
        after, going_on = step(number, before), self.op("Identity", running)
        inside, self.nodes = self.nodes, outer
        sequence = [helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in (before, after)]
        scalars = [
            helper.make_tensor_value_info(name, element, [])
            for name, element in (
                (number, TensorProto.INT64),
                (running, TensorProto.BOOL),
                (going_on, TensorProto.BOOL),
            )
        ]
        inputs, outputs = [*scalars[:2], sequence[0]], [scalars[2], sequence[1]]
        body, always = helper.make_graph(inside, "body", inputs, outputs), self.constant(np.bool_(True))
        return self.op("Loop", count, always, carried, body=body)

    def constant(self, value: Any, dtype: Any = None, name: str = "") -> str:
        """An initializer from an array or a number; small equal ones are shared. A name given twice means the same array."""
        if name and name in self._named:
            return name
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        small = array.size <= SMALL_CONSTANT
        key = (array.dtype.str, array.shape, array.tobytes()) if small else None
        if key is not None and key in self._constants:
            return self._constants[key]
        label = name or self._constant_name(array)
        self._named.add(label)
        self.initializers.append(numpy_helper.from_array(array, label) if small else LargeArray.of(label, array))
        if key is not None:
            self._constants[key] = label
        return label

    def later(self, name: str, dims: Sequence[int], dtype: Any, pieces: Callable[[], Iterable[np.ndarray]]) -> str:
        """`constant` of values that are made when the model is written, if they are many; see LargeArray."""
        if name in self._named:
            return name
        large = LargeArray(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), tuple(dims), pieces)
        if math.prod(dims) <= SMALL_CONSTANT:
            return self.constant(large.array(), dtype, name)
        self._named.add(name)
        self.initializers.append(large)
        return name

    def _constant_name(self, array: np.ndarray) -> str:
        scope, self._scope = self._scope, ""
        label = self.fresh(f"constant_{array.dtype.name}")
        self._scope = scope
        return label

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant: shapes, axes, split sizes."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float) -> str:
        """A float32 scalar constant."""
        return self.constant(np.float32(value))

    def int4(self, name: str, dims: Sequence[int], pieces: Callable[[], Iterable[np.ndarray]]) -> str:
        """Codes in [-8, 7] as an INT4 initializer, made when the model is written; all pieces but the last of an even number of codes."""
        if name not in self._named:
            self._named.add(name)
            made = lambda: map(lambda codes: nibbles(codes, name), pieces())  # noqa: E731
            self.initializers.append(LargeArray(name, TensorProto.INT4, tuple(dims), made))
        return name

    def input(self, name: str, element: int, dims: Dims) -> str:
        """Declare a graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, element, list(dims)))
        return name

    def default_input(self, name: str, value: np.ndarray) -> str:
        """Declare a graph input with a default: clients may leave it out. A name given twice is declared once."""
        if name not in self._named:
            self._named.add(name)
            self.initializers.append(numpy_helper.from_array(value, name))
            self.input(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        return name

    def output(self, name: str, element: int, dims: Dims) -> None:
        """Declare a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, element, list(dims)))

    def model(self, name: str, metadata: dict[str, str], version: str) -> onnx.ModelProto:
        """The finished model with only the nodes that its outputs need."""
        return self.draft(name, metadata, version).whole()

    def draft(self, name: str, metadata: dict[str, str], version: str) -> Draft:
        """The same before its large tensors are made."""
        return self._draft(name, metadata, version, set())

    def model_around(
        self, name: str, metadata: dict[str, str], version: str
    ) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """The model with large arrays of custom operators and tables as graph inputs, and these arrays, which are not copied. Other
        operators keep theirs: ONNX Runtime lays the constants of products out anew."""
        nodes, used = self.needed()
        taken = {i for node in nodes if node.domain or node.op_type == "Gather" for i in node.input}
        arrays = {t.name: t.array() for t in self.initializers if isinstance(t, LargeArray) and t.name in taken & used}
        return self._draft(name, metadata, version, set(arrays)).whole(), arrays

    def _draft(self, name: str, metadata: dict[str, str], version: str, given: set[str]) -> Draft:
        nodes, used = self.needed()
        kept = [t for t in self.initializers if t.name in used]
        fed = [
            helper.make_tensor_value_info(t.name, t.element, t.dims)
            for t in kept
            if isinstance(t, LargeArray) and t.name in given
        ]
        stored = [t for t in kept if t.name not in given]
        protos = [t.proto() if isinstance(t, LargeArray) else t for t in stored]
        graph = helper.make_graph(nodes, name, self.inputs + fed, self.outputs, protos, value_info=self.types)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid(*domain) for domain in self.domains.items()], ir_version=IR_VERSION[self.opset],
            producer_name="resq_compiler", producer_version=version,
        )  # fmt: skip
        helper.set_model_props(model, metadata)
        return Draft(model, {t.name: t for t in stored if isinstance(t, LargeArray)})

    def needed(self) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that the outputs need, and all values that they read."""
        used = {o.name for o in self.outputs}
        kept = []
        for node in reversed(self.nodes):
            if any(o in used for o in node.output):
                kept.append(node)
                used.update(node.input)
                used.update(name for body in bodies(node) for inner in body.node for name in inner.input)
        return kept[::-1], used


def nibbles(codes: np.ndarray, name: str) -> np.ndarray:
    """Codes in [-8, 7], row-major, as the bytes of an INT4 tensor: two to a byte, first one in the low nibble."""
    if codes.min(initial=0) < -8 or codes.max(initial=0) > 7:
        raise BackendError(
            f"tensor {name}: codes {codes.min()}..{codes.max()} do not fit INT4 (-8..7); this is a bug in the exporter"
        )
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    packed: np.ndarray = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
    return packed
