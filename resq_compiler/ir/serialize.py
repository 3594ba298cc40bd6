"""An FX graph as plain JSON, in both directions: for saved models and for dumps.

A graph is {"nodes": [...]} in execution order; a node is {"name", "op", "target", "args", "kwargs", "module", "made_by", "facts",
"value"}, empty fields left out. Targets are names: "resq.rms_norm" (ops.OPS), "aten.add.Tensor", "operator.getitem". Arguments
are JSON values, and {"node": name}, {"tuple": [...]}, {"dtype": "float32"}, {"float": "inf"}, ... for what JSON has not.

Reading looks every name up in a table and evaluates nothing, so that a file from a stranger cannot run code: only operators that
compute values from values are accepted (none that mutates its arguments or touches files).
"""

from __future__ import annotations

import json
import math
import operator
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from resq_compiler.errors import CheckpointError
from resq_compiler.ir import graph_tools, meta, ops

SYMBOLIC = (
    operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, math.ceil, math.floor, torch.sym_max, torch.sym_min,
)  # fmt: skip
"""What torch.export computes sizes with, and how it takes tuples apart."""

_NAMED: dict[str, Callable] = {f"{f.__module__.removeprefix('_')}.{f.__name__}": f for f in SYMBOLIC} | {
    f"resq.{name}": function for name, function in ops.OPS.items()
}
_NAMES = {function: name for name, function in _NAMED.items()}
_FACTS = {c.__name__: c for c in vars(meta).values() if isinstance(c, type) and hasattr(c, "key")}
CAPTURED = meta.Origin().made_by  # left out: most nodes come from the model itself
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_TORCH_KINDS = {
    "dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format,
}  # fmt: skip


def graph_to_dict(graph: Graph, tensor_info: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Describe a graph; equal graphs give equal dicts.

    Args:    tensor_info: facts to attach to get_attr nodes, by target, under "tensor".
    Returns: JSON values only. Targets and arguments that `dict_to_graph` would refuse are described too, for dumps.
    """
    return {"nodes": [_node_to_dict(node, tensor_info or {}) for node in graph.nodes]}


def dict_to_graph(data: Mapping[str, Any]) -> Graph:
    """Inverse of `graph_to_dict`; the facts of meta.py are put back, values ("value") are not.

    Raises CheckpointError naming the node: unknown target, malformed argument, a reference to a node that does not come before.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), list):
        raise CheckpointError("graph: expected an object with a list of nodes; the file is damaged or not a graph")
    graph = Graph()
    made: dict[str, Node] = {}
    for item in data["nodes"]:
        name = str(item.get("name") if isinstance(item, dict) else item)
        try:
            made[name] = _make_node(graph, item, made)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"graph node {name}: malformed ({type(error).__name__}: {error})") from error
    outputs = len(graph.find_nodes(op="output"))
    if outputs != 1:
        raise CheckpointError(f"graph: expected one output node, got {outputs}; the file is damaged")
    return graph


def check_readable(graph: Graph) -> None:
    """Raise CheckpointError, naming the node, unless `dict_to_graph` can read what `graph_to_dict` makes of a graph."""
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        try:
            if node.op == "call_function":
                find_target(target_name(node.target))
            decode(encode([*node.args, *node.kwargs.values()]), nodes)
        except CheckpointError as error:
            raise CheckpointError(f"node {node.name}: {error}", node=node.name) from error


def to_text(data: Mapping[str, Any]) -> str:
    """JSON with one line for each node, so that two files can be compared by lines."""
    head = {key: value for key, value in data.items() if key != "nodes"}
    lines = ",\n".join(json.dumps(node, allow_nan=False) for node in data["nodes"])
    start = json.dumps(head, indent=1, allow_nan=False)[:-1].rstrip() if head else "{"
    return f'{start}{"," if head else ""}\n "nodes": [\n{lines}\n]}}\n'


