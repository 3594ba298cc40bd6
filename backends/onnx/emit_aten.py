"""Emitters of aten operators that compute values: embeddings, float linears, elementwise operators, comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.lowering import Lowering, element_type
from resq_compiler.backends.onnx.registry import emits
from resq_compiler.backends.onnx.values import Emitted, Pieces, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.args import argument, int_arg, node_arg, operands
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Embedding, Linear

BINARY: dict[Any, str] = {
    aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div", aten.maximum.default: "Max",
    aten.minimum.default: "Min", aten.max.other: "Max", aten.min.other: "Min", aten.pow.Tensor_Scalar: "Pow",
    aten.pow.Tensor_Tensor: "Pow", aten.pow.Scalar: "Pow",
}  # fmt: skip
COMPARISON: dict[Any, str] = {
    aten.gt.Scalar: "Greater", aten.gt.Tensor: "Greater", aten.ge.Scalar: "GreaterOrEqual", aten.ge.Tensor: "GreaterOrEqual",
    aten.lt.Scalar: "Less", aten.lt.Tensor: "Less", aten.le.Scalar: "LessOrEqual", aten.le.Tensor: "LessOrEqual",
    aten.eq.Scalar: "Equal", aten.eq.Tensor: "Equal",
}  # fmt: skip
LOGICAL: dict[Any, str] = {
    aten.__and__.Tensor: "And", aten.bitwise_and.Tensor: "And", aten.logical_and.default: "And",
    aten.__or__.Tensor: "Or", aten.bitwise_or.Tensor: "Or", aten.logical_or.default: "Or",
}  # fmt: skip
UNARY: dict[Any, str] = {
    aten.cos.default: "Cos", aten.sin.default: "Sin", aten.tanh.default: "Tanh", aten.relu.default: "Relu", aten.sigmoid.default: "Sigmoid",
    aten.neg.default: "Neg", aten.exp.default: "Exp", aten.sqrt.default: "Sqrt", aten.abs.default: "Abs", aten.log.default: "Log",
    aten.floor.default: "Floor", aten.reciprocal.default: "Reciprocal",
}  # fmt: skip
NO_OPERATION = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)


@emits(aten.embedding.default)
def embedding(low: Lowering, node: Node) -> Value:
    """Rows of a table stored as float16, float32 or INT8 with a scale per row. "lm_head" is about tokens; other tables are float16 then."""
    view = Embedding.require(node)
    ids, shape = low.exact(view.ids), graph_tools.held(low.gm, view.table).shape
    if low.options.embedding == "int8":
        return Value(int8_rows(low, view.table, ids, node.name))
    dtype = np.dtype("float16" if low.options.embedding == "lm_head" else low.options.embedding)
    pieces = low.pieces if dtype == np.float32 else low.chunks  # where nothing changes, nothing is copied
    make = lambda: map(lambda piece: piece.astype(dtype, copy=False), pieces(view.table))  # noqa: E731
    rows = low.b.op("Gather", low.b.later(f"{node.name}.table", shape, dtype, make), ids, axis=0)
    return Value(rows if low.options.embedding == "float32" else low.b.op("Cast", rows, to=TensorProto.FLOAT))


def int8_rows(low: Lowering, table: Node, ids: str, name: str) -> str:
    """codes[ids] * scale[ids], symmetric, 127 steps on each side."""
    count, width = graph_tools.held(low.gm, table).shape
    codes = low.b.later(f"{name}.codes", (count, width), np.int8, lambda: map(int8_codes, low.chunks(table)))
    scale = low.b.later(f"{name}.scale", (count, 1), np.float32, lambda: map(int8_scale, low.chunks(table)))
    rows = low.b.op("Cast", low.b.op("Gather", codes, ids, axis=0), to=TensorProto.FLOAT)
    return low.b.op("Mul", rows, low.b.op("Gather", scale, ids, axis=0))


def int8_scale(rows: np.ndarray) -> np.ndarray:
    """A step for each row, [n, 1]."""
    steps = np.maximum(np.abs(rows).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    return steps.astype(np.float32)


def int8_codes(rows: np.ndarray) -> np.ndarray:
    """Codes in these steps."""
    return np.rint(rows / int8_scale(rows)).astype(np.int8)


@emits(aten.linear.default)
def linear(low: Lowering, node: Node) -> Value:
    """A float linear; its weight is stored [K, N]."""
    view = Linear.require(node)
    shape = graph_tools.held(low.gm, view.weight).shape[::-1]
    name = low.b.later(f"{view.weight.target}.T", shape, np.float32, lambda: (low.tensor(view.weight).T,))
    y = low.b.op("MatMul", low.exact(view.x), name)
    return Value(y if view.bias is None else low.b.op("Add", y, low.exact(view.bias)))


def operand(low: Lowering, value: Any, dtype: torch.dtype) -> str:
    """A tensor or a number as a tensor of that type."""
    if not isinstance(value, Node):
        return low.b.constant(np.array(value, torch.empty(0, dtype=stored(dtype)).numpy().dtype))
    name, found = low.exact(value), values.value(value)
    given = found.dtype if isinstance(found, torch.Tensor) else torch.int64  # a size is int64
    if given == dtype:
        return name
    name = name if stored(given) == stored(dtype) else low.b.op("Cast", name, to=element_type(stored(dtype)))
    return rounded(low, name, dtype)


def stored(dtype: torch.dtype) -> torch.dtype:
    """The type of a value in ONNX: bfloat16, which few ONNX operators take, is float32 that is rounded after every operator."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def rounded(low: Lowering, name: str, dtype: torch.dtype) -> str:
    """A result in the precision of its type."""
    if dtype != torch.bfloat16:
        return name
    return low.b.op("Cast", low.b.op("Cast", name, to=TensorProto.BFLOAT16), to=TensorProto.FLOAT)


