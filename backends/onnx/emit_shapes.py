"""Emitters of aten operators that move, repeat and index values, and of the arithmetic of dynamic sizes.

A size is an int64 tensor [1]: what Shape gives and what Reshape, Expand and Slice take.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx.emit_aten import operand
from resq_compiler.backends.onnx.lowering import Lowering
from resq_compiler.backends.onnx.registry import emits
from resq_compiler.backends.onnx.values import Emitted, Pieces, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import values
from resq_compiler.ir.args import argument, int_arg, node_arg, nodes_arg
from resq_compiler.ir.graph_tools import aten

SIZES: dict[Any, str] = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div", torch.sym_max: "Max", torch.sym_min: "Min",
}  # fmt: skip


def size(low: Lowering, value: Any) -> str:
    """A size or an index, a number or a node, as a tensor [1]."""
    return low.exact(value) if isinstance(value, Node) else low.b.ints(int(value))


def sizes(low: Lowering, wanted: Sequence[Any]) -> str:
    """Sizes, numbers or nodes, as one tensor."""
    if not any(isinstance(value, Node) for value in wanted):
        return low.b.ints(*map(int, wanted))
    return low.b.join([size(low, value) for value in wanted], axis=0)


def rank(node: Node) -> int:
    return len(values.shape(node))


def axis_of(node: Node, source: str = "self", name: str = "dim") -> int:
    """The axis that a call names, counted from the front of its operand."""
    return int_arg(node, name) % rank(node_arg(node, source))


@emits(aten.sym_size.int)
def symbolic_size(low: Lowering, node: Node) -> Value:
    axis = axis_of(node)
    return Value(low.b.op("Shape", low.exact(node_arg(node, "self")), start=axis, end=axis + 1))


@emits(*SIZES)
def size_arithmetic(low: Lowering, node: Node) -> Value:
    """Arithmetic of sizes, none of which is negative where it is divided."""
    return Value(low.b.op(SIZES[node.target], *(size(low, value) for value in node.args)))


@emits(aten.view.default, aten.reshape.default)
def reshape(low: Lowering, node: Node) -> Value:
    wanted = argument(node, "size" if node.target is aten.view.default else "shape")
    return Value(low.b.op("Reshape", low.exact(node_arg(node, "self")), sizes(low, wanted)))


@emits(aten.flatten.using_ints)
def flatten(low: Lowering, node: Node) -> Value:
    x = low.exact(node_arg(node, "self"))
    return Value(merged(low, x, axis_of(node, name="start_dim"), axis_of(node, name="end_dim"), rank(node)))


def merged(low: Lowering, x: str, first: int, last: int, result_rank: int) -> str:
    """Axes first..last of x as one; `result_rank` axes are left."""
    tail = [low.b.op("Shape", x, start=last + 1)] if first < result_rank - 1 else []
    return low.b.op("Reshape", x, low.b.join([low.b.ints(*[0] * first, -1), *tail], axis=0))


@emits(aten.unflatten.int)
def unflatten(low: Lowering, node: Node) -> Value:
    x, axis = low.exact(node_arg(node, "self")), axis_of(node)
    pieces = [low.b.ints(*[0] * axis)] if axis else []
    pieces.append(sizes(low, argument(node, "sizes")))
    pieces += [low.b.op("Shape", x, start=axis + 1)] if axis < rank(node_arg(node, "self")) - 1 else []
    return Value(low.b.op("Reshape", x, low.b.join(pieces, axis=0)))


@emits(aten.unsqueeze.default)
def unsqueeze(low: Lowering, node: Node) -> Value:
    return Value(low.b.op("Unsqueeze", low.exact(node_arg(node, "self")), low.b.ints(int_arg(node, "dim"))))


@emits(aten.squeeze.dim)
def squeeze(low: Lowering, node: Node) -> Value:
    """Without an axis of length 1; with one of another length, as it is."""
    x, source = low.exact(node_arg(node, "self")), node_arg(node, "self")
    return Value(low.b.op("Squeeze", x, low.b.ints(axis_of(node))) if rank(node) < rank(source) else x)


@emits(aten.squeeze.default)
def squeeze_all(low: Lowering, node: Node) -> Value:
    """Without any axis of length 1; batch, tokens and past are longer in the values of a graph, so they are none."""
    x = node_arg(node, "self")
    axes = [axis for axis, length in enumerate(values.shape(x)) if length == 1]
    return Value(low.b.op("Squeeze", low.exact(x), low.b.ints(*axes)) if axes else low.exact(x))


@emits(aten.transpose.int)
def transpose(low: Lowering, node: Node) -> Value:
    order = list(range(rank(node)))
    first, second = axis_of(node, name="dim0"), axis_of(node, name="dim1")
    order[first], order[second] = order[second], order[first]
    return Value(low.b.op("Transpose", low.exact(node_arg(node, "self")), perm=order))


@emits(aten.permute.default)
def permute(low: Lowering, node: Node) -> Value:
    order = [int(axis) % rank(node) for axis in argument(node, "dims")]
    return Value(low.b.op("Transpose", low.exact(node_arg(node, "self")), perm=order))


@emits(aten.slice.Tensor)
def slice_(low: Lowering, node: Node) -> Value:
    """x[start:end:step] along an axis; ends may be computed."""
    start, end = argument(node, "start"), argument(node, "end")
    bounds = [0 if start is None else start, 2**63 - 1 if end is None else end]
    places = [*(size(low, value) for value in bounds), low.b.ints(axis_of(node)), low.b.ints(int_arg(node, "step"))]
    return Value(low.b.op("Slice", low.exact(node_arg(node, "self")), *places))


@emits(aten.select.int)
def select(low: Lowering, node: Node) -> Value:
    """One index of an axis, which goes away."""
    index = low.b.constant(np.int64(int_arg(node, "index")))
    return Value(low.b.op("Gather", low.exact(node_arg(node, "self")), index, axis=axis_of(node)))


@emits(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(low: Lowering, node: Node) -> Pieces:
    """Pieces of the last axis; the lengths of others may change from call to call."""
    axis = axis_of(node)
    if axis != rank(node_arg(node, "self")) - 1:
        raise BackendError(
            f"onnx: node {node.name}: only the last axis can be split; got {node.format_node()}", node=node.name
        )
    lengths = [int(piece.shape[axis]) for piece in values.value(node)]
    return Pieces(tuple(low.b.split(low.exact(node_arg(node, "self")), lengths, axis)))


@emits(operator.getitem)
def getitem(low: Lowering, node: Node) -> Value:
    source, index = node.args
    pieces = low.value(source) if isinstance(source, Node) else None
    if not isinstance(pieces, Pieces) or not isinstance(index, int):
        raise BackendError(
            f"onnx: node {node.name}: expected one of the pieces of a split, got {node.format_node()}", node=node.name
        )
    return Value(pieces.names[index])


@emits(aten.cat.default, aten.concat.default)
def cat(low: Lowering, node: Node) -> Value:
    pieces = [operand(low, piece, values.dtype(node)) for piece in nodes_arg(node, "tensors")]
    return Value(low.b.op("Concat", *pieces, axis=int_arg(node, "dim")))


@emits(aten.stack.default)
def stack(low: Lowering, node: Node) -> Value:
    axis = low.b.ints(int_arg(node, "dim") % rank(node))
    pieces = [low.b.op("Unsqueeze", low.exact(piece), axis) for piece in nodes_arg(node, "tensors")]
    return Value(low.b.op("Concat", *pieces, axis=int_arg(node, "dim") % rank(node)))


@emits(aten.expand.default)
def expand(low: Lowering, node: Node) -> Value:
    """-1 keeps an axis, which Expand says by 1."""
    wanted = [1 if isinstance(value, int) and value == -1 else value for value in argument(node, "size")]
    return Value(low.b.op("Expand", low.exact(node_arg(node, "self")), sizes(low, wanted)))


@emits(aten.repeat.default)
def repeat(low: Lowering, node: Node) -> Value:
    """The whole tensor several times along every axis; axes that it has not are put in front."""
    source, times = node_arg(node, "self"), argument(node, "repeats")
    x, new = low.exact(source), len(times) - rank(source)
    x = low.b.op("Unsqueeze", x, low.b.ints(*range(new))) if new else x
    return Value(low.b.op("Tile", x, sizes(low, times)))


@emits(aten.repeat_interleave.self_int)
def repeat_interleave(low: Lowering, node: Node) -> Value:
    """Every index of an axis several times in a row."""
    axis, times = axis_of(node), int_arg(node, "repeats")
    x = low.b.op("Unsqueeze", low.exact(node_arg(node, "self")), low.b.ints(axis + 1))
    return Value(merged(low, low.b.op("Concat", *[x] * times, axis=axis + 1), axis, axis + 1, rank(node)))


@emits(aten.index_select.default)
def index_select(low: Lowering, node: Node) -> Value:
    index = low.exact(node_arg(node, "index"))
    return Value(low.b.op("Gather", low.exact(node_arg(node, "self")), index, axis=axis_of(node)))


@emits(aten.gather.default)
def gather(low: Lowering, node: Node) -> Value:
    index = low.exact(node_arg(node, "index"))
    return Value(low.b.op("GatherElements", low.exact(node_arg(node, "self")), index, axis=axis_of(node)))


@emits(aten.index.Tensor)
def index(low: Lowering, node: Node) -> Value:
    """x[:, .., i] by Gather; x[i, j, ..] by GatherND of indices broadcast against each other."""
    x, indices = low.exact(node_arg(node, "self")), argument(node, "indices")
    given = [(axis, found) for axis, found in enumerate(indices) if found is not None]
    if len(given) == 1:
        axis, found = given[0]
        return Value(low.b.op("Gather", x, low.exact(found), axis=axis))
    if [axis for axis, _ in given] != list(range(len(given))):
        raise BackendError(
            f"onnx: node {node.name}: indices of axes apart have no ONNX form; got {node.format_node()}", node=node.name
        )
    return Value(low.b.op("GatherND", x, coordinates(low, [low.exact(found) for _, found in given])))


def coordinates(low: Lowering, indices: list[str]) -> str:
    """[..., n]: n indices, broadcast against each other, side by side."""
    b = low.b
    nothing = [b.op("Sub", name, name) for name in indices]
    zero = nothing[0]
    for other in nothing[1:]:
        zero = b.op("Add", zero, other)
    return b.op("Concat", *(b.op("Unsqueeze", b.op("Add", name, zero), b.ints(-1)) for name in indices), axis=-1)


@emits(aten.cumsum.default)
def cumsum(low: Lowering, node: Node) -> Value:
    x = operand(low, node_arg(node, "self"), values.dtype(node))
    return Value(low.b.op("CumSum", x, low.b.constant(np.int64(axis_of(node)))))


@emits(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(low: Lowering, node: Node) -> Value:
    """start, start + step, .. below end, in the type that PyTorch gives it."""
    bounds: dict[str, Any] = {"start": 0, "end": argument(node, "end"), "step": 1}
    if node.target is not aten.arange.default:
        bounds["start"] = argument(node, "start")
    if node.target is aten.arange.start_step:
        bounds["step"] = argument(node, "step")
    return Value(low.b.op("Range", *(scalar(low, value, values.dtype(node)) for value in bounds.values())))


def scalar(low: Lowering, value: Any, dtype: torch.dtype) -> str:
    """A number or a size as a scalar of that type."""
    name = operand(low, value, dtype)
    return low.b.op("Squeeze", name) if isinstance(value, Node) else name


FILLED: dict[Any, str | int] = {
    aten.full.default: "fill_value", aten.zeros.default: 0, aten.ones.default: 1, aten.new_zeros.default: 0, aten.new_ones.default: 1,
}  # fmt: skip


@emits(*FILLED)
def filled(low: Lowering, node: Node) -> Emitted:
    """A constant in every place; a scalar where no sizes are asked for."""
    fill = FILLED[node.target]
    wanted = argument(node, "size")
    value = operand(low, argument(node, fill) if isinstance(fill, str) else fill, values.dtype(node))
    return Value(low.b.op("Expand", value, sizes(low, wanted)) if len(wanted) else value)