def target_name(target: Any) -> str:
    """The name of a call's target; "unknown:..." for one that cannot be read back."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    return _NAMES.get(target) or f"unknown:{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def find_target(name: str) -> Callable:
    """The function behind a name. Raises CheckpointError unless it is in ops.OPS, listed here, or a pure aten operator."""
    if name in _NAMED:
        return _NAMED[name]
    packet_name, _, overload = name.removeprefix("aten.").partition(".")
    packet = getattr(torch.ops.aten, packet_name, None) if name.startswith("aten.") else None
    if isinstance(packet, torch._ops.OpOverloadPacket) and overload in packet.overloads():
        function = getattr(packet, overload)
        if _is_pure(function):
            return function
    raise CheckpointError(
        f"graph: unknown operator {name!r}; expected resq.<{', '.join(ops.OPS)}> or a pure aten operator: "
        "the file is damaged, or was written by a newer resq_compiler"
    )


def _is_pure(function: Any) -> bool:
    schema = function._schema
    touches_files = any("file" in argument.name for argument in schema.arguments)
    return bool(schema.returns) and not schema.is_mutable and not touches_files


def _node_to_dict(node: Node, tensor_info: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    origin = meta.get(node, meta.Origin)
    tensor = tensor_info.get(str(node.target)) if node.op == "get_attr" else None
    fields = {
        "args": [encode(a) for a in node.args],
        "kwargs": {key: encode(value) for key, value in node.kwargs.items()},
        "module": graph_tools.module_of(node),
        "made_by": origin.made_by if origin and origin.made_by != CAPTURED else "",
        "facts": _facts(node),
        "tensor": dict(tensor) if tensor else None,
        "value": describe_value(node.meta.get("val")),
    }
    start = {"name": node.name, "op": node.op, "target": target_name(node.target)}
    return start | {key: value for key, value in fields.items() if value}


def _facts(node: Node) -> dict[str, Any]:
    """Facts by their class; the origin is written beside them."""
    found: list[Any] = [fact for fact in meta.facts(node) if not isinstance(fact, meta.Origin)]
    return {type(fact).__name__: meta.to_dict(fact) for fact in found}


def describe_value(value: Any) -> Any:
    """Shape and dtype of what a node computes; a list for several tensors, None where nothing is known."""
    found = [_describe_leaf(leaf) for leaf in pytree.tree_leaves(value)]
    found = [leaf for leaf in found if leaf is not None]
    return found[0] if len(found) == 1 else found or None


def _describe_leaf(leaf: Any) -> dict[str, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    return {
        "shape": [s if isinstance(s, int) else str(s) for s in leaf.shape],
        "dtype": str(leaf.dtype).removeprefix("torch."),
    }


def encode(value: Any) -> Any:
    """One argument as JSON values."""
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # where a graph is read; it is moved with its weights
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    return {"unknown": repr(value)}


def decode(value: Any, nodes: Mapping[str, Node]) -> Any:
    """Inverse of `encode`. Raises CheckpointError for what `encode` does not write."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise CheckpointError(f"graph: malformed argument {value!r}")
    ((kind, content),) = value.items()
    if kind == "node":
        return _earlier(content, nodes)
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "tuple":
        return tuple(decode(v, nodes) for v in content)
    if kind == "slice":
        return slice(*(decode(v, nodes) for v in content))
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None) if kind in _TORCH_KINDS and isinstance(content, str) else None
    if kind in _TORCH_KINDS and isinstance(found, _TORCH_KINDS[kind]):
        return found
    raise CheckpointError(f"graph: malformed argument {value!r}")


def _earlier(name: str, nodes: Mapping[str, Node]) -> Node:
    if name not in nodes:
        raise CheckpointError(f"graph: reference to node {name!r}, which does not come before its use")
    return nodes[name]


def _make_node(graph: Graph, item: Mapping[str, Any], made: Mapping[str, Node]) -> Node:
    op, target = item["op"], item["target"]
    args = tuple(decode(a, made) for a in item.get("args", ()))
    kwargs = {key: decode(value, made) for key, value in item.get("kwargs", {}).items()}
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise CheckpointError(f"graph node {item['name']}: unknown kind {op!r}")
    if op != "call_function" and not _IDENTIFIER.fullmatch(target):
        raise CheckpointError(f"graph node {item['name']}: malformed name {target!r}")
    function = find_target(target) if op == "call_function" else target
    node = graph.create_node(op, function, args, kwargs, name=item["name"])
    if node.name != item["name"]:
        raise CheckpointError(f"graph node {item['name']}: this name is taken or not allowed")
    if item.get("module") or item.get("made_by"):
        meta.put(node, meta.Origin(item.get("module", ""), item.get("made_by", CAPTURED)))
    for kind, fields in item.get("facts", {}).items():
        if kind not in _FACTS:
            raise CheckpointError(f"graph node {item['name']}: unknown fact {kind!r}; written by a newer resq_compiler")
        meta.put(node, _make_fact(_FACTS[kind], fields))
    return node


def _make_fact(cls: type, fields: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)

    def value(name: str, given: Any) -> Any:
        if isinstance(given, dict):
            return _make_fact(hints[name], given)
        return tuple(given) if isinstance(given, list) else given

    return cls(**{name: value(name, given) for name, given in fields.items()})