@emits(*BINARY)
def binary(low: Lowering, node: Node) -> Value:
    """Elementwise operators of two tensors, or of a tensor and a number, in the type of the result."""
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise BackendError(
            f"onnx: node {node.name} ({node.target}): only alpha=1 and true division have an ONNX form, got {node.kwargs}",
            node=node.name,
        )
    dtype = values.dtype(node)
    y = low.b.op(BINARY[node.target], *(operand(low, value, dtype) for value in operands(node)))
    return Value(rounded(low, y, dtype))


@emits(*COMPARISON)
def comparison(low: Lowering, node: Node) -> Value:
    """Comparisons, in the type that PyTorch compares in."""
    pair = operands(node)
    dtype = torch.result_type(*(values.value(v) if isinstance(v, Node) else v for v in pair))
    return Value(low.b.op(COMPARISON[node.target], *(operand(low, value, dtype) for value in pair)))


@emits(aten.ne.Scalar, aten.ne.Tensor)
def unequal(low: Lowering, node: Node) -> Value:
    pair = operands(node)
    dtype = torch.result_type(*(values.value(v) if isinstance(v, Node) else v for v in pair))
    return Value(low.b.op("Not", low.b.op("Equal", *(operand(low, value, dtype) for value in pair))))


@emits(*LOGICAL)
def logical(low: Lowering, node: Node) -> Value:
    """And and or of masks."""
    if values.dtype(node) != torch.bool:
        raise BackendError(
            f"onnx: node {node.name} ({node.target}): expected masks, got {values.dtype(node)}", node=node.name
        )
    return Value(low.b.op(LOGICAL[node.target], *(operand(low, value, torch.bool) for value in operands(node))))


@emits(aten.logical_not.default, aten.bitwise_not.default)
def negated(low: Lowering, node: Node) -> Value:
    """Not of a mask."""
    if values.dtype(node) != torch.bool:
        raise BackendError(
            f"onnx: node {node.name} ({node.target}): expected a mask, got {values.dtype(node)}", node=node.name
        )
    return Value(low.b.op("Not", operand(low, node_arg(node, "self"), torch.bool)))


