"""Structural checks of a graph, and the shapes of its values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import VerifyError
from resq_compiler.ir import graph_tools, values
from resq_compiler.numerics.quantized import QuantizedActivation


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
    """Runs the graph on meta tensors and keeps each node's value in meta["val"].

    Calls that are alike, as those of all blocks are, share one value: a fake tensor is metadata that nobody changes.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.known: dict[object, object] = {}
        self.described: dict[Node, object] = {}

    def run_node(self, n: Node) -> object:
        call = self._call(n)
        if call is None:
            value = self._run(n)
        elif call in self.known:
            value = self.known[call]
        else:
            value = self.known[call] = self._run(n)
        n.meta["val"] = value
        return value

    def _run(self, n: Node) -> object:
        try:
            return super().run_node(n)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise VerifyError(
                f"node {n.name}: its shape cannot be found: {reason}; {n.format_node()}", node=n.name
            ) from error

    def _call(self, n: Node) -> object | None:
        """What the value of a node follows from, to be looked up by; None where an argument cannot be."""
        found = (
            n.op,
            n.target,
            tuple(map(self._argument, n.args)),
            tuple((k, self._argument(v)) for k, v in n.kwargs.items()),
        )
        try:
            hash(found)
        except TypeError:
            return None
        return found

    def _argument(self, argument: object) -> object:
        if not isinstance(argument, Node):
            return _description(argument)
        if argument not in self.described:
            self.described[argument] = _description(self.env[argument])
        return self.described[argument]


def _description(value: object) -> object:
    """All there is to a fake tensor, or to several of them; a number with its type, since 1 is 1.0 and True."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return type(value), *map(_description, value)
    if isinstance(value, QuantizedActivation):
        return (*map(_description, (value.qdata, value.scale, value.zero_point)), value.bits)
    return type(value), value


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
