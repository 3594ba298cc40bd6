"""Structural checks of a graph, and the shapes of its values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import VerifyError
from resq_compiler.ir import graph_tools, values


def check_graph(gm: GraphModule) -> None:
    """Lint, and check that every get_attr resolves to a tensor. Raises VerifyError naming the node."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifyError(f"malformed graph: {error}") from error
    for node in gm.graph.find_nodes(op="get_attr"):
        try:
            value = graph_tools.held(gm, node)
        except AttributeError as error:
            raise VerifyError(f"node {node.name}: tensor {node.target} does not exist", node=node.name) from error
        if not isinstance(value, Tensor):
            raise VerifyError(
                f"node {node.name}: {node.target} is a {type(value).__name__}, expected a tensor", node=node.name
            )


class _ShapeRecorder(torch.fx.Interpreter):
    """Runs the graph on meta tensors and keeps each node's value in meta["val"]."""

    def run_node(self, n: Node) -> object:
        try:
            value = super().run_node(n)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise VerifyError(
                f"node {n.name}: its shape cannot be found: {reason}; {n.format_node()}", node=n.name
            ) from error
        n.meta["val"] = value
        return value


def propagate_shapes(gm: GraphModule, example_inputs: tuple[Tensor, ...]) -> None:
    """Set meta["val"] of every node to a fake tensor with its shape and dtype on the example sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fakes = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = graph_tools.held(gm, node)
            fakes[node] = values.fake(value) if isinstance(value, Tensor) else value
        interpreter = _ShapeRecorder(gm)
        inputs = dict(
            zip(graph_tools.placeholders(gm.graph), (mode.from_tensor(t) for t in example_inputs), strict=True)
        )
        for node in gm.graph.nodes:
            if node in inputs or node in fakes:
                node.meta["val"] = inputs.get(node, fakes.get(node))
                interpreter.env[node] = node.meta["val"]
            elif node.op == "call_function":
                interpreter.env[node] = interpreter.run_node(node)
