"""One emitter at a time: a small FX graph, its ONNX graph, and what PyTorch, ONNX Runtime and onnx's own evaluator make of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes  # noqa: F401  (each registers its emitters)
from resq_compiler.backends.onnx.form_qdq import QdqForm
from resq_compiler.backends.onnx.forms import Form
from resq_compiler.backends.onnx.lowering import Lowering, LoweringOptions, element_type
from resq_compiler.backends.onnx.values import Emitted, Value
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from resq_compiler.ir import graph_tools, verify


@dataclass(frozen=True)
class Weight:
    """A tensor of the model rather than an input."""

    value: Tensor


class Pad(OpRun):
    """Negative pads cut, says the standard; onnx's evaluator has no form for them."""

    def _run(self, x, pads, value, mode=None):
        before, behind = np.split(pads, 2)
        cut = tuple(slice(max(-b, 0), n - max(-e, 0)) for b, e, n in zip(before, behind, x.shape, strict=True))
        return (np.pad(x[cut], np.maximum(np.stack([before, behind], 1), 0), constant_values=value),)


class Lowered:
    """A graph on the way to ONNX: `outputs` names tensors to read."""

    def __init__(self, inputs: dict[str, Tensor], build: Callable[..., Node], form: Form | None = None, **options: Any):
        self.inputs = inputs
        self.gm = GraphModule(torch.nn.Module(), Graph())
        self.nodes = {name: self.gm.graph.placeholder(name) for name in inputs}
        self.result = build(self, *self.nodes.values())
        self.gm.graph.output((self.result,))
        self.gm.recompile()
        verify.propagate_shapes(self.gm, tuple(inputs.values()))
        self.low = Lowering(self.gm, (), form or QdqForm(), LoweringOptions(**options))
        for name, node in self.nodes.items():
            dims = [f"{name}_{i}" for i in range(inputs[name].dim())]
            self.low.env[node] = Value(self.low.b.input(name, element_type(inputs[name].dtype), dims))
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and node not in self.low.plan.inner and node not in self.low.env:
                self.low.emit(node)

    def weight(self, value: Tensor) -> Node:
        """A tensor of the model."""
        return graph_tools.add_tensor(self.gm, f"weight_{len(self.gm.graph.nodes)}", value, "test")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call whose arguments may be tensors of the model."""
        made = map_aggregate((args, kwargs), lambda a: self.weight(a.value) if isinstance(a, Weight) else a)
        return self.gm.graph.call_function(target, *made)

    @property
    def emitted(self) -> Emitted:
        return self.low.env[self.result]

    def run(self, *names: str) -> list[list[np.ndarray]]:
        """Tensors of the ONNX graph by ONNX Runtime, without its optimizations and with, and by onnx's evaluator."""
        for name in names:
            self.low.b.outputs.append(onnx.helper.make_empty_tensor_value_info(name))
        model = self.low.b.model("test", {}, "0")
        feeds = {name: value.numpy() for name, value in self.inputs.items()}
        known = {i.name for i in model.graph.input}
        feeds = {name: value for name, value in feeds.items() if name in known}
        results = [ReferenceEvaluator(model, new_ops=[Pad]).run(list(names), feeds)]
        for level in (
            onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        ):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level, options.log_severity_level = level, 4
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            results.append(session.run(list(names), feeds))
        return results

    def expected(self) -> Any:
        """What the FX graph computes."""
        with torch.no_grad():
            return self.gm(*self.inputs.values())[0]


def check(
    inputs: dict[str, Tensor],
    build: Callable[..., Node],
    form: Form | None = None,
    *,
    tolerance: float = 2e-6,
    **options: Any,
) -> Lowered:
    """Shapes, types and values of a graph in ONNX are those of PyTorch: integers exactly, floats to `tolerance` of the largest."""
    lowered = Lowered(inputs, build, form, **options)
    expected = lowered.expected().numpy()
    name = lowered.low.exact(lowered.result)
    if name in {t.name for t in (*lowered.low.b.initializers, *lowered.low.b.inputs)}:
        name = lowered.low.b.op("Identity", name)
    for (got,) in lowered.run(name):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        if got.dtype.kind == "f":
            scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(got, expected)
    return lowered


def check_call(target: Any, *args: Any, tolerance: float = 2e-6, form: Form | None = None, **kwargs: Any) -> Lowered:
    """`check` of one operator; its tensors are inputs, `Weight`s are tensors of the model."""
    inputs: dict[str, Tensor] = {}

    def named(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        inputs[f"x{len(inputs)}"] = value
        return Place(len(inputs) - 1)

    places = map_aggregate((args, kwargs), named)

    def build(lowered: Lowered, *nodes: Node) -> Node:
        given, by_name = map_aggregate(places, lambda a: nodes[a.index] if isinstance(a, Place) else a)
        return lowered.call(target, *given, **by_name)

    return check(inputs, build, form, tolerance=tolerance)


@dataclass(frozen=True)
class Place:
    """Where an input goes."""

    index: int
