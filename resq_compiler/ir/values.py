"""What a node computes, as a fake tensor: its shape and dtype on the example sizes.

`verify.propagate_shapes` finds all values after a pass. The value of a node that the running pass has made is found here when somebody
asks for it, from the values of its operands.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from resq_compiler.errors import VerifyError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.meta import VALUE


def value(node: Node) -> Any:
    """The fake value of a node: a tensor, codes of activations, or several of them. Raises VerifyError: nothing to find it from."""
    if VALUE not in node.meta:
        node.meta[VALUE] = _find(node)
    return node.meta[VALUE]


def tensor_value(node: Node) -> Tensor:
    """The fake value of a node that computes one tensor. Raises VerifyError."""
    found = value(node)
    if not isinstance(found, Tensor):
        raise VerifyError(
            f"node {node.name}: expected one tensor, got {type(found).__name__}: {node.format_node()}", node=node.name
        )
    return found


def shape(node: Node) -> torch.Size:
    """Shape of a node's tensor on the example sizes."""
    return tensor_value(node).shape


def width(node: Node) -> int:
    """Size of the last dimension of a node's tensor."""
    return int(shape(node)[-1])


def dtype(node: Node) -> torch.dtype:
    """Type of a node's tensor."""
    return tensor_value(node).dtype


def forget(*nodes: Node) -> None:
    """Drop the values of nodes whose operands have changed; they are found again when asked for."""
    for node in nodes:
        node.meta.pop(VALUE, None)


def fake(tensor: Tensor) -> Tensor:
    """A stand-in that keeps no hold of the weight; meta tensors stand in as tensors of the CPU, where the inputs are."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if tensor.is_meta else tensor.device)


def _find(node: Node) -> Any:
    with _mode(node.graph), torch.no_grad():
        if node.op == "get_attr" and node.graph.owning_module is not None:
            return fake(graph_tools.held(node.graph.owning_module, node))
        if node.op != "call_function" or not callable(node.target):
            raise VerifyError(
                f"node {node.name}: its value is not known; propagate_shapes was not run on this graph", node=node.name
            )
        args = torch.fx.node.map_arg(node.args, value)
        kwargs = torch.fx.node.map_arg(node.kwargs, value)
        return node.target(*args, **kwargs)


def _mode(graph: Graph) -> contextlib.AbstractContextManager[Any]:
    """The mode that made the values of a graph's inputs."""
    inputs = (node.meta.get(VALUE) for node in graph_tools.placeholders(graph))
    return next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), contextlib.nullcontext())
