"""Arguments of a call by the names that its operator gives them.

A call may give an argument by position or by name, or leave it to its default: `argument` finds it in each case. The names are those of
the aten schema (`self`, `other`, `input`, `weight`), and of the Python function for operators of ours. The other functions also check
what is there, and raise a TopologyError that names the node.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operator. `position` is None where it can only be given by name."""

    name: str
    position: int | None
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@functools.cache
def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of an operator, in order."""
    if isinstance(target, torch._ops.OpOverload):
        found = [
            Parameter(
                a.name, None if a.kwarg_only else i, a.default_value if a.has_default_value() else Parameter.default
            )
            for i, a in enumerate(target._schema.arguments)
        ]
    else:
        found = [
            Parameter(p.name, None if p.kind is p.KEYWORD_ONLY else i, p.default)
            for i, p in enumerate(inspect.signature(target).parameters.values())
        ]
    return {parameter.name: parameter for parameter in found}


def parameters_of(node: Node) -> dict[str, Parameter]:
    """The parameters of the operator that a node calls. Raises TopologyError: it calls none."""
    if node.op != "call_function" or not callable(node.target):
        raise TopologyError(
            f"node {node.name}: expected a call with arguments, got {node.format_node()}", node=node.name
        )
    return parameters(node.target)


def parameter_of(node: Node, name: str) -> Parameter:
    """The parameter of that name of the operator that a node calls. Raises TopologyError: no call, no such parameter."""
    known = parameters_of(node)
    if name not in known:
        raise TopologyError(
            f"node {node.name}: {graph_tools.target_text(node.target)} has no argument {name}; it has {', '.join(known)}",
            node=node.name,
        )
    return known[name]


def argument(node: Node, name: str) -> Any:
    """What a call gives for a parameter, or its default. Raises TopologyError: no such parameter, or a required one is missing."""
    parameter = parameter_of(node, name)
    if parameter.position is not None and parameter.position < len(node.args):
        return node.args[parameter.position]
    if name in node.kwargs:
        return node.kwargs[name]
    if parameter.required:
        raise TopologyError(f"node {node.name}: its argument {name} is missing: {node.format_node()}", node=node.name)
    return parameter.default


def set_argument(node: Node, name: str, value: Any) -> None:
    """Give a call another value for a parameter; defaults before it are written out."""
    position = parameter_of(node, name).position
    if position is None or name in node.kwargs:
        node.update_kwarg(name, value)
        return
    before = [argument(node, other) for other in _names(node)[len(node.args) : position]]
    node.args = (*node.args[:position], *before, value, *node.args[position + 1 :])


def node_arg(node: Node, name: str) -> Node:
    """An argument that is a value of the graph."""
    return _checked(node, name, argument(node, name), Node, "a value of the graph")


def optional_node_arg(node: Node, name: str) -> Node | None:
    """An argument that is a value of the graph, or None."""
    value = argument(node, name)
    return None if value is None else _checked(node, name, value, Node, "a value of the graph or None")


def tensor_arg(node: Node, name: str) -> Node:
    """An argument that is a tensor of the model, a get_attr node."""
    value = node_arg(node, name)
    if value.op != "get_attr":
        raise TopologyError(
            f"node {node.name}: {name} is computed; expected a tensor of the model, got {value.format_node()}",
            node=node.name,
        )
    return value


def optional_tensor_arg(node: Node, name: str) -> Node | None:
    """An argument that is a tensor of the model, or None."""
    return None if argument(node, name) is None else tensor_arg(node, name)


def nodes_arg(node: Node, name: str) -> tuple[Node, ...]:
    """An argument that is a list of values of the graph."""
    values = argument(node, name)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, Node) for value in values):
        raise TopologyError(
            f"node {node.name}: {name}: expected a list of values of the graph, got {values!r}", node=node.name
        )
    return tuple(values)


def int_arg(node: Node, name: str) -> int:
    """An argument that is a constant integer."""
    return _checked(node, name, argument(node, name), int, "a constant integer")


def optional_int_arg(node: Node, name: str) -> int | None:
    """An argument that is a constant integer, or None."""
    value = argument(node, name)
    return None if value is None else _checked(node, name, value, int, "a constant integer or None")


def float_arg(node: Node, name: str) -> float:
    """An argument that is a constant number."""
    return float(_checked(node, name, argument(node, name), (int, float), "a constant number"))


def optional_float_arg(node: Node, name: str) -> float | None:
    """An argument that is a constant number, or None."""
    return None if argument(node, name) is None else float_arg(node, name)


def bool_arg(node: Node, name: str) -> bool:
    """An argument that is True or False."""
    return _checked(node, name, argument(node, name), bool, "True or False")


def source(node: Node) -> Node:
    """The first argument of a call: the value that it works on."""
    return node_arg(node, _names(node)[0])


def operands(node: Node) -> tuple[Any, Any]:
    """Both operands of an operator of two."""
    first, second = _names(node)[:2]
    return argument(node, first), argument(node, second)


def other_operand(node: Node, one: object) -> Any:
    """The operand of an operator of two that is not the given one."""
    first, second = operands(node)
    return second if first is one else first


def _names(node: Node) -> list[str]:
    return list(parameters_of(node))


def _checked(node: Node, name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    if not isinstance(value, kind):
        raise TopologyError(
            f"node {node.name}: {name}: expected {expected}, got {value!r}: {node.format_node()}", node=node.name
        )
    return value
