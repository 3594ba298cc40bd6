"""From a compiled FX graph to an ONNX graph: walks the nodes in order and calls the emitter of each operator.

Inputs and outputs get the names that Optimum and onnxruntime-genai use; batch, new tokens, past and total length are dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.builder import GraphBuilder
from resq_compiler.backends.onnx.expert_products import choices_of, expert_products
from resq_compiler.backends.onnx.forms import Form
from resq_compiler.backends.onnx.plan import Plan, make_plan, tiling_columns
from resq_compiler.backends.onnx.registry import emitter_of
from resq_compiler.backends.onnx.values import Cache, Codes, Emitted, Value
from torch.fx import GraphModule, Node

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.promises import ROWS, Promised
from resq_compiler.ir.views import Columns
from resq_compiler.util import memory

T = TypeVar("T")


@dataclass(frozen=True)
class LoweringOptions:
    """Choices that are not part of the profile. embedding: how the table is stored; see `export_onnx`."""

    embedding: str = "float16"


class Lowering:
    """State of one lowering: the builder, the form of quantized operators, and the ONNX value of every FX node so far."""

    def __init__(self, gm: GraphModule, cache: tuple[CacheSpec, ...], form: Form, options: LoweringOptions):
        self.gm = gm
        self.cache = cache
        self.form = form
        self.options = options
        self.b = GraphBuilder(form.opset)
        self.plan: Plan = make_plan(gm, form.stacks_linears)
        self.env: dict[Node, Emitted] = {}
        self.memo: dict[Hashable, Any] = {}
        form.start(self)

    def run(self) -> GraphBuilder:
        """Emit every node, then the outputs."""
        self._inputs()
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and node not in self.plan.inner and node not in self.env:
                self.b.scope(node.name)
                self.emit(node)
        self._outputs()
        return self.b

    def emit(self, node: Node) -> None:
        """Emit one node, or the group of linears that it belongs to."""
        if node in self.plan.groups:
            members = self.plan.groups[node]
            for linear, value in zip(members, self.form.linears(self, members), strict=True):
                self.env[linear.root] = value
            return
        if node in self.plan.experts:
            products = self.plan.experts[node]
            for product, value in zip(products, expert_products(self, products), strict=True):
                self.env[product.root] = value
            return
        self.env[node] = emitter_of(node)(self, node)

    def _inputs(self) -> None:
        nodes = graph_tools.placeholders(self.gm.graph)
        ids, mask, positions = nodes[:3]
        for node, length in ((ids, "sequence"), (mask, "total"), (positions, "sequence")):
            self.env[node] = Value(self.b.input(str(node.target), TensorProto.INT64, ("batch", length)))
        for i, spec in enumerate(self.cache):
            key, value = nodes[3 + 2 * i : 5 + 2 * i]
            for node, kind, width in ((key, "key", spec.key_dim), (value, "value", spec.value_dim)):
                self.env[node] = self.form.cache_input(self, f"past_key_values.{i}.{kind}", spec.num_heads, width)

    def _outputs(self) -> None:
        results = graph_tools.output_args(self.gm.graph)
        logits = self.exact(results[0])
        self.b.scope("")
        self.b.op("Identity", logits, output="logits")
        self.b.output("logits", TensorProto.FLOAT, ("batch", "sequence", values.width(results[0])))
        for i, spec in enumerate(self.cache):
            key, value = results[1 + 2 * i : 3 + 2 * i]
            for node, kind, width in ((key, "key", spec.key_dim), (value, "value", spec.value_dim)):
                self.form.cache_output(self, node, f"present.{i}.{kind}", spec.num_heads, width)

    def value(self, node: Node) -> Emitted:
        """What an FX value became."""
        if node.op == "get_attr" and node not in self.env:
            held = graph_tools.held(self.gm, node)
            dtype = np.float32 if held.is_floating_point() else as_array(torch.empty(0, dtype=held.dtype)).dtype
            self.env[node] = Value(self.b.later(str(node.target), held.shape, dtype, lambda: self.pieces(node)))
        return self.env[node]

    def tensor(self, node: Node) -> np.ndarray:
        """A weight of the graph as an array; floats as float32."""
        return as_array(graph_tools.get_tensor(self.gm, node))

    def pieces(self, node: Node) -> Iterator[np.ndarray]:
        """The same, of a promised tensor some rows at a time. What lies in a file is let go of when the next is asked for."""
        yield from self._pieces(node, lambda held: (held,))

    def chunks(self, node: Node) -> Iterator[np.ndarray]:
        """The same, of any tensor some thousands of rows at a time."""
        yield from self._pieces(node, lambda held: held.split(ROWS))

    def _pieces(self, node: Node, cut: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> Iterator[np.ndarray]:
        held = graph_tools.held(self.gm, node)
        for piece in held.promise.counted_pieces() if isinstance(held, Promised) else cut(held):
            yield as_array(piece)
            memory.page_out_tensor(piece)
            del piece  # before the next is made
        if isinstance(held, Promised):
            held.promise.let_go()

    def exact(self, node: Node) -> str:
        """A tensor in the layout that FX gives the node."""
        return self.fx_layout(self.value(node))

    def fx_layout(self, value: Emitted) -> str:
        """A tensor in FX's layout."""
        value = self.form.settled(self, value)
        if isinstance(value, Codes):
            return self.form.image(self, value)
        if isinstance(value, Cache):
            return self.appended(value)
        if not isinstance(value, Value):
            raise BackendError(f"onnx: {value} is no tensor of its own; this is a bug in the exporter")
        if not value.heads:
            return value.name
        return self.heads_first(value) if value.split else self.tokens(value)

    def tokens(self, value: Value) -> str:
        """[B, S, heads * D]."""
        if not value.by_head:
            return value.name
        return self.once(("tokens", value.name), lambda: self.b.op("Reshape", value.name, self.b.ints(0, 0, -1)))

    def by_head(self, value: Value) -> str:
        """[B, S, heads, D]."""
        if value.by_head:
            return value.name
        shape = (0, 0, value.heads, -1)
        return self.once(("by_head", value.name), lambda: self.b.op("Reshape", value.name, self.b.ints(*shape)))

    def heads_first(self, value: Value) -> str:
        """[B, heads, S, D]."""
        make = lambda: self.b.op("Transpose", self.by_head(value), perm=[0, 2, 1, 3])  # noqa: E731
        return self.once(("heads_first", value.name), make)

    def columns_last(self, node: Node) -> tuple[str, int]:
        """A value for an operator over its columns, and its heads where they are token-major, [B, S, heads, D], else 0."""
        value = self.value(node)
        if isinstance(value, Value) and value.is_split:
            return self.by_head(value), value.heads
        return self.fx_layout(value), 0

    def token_major(self, node: Node) -> Value:
        """A split value, token-major; what is not so yet is transposed."""
        value = self.form.settled(self, self.value(node))
        if isinstance(value, Value) and value.is_split:
            return value
        turned = self.b.op("Transpose", self.fx_layout(value), perm=[0, 2, 1, 3])
        # ONNX Runtime 1.31 moves a transposition through a blocked QuantizeLinear, but not through a Reshape
        heads, width = int(values.shape(node)[1]), values.width(node)
        name = self.b.op("Reshape", turned, self.b.ints(0, 0, heads * width))
        return Value(name, heads, split=True)

    def appended(self, cache: Cache) -> str:
        """past with the new tokens, [B, G, T, D]; emitted once, under the name of the output."""

        def make() -> str:
            new = self.fx_layout(self.form.settled(self, cache.new))
            return self.b.op("Concat", cache.past, new, output=cache.present, axis=2)

        return self.once(("present", cache.present), make)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """A value made at its first use and shared later."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found

    def length(self, name: str) -> str:
        """A dynamic size as a scalar: "sequence" (new tokens) or "total" (all tokens)."""
        source = "input_ids" if name == "sequence" else "attention_mask"
        make = lambda: self.b.op("Squeeze", self.size(source, 1), self.b.ints(0))  # noqa: E731
        return self.once(("length", name), make)

    def size(self, source: str, axis: int) -> str:
        """One dimension of a tensor, 1-D."""
        return self.once(("size", source, axis), lambda: self.b.op("Shape", source, start=axis, end=axis + 1))

    def rows(self, node: Node) -> str:
        """A value [B, S, K], or one for each choice of experts, [B, S, k, K], as [B, S · k, K]."""
        name = self.exact(node)
        return self.b.op("Reshape", name, self.b.ints(0, -1, values.width(node))) if choices_of(node) else name

    def as_fx(self, name: str, node: Node) -> str:
        """Rows [B, S · k, K] in the shape that FX gives the node."""
        choices = choices_of(node)
        return self.b.op("Reshape", name, self.choice_shape(choices)) if choices else name

    def choice_shape(self, choices: int) -> str:
        """[B, S, k, -1]."""
        sizes = self.size("input_ids", 0), self.size("input_ids", 1), self.b.ints(choices, -1)
        return self.once(("choice shape", choices), lambda: self.b.op("Concat", *sizes, axis=0))

    def piece(self, columns: Columns) -> str:
        """The columns of a columns() node; all pieces of one value come out of one Split when they tile it."""
        name, _ = self.columns_last(columns.x)
        order = tiling_columns(columns.x, values.width(columns.x))
        if order is None:
            ends = self.b.ints(columns.start), self.b.ints(columns.stop)
            return self.b.op("Slice", name, *ends, self.b.ints(-1))
        starts = [piece.start for piece in order]
        sizes = [piece.stop - piece.start for piece in order]
        make = lambda: dict(zip(starts, self.b.split(name, sizes), strict=True))  # noqa: E731
        return self.once(("split", columns.x), make)[columns.start]


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; floats as float32."""
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def element_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a tensor type. Raises BackendError: it has none here."""
    if dtype not in ELEMENT:
        raise BackendError(f"onnx: tensors of {dtype} have no ONNX form here; expected {', '.join(map(str, ELEMENT))}")
    return ELEMENT[dtype]


ELEMENT: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.float64: TensorProto.DOUBLE, torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
}  # fmt: skip