@emits(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(low: Lowering, node: Node) -> Value:
    dtype = values.dtype(node)
    first, second = (operand(low, argument(node, name), dtype) for name in ("self", "other"))
    return Value(low.b.op("Where", low.exact(node_arg(node, "condition")), first, second))


@emits(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(low: Lowering, node: Node) -> Value:
    """`value` where the mask is True."""
    dtype = values.dtype(node)
    kept, value = (operand(low, argument(node, name), dtype) for name in ("self", "value"))
    return Value(low.b.op("Where", low.exact(node_arg(node, "mask")), value, kept))


@emits(*UNARY)
def unary(low: Lowering, node: Node) -> Value:
    """Elementwise operators of one tensor."""
    dtype = values.dtype(node)
    return Value(rounded(low, low.b.op(UNARY[node.target], operand(low, node_arg(node, "self"), dtype)), dtype))


@emits(aten.square.default)
def square(low: Lowering, node: Node) -> Value:
    x = low.exact(node_arg(node, "self"))
    return Value(low.b.op("Mul", x, x))


@emits(aten.rsqrt.default)
def rsqrt(low: Lowering, node: Node) -> Value:
    return Value(low.b.op("Reciprocal", low.b.op("Sqrt", low.exact(node_arg(node, "self")))))


@emits(aten.expm1.default)
def expm1(low: Lowering, node: Node) -> Value:
    """exp(x) - 1 = tanh(x / 2) (exp(x) + 1), which cancels nothing near 0."""
    b, x = low.b, low.exact(node_arg(node, "self"))
    half = b.op("Tanh", b.op("Mul", x, operand(low, 0.5, values.dtype(node))))
    return Value(b.op("Mul", half, b.op("Add", b.op("Exp", x), operand(low, 1.0, values.dtype(node)))))


@emits(aten.silu.default)
def silu(low: Lowering, node: Node) -> Value:
    """x sigmoid(x); ONNX Runtime makes it one QuickGelu."""
    x = low.exact(node_arg(node, "self"))
    return Value(low.b.op("Mul", x, low.b.op("Sigmoid", x)))


@emits(aten.gelu.default)
def gelu(low: Lowering, node: Node) -> Value:
    """Gelu, exact or by tanh."""
    return Value(low.b.op("Gelu", low.exact(node_arg(node, "self")), approximate=argument(node, "approximate")))


@emits(aten.to.dtype, aten._to_copy.default, aten.to.device)
def cast(low: Lowering, node: Node) -> Value:
    """Another type; devices mean nothing here."""
    return Value(operand(low, node_arg(node, "self"), values.dtype(node)))


@emits(aten.clamp.default)
def clamp(low: Lowering, node: Node) -> Value:
    """Numbers as bounds; none is none."""
    dtype = values.dtype(node)
    bounds = [argument(node, name) for name in ("min", "max")]
    given = ["" if bound is None else operand(low, bound, dtype) for bound in bounds]
    return Value(low.b.op("Clip", operand(low, node_arg(node, "self"), dtype), *given))


@emits(aten.clamp.Tensor)
def clamp_between(low: Lowering, node: Node) -> Value:
    """Tensors as bounds, which broadcast; the upper one holds where they cross."""
    dtype = values.dtype(node)
    x = operand(low, node_arg(node, "self"), dtype)
    for name, target in (("min", "Max"), ("max", "Min")):
        bound = argument(node, name)
        x = x if bound is None else low.b.op(target, x, operand(low, bound, dtype))
    return Value(x)


@emits(aten.softmax.int)
def softmax(low: Lowering, node: Node) -> Value:
    return Value(
        low.b.op("Softmax", operand(low, node_arg(node, "self"), values.dtype(node)), axis=int_arg(node, "dim"))
    )


@emits(aten.sum.dim_IntList)
def sum_over(low: Lowering, node: Node) -> Value:
    """Over some axes, in the type of the result."""
    axes = low.b.ints(*argument(node, "dim"))
    x = operand(low, node_arg(node, "self"), values.dtype(node))
    return Value(low.b.op("ReduceSum", x, axes, keepdims=int(argument(node, "keepdim"))))


@emits(aten.topk.default)
def topk(low: Lowering, node: Node) -> Pieces:
    """Values and indices in order; of equal values the first."""
    names = low.b.fresh("topk"), low.b.fresh("topk_indices")
    attributes = {"axis": int_arg(node, "dim"), "largest": int(argument(node, "largest")), "sorted": 1}
    x, count = low.exact(node_arg(node, "self")), low.b.ints(int_arg(node, "k"))
    return Pieces(tuple(low.b.several("TopK", x, count, outputs=names, **attributes)))


@emits(aten.scatter.value)
def scatter(low: Lowering, node: Node) -> Value:
    """One number at the indices along an axis."""
    x, index = low.exact(node_arg(node, "self")), low.exact(node_arg(node, "index"))
    number = operand(low, argument(node, "value"), values.dtype(node))
    updates = low.b.op("Expand", number, low.b.op("Shape", index))
    return Value(low.b.op("ScatterElements", x, index, updates, axis=int_arg(node, "dim")))


@emits(aten.zeros_like.default, aten.ones_like.default)
def filled_like(low: Lowering, node: Node) -> Value:
    number = operand(low, int(node.target is aten.ones_like.default), values.dtype(node))
    return Value(low.b.op("Expand", number, low.b.op("Shape", low.exact(node_arg(node, "self")))))


@emits(aten.max.dim, aten.min.dim)
def extreme_along(low: Lowering, node: Node) -> Pieces:
    """The largest or smallest values along a dimension, and the first index of each."""
    kind = "Max" if node.target is aten.max.dim else "Min"
    x, axis, keep = low.exact(node_arg(node, "self")), int_arg(node, "dim"), int(argument(node, "keepdim"))
    found = low.b.op(f"Reduce{kind}", x, low.b.ints(axis), keepdims=keep)
    return Pieces((found, low.b.op(f"Arg{kind}", x, axis=axis, keepdims=keep)))


@emits(aten.max.default, aten.min.default)
def extreme(low: Lowering, node: Node) -> Value:
    """The largest or smallest of all values, a scalar."""
    kind = "ReduceMax" if node.target is aten.max.default else "ReduceMin"
    return Value(low.b.op(kind, low.exact(node_arg(node, "self")), keepdims=0))


@emits(*NO_OPERATION)
def same(low: Lowering, node: Node) -> Emitted:
    return low.value(node_arg(node, "self"))
