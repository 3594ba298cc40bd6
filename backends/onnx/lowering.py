"""From a compiled FX graph to an ONNX graph: walks the nodes in order and calls the emitter of each operator.

Inputs and outputs get the names that Optimum and onnxruntime-genai use; batch, new tokens, past and total length are dynamic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.builder import GraphBuilder
from resq_compiler.backends.onnx.forms import Form
from resq_compiler.backends.onnx.plan import Plan, make_plan, tiling_columns
from resq_compiler.backends.onnx.values import Cache, Codes, Value
from torch.fx import GraphModule, Node

from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import CacheSpec
from resq_compiler.ir import graph_tools

Emitter = Callable[["Lowering", Node], Any]
EMITTERS: dict[Any, Emitter] = {}


def emits(*targets: Any) -> Callable[[Emitter], Emitter]:
    """Register the emitter of FX operators."""

    def register(function: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(targets, function))
        return function

    return register


@dataclass(frozen=True)
class LoweringOptions:
    """Choices that are not part of the profile. embedding: how the table is stored, "float16", "float32" or "int8"."""

    embedding: str = "float16"


class Lowering:
    """State of one lowering: the builder, the form of quantized operators, and the ONNX value of every FX node so far."""

    def __init__(self, gm: GraphModule, cache: tuple[CacheSpec, ...], form: Form, options: LoweringOptions):
        register_emitters()
        self.gm = gm
        self.cache = cache
        self.form = form
        self.options = options
        self.b = GraphBuilder(form.opset)
        self.plan: Plan = make_plan(gm, form.stacks_linears)
        self.env: dict[Node, Any] = {}
        self.memo: dict[Any, Any] = {}
        form.start(self)

    def run(self) -> GraphBuilder:
        """Emit every node, then the outputs."""
        self._inputs()
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and node not in self.plan.inner and node not in self.env:
                self.b.scope(node.name)
                self._emit(node)
        self._outputs()
        return self.b

    def _emit(self, node: Node) -> None:
        if node in self.plan.groups:
            members = self.plan.groups[node]
            for linear, value in zip(members, self.form.linears(self, members), strict=True):
                self.env[linear.root] = value
            return
        emitter = EMITTERS.get(node.target)
        if emitter is None:
            raise BackendError(unsupported([node]))
        self.env[node] = emitter(self, node)

    def _inputs(self) -> None:
        nodes = graph_tools.placeholders(self.gm.graph)
        dims = {
            "input_ids": ("batch", "sequence"),
            "attention_mask": ("batch", "total"),
            "position_ids": ("batch", "sequence"),
        }
        for node in nodes[:3]:
            self.env[node] = Value(self.b.input(str(node.target), TensorProto.INT64, dims[str(node.target)]))
        for i, spec in enumerate(self.cache):
            for node, kind, width in zip(
                nodes[3 + 2 * i : 5 + 2 * i], ("key", "value"), (spec.key_dim, spec.value_dim), strict=True
            ):
                self.env[node] = self.form.cache_input(self, f"past_key_values.{i}.{kind}", spec.num_heads, width)

    def _outputs(self) -> None:
        results = graph_tools.output_args(self.gm.graph)
        logits = self.exact(results[0])
        self.b.scope("")
        self.b.nodes.append(_identity(logits, "logits"))
        vocabulary = int(results[0].meta["val"].shape[-1])
        self.b.output("logits", TensorProto.FLOAT, ("batch", "sequence", vocabulary))
        for i, spec in enumerate(self.cache):
            for node, kind, width in zip(
                results[1 + 2 * i : 3 + 2 * i], ("key", "value"), (spec.key_dim, spec.value_dim), strict=True
            ):
                self.form.cache_output(self, node, f"present.{i}.{kind}", spec.num_heads, width)

    def value(self, node: Any) -> Any:
        """What an FX argument became."""
        if isinstance(node, Node) and node.op == "get_attr" and node not in self.env:
            self.env[node] = Value(self.b.constant(self.tensor(node), name=str(node.target)))
        return self.env[node]

    def tensor(self, node: Node) -> np.ndarray:
        """A weight of the graph as an array; floats as float32."""
        tensor: torch.Tensor = graph_tools.get_tensor(self.gm, node).detach().cpu()
        return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()

    def exact(self, node: Any) -> str:
        """A tensor in the layout that FX gives the node."""
        return self.fx_layout(self.value(node))

    def fx_layout(self, value: Any) -> str:
        """A tensor in FX's layout."""
        value = self.form.settled(self, value)
        if isinstance(value, Codes):
            return self.form.image(self, value)
        if isinstance(value, Cache):
            return self.appended(value)
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
        return self.once(
            ("by_head", value.name), lambda: self.b.op("Reshape", value.name, self.b.ints(0, 0, value.heads, -1))
        )

    def heads_first(self, value: Value) -> str:
        """[B, heads, S, D]."""
        return self.once(
            ("heads_first", value.name), lambda: self.b.op("Transpose", self.by_head(value), perm=[0, 2, 1, 3])
        )

    def token_major(self, node: Node) -> Value:
        """A split value, token-major; what is not so yet is transposed."""
        value = self.form.settled(self, self.value(node))
        if isinstance(value, Value) and value.heads and value.split:
            return value
        heads = int(node.meta["val"].shape[1])
        name = self.b.op("Transpose", self.fx_layout(value), perm=[0, 2, 1, 3])
        return Value(name, heads, split=True, by_head=True)

    def appended(self, cache: Cache) -> str:
        """past with the new tokens, [B, G, T, D]; emitted once, under the name of the output."""

        def make() -> str:
            new = self.heads_first(self.form.settled(self, cache.new))
            return self.b.op("Concat", cache.past, new, outputs=[cache.present], axis=2)

        return self.once(("present", cache.present), make)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """A value made at its first use and shared later."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def length(self, name: str) -> str:
        """A dynamic size as a scalar: "sequence" (new tokens) or "total" (all tokens)."""
        source = "input_ids" if name == "sequence" else "attention_mask"
        make = lambda: self.b.op("Squeeze", self.size(source, 1), self.b.ints(0))  # noqa: E731
        return self.once(("length", name), make)

    def size(self, source: str, axis: int) -> str:
        """One dimension of a graph input, 1-D."""
        return self.once(("size", source, axis), lambda: self.b.op("Shape", source, start=axis, end=axis + 1))

    def piece(self, node: Node) -> str:
        """The columns of a columns() node; all pieces of one value come out of one Split when they tile it."""
        source, start, stop = node.args
        value = self.value(source)
        heads_wise = isinstance(value, Value) and value.heads and value.split
        name = self.by_head(value) if heads_wise else self.fx_layout(value)
        order = tiling_columns(source, int(source.meta["val"].shape[-1]))  # type: ignore[arg-type,union-attr]
        if order is None:
            return self.b.op("Slice", name, self.b.ints(start), self.b.ints(stop), self.b.ints(-1))  # type: ignore[arg-type]
        return self.once(("split", source), lambda: self._split(name, order))[start]

    def _split(self, name: str, order: list[Node]) -> dict[int, str]:
        starts = [int(n.args[1]) for n in order]  # type: ignore[arg-type]
        if len(order) == 1:
            return {0: name}
        sizes = self.b.ints(*(int(n.args[2]) - int(n.args[1]) for n in order))  # type: ignore[arg-type]
        return dict(zip(starts, self.b.op("Split", name, sizes, outputs=len(order), axis=-1), strict=True))


def _identity(source: str, name: str) -> Any:
    from onnx import helper

    return helper.make_node("Identity", [source], [name], name=name)


def unsupported(nodes: list[Node]) -> str:
    """The message for operators that have no ONNX form."""
    lines = ", ".join(f"{n.name} ({n.target})" for n in nodes[:5])
    return (
        f"onnx: no ONNX form for {len(nodes)} node(s): {lines}; expected operators of resq_compiler.ops or "
        f"{len(EMITTERS)} registered aten operators; add an emitter with resq_compiler.backends.onnx.lowering.emits"
    )


def register_emitters() -> None:
    """Import the modules whose emitters register themselves."""
    from resq_compiler.backends.onnx import emit_aten, emit_ops  # noqa: F401


def check_supported(gm: GraphModule) -> None:
    """Raise BackendError, before anything is written, that names every operator without an ONNX form."""
    register_emitters()
    missing = [
        n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output") and n.target not in EMITTERS
    ]
    if missing:
        raise BackendError(unsupported(missing))
