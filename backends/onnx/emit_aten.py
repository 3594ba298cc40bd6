"""Emitters of the aten operators that compiled graphs still hold: embeddings, elementwise operators, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.lowering import Lowering, emits
from resq_compiler.backends.onnx.values import Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir.graph_tools import aten

ELEMENT = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.float64: TensorProto.DOUBLE, torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL,
}  # fmt: skip
BINARY = {
    aten.add.Tensor: "Add", aten.sub.Tensor: "Sub", aten.mul.Tensor: "Mul", aten.div.Tensor: "Div", aten.maximum.default: "Max",
    aten.minimum.default: "Min",
}  # fmt: skip
UNARY = {
    aten.cos.default: "Cos", aten.sin.default: "Sin", aten.tanh.default: "Tanh", aten.relu.default: "Relu", aten.sigmoid.default: "Sigmoid",
    aten.neg.default: "Neg", aten.exp.default: "Exp", aten.sqrt.default: "Sqrt", aten.abs.default: "Abs",
}  # fmt: skip
NO_OPERATION = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)


@emits(aten.embedding.default)
def embedding(low: Lowering, node: Node) -> Value:
    """Rows of a table stored as float16, float32 or INT8 with a scale per row."""
    table, ids = low.tensor(node.args[0]), low.exact(node.args[1])  # type: ignore[arg-type]
    if low.options.embedding == "int8":
        scale = np.maximum(np.abs(table).max(1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        codes = low.b.constant(np.rint(table / scale).astype(np.int8), name=f"{node.name}.codes")
        rows = low.b.op("Cast", low.b.op("Gather", codes, ids, axis=0), to=TensorProto.FLOAT)
        return Value(
            low.b.op("Mul", rows, low.b.op("Gather", low.b.constant(scale, name=f"{node.name}.scale"), ids, axis=0))
        )
    stored = low.b.constant(table.astype(np.dtype(low.options.embedding)), name=f"{node.name}.table")
    rows = low.b.op("Gather", stored, ids, axis=0)
    return Value(rows if low.options.embedding == "float32" else low.b.op("Cast", rows, to=TensorProto.FLOAT))


@emits(aten.linear.default)
def linear(low: Lowering, node: Node) -> Value:
    """A float linear; its weight is stored [K, N]."""
    x, weight, *bias = node.args
    name = low.b.constant(np.ascontiguousarray(low.tensor(weight).T), name=f"{weight.target}.T")  # type: ignore[arg-type,union-attr]
    y = low.b.op("MatMul", low.exact(x), name)
    return Value(low.b.op("Add", y, low.exact(bias[0])) if bias and bias[0] is not None else y)


@emits(*BINARY)
def binary(low: Lowering, node: Node) -> Value:
    """Elementwise operators of two tensors, or of a tensor and a number."""
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise BackendError(
            f"onnx: node {node.name} ({node.target}): only alpha=1 and true division have an ONNX form, got {node.kwargs}"
        )
    names = [low.exact(a) if isinstance(a, Node) else number(low, a, node) for a in node.args[:2]]
    return Value(low.b.op(BINARY[node.target], *names))


def number(low: Lowering, value: Any, node: Node) -> str:
    """A Python number in the type of the result."""
    dtype = node.meta["val"].dtype
    return low.b.constant(np.array(value, torch.empty(0, dtype=dtype).numpy().dtype))


@emits(*UNARY)
def unary(low: Lowering, node: Node) -> Value:
    """Elementwise operators of one tensor."""
    return Value(low.b.op(UNARY[node.target], low.exact(node.args[0])))


@emits(aten.silu.default)
def silu(low: Lowering, node: Node) -> Value:
    """x sigmoid(x); ONNX Runtime makes it one QuickGelu."""
    x = low.exact(node.args[0])
    return Value(low.b.op("Mul", x, low.b.op("Sigmoid", x)))


@emits(aten.gelu.default)
def gelu(low: Lowering, node: Node) -> Value:
    """Gelu, exact or by tanh."""
    return Value(low.b.op("Gelu", low.exact(node.args[0]), approximate=node.kwargs.get("approximate", "none")))


@emits(aten.pow.Tensor_Scalar)
def power(low: Lowering, node: Node) -> Value:
    return Value(low.b.op("Pow", low.exact(node.args[0]), low.b.number(float(node.args[1]))))  # type: ignore[arg-type]


@emits(aten.to.dtype, aten._to_copy.default)
def cast(low: Lowering, node: Node) -> Value:
    dtype = node.meta["val"].dtype
    if dtype not in ELEMENT:
        raise BackendError(
            f"onnx: node {node.name} converts to {dtype}; expected one of {', '.join(map(str, ELEMENT))}"
        )
    return Value(low.b.op("Cast", low.exact(node.args[0]), to=ELEMENT[dtype]))


@emits(*NO_OPERATION)
def same(low: Lowering, node: Node) -> Any:
    return low.value(node.args[0])


@emits(aten.unsqueeze.default)
def unsqueeze(low: Lowering, node: Node) -> Value:
    return Value(low.b.op("Unsqueeze", low.exact(node.args[0]), low.b.ints(int(node.args[1]))))  # type: ignore[arg-type]


@emits(aten.cat.default)
def cat(low: Lowering, node: Node) -> Value:
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    return Value(low.b.op("Concat", *(low.exact(n) for n in node.args[0]), axis=axis))  # type: ignore[union-attr]


@emits(aten.sym_size.int)
def symbolic_size(low: Lowering, node: Node) -> Value:
    axis = int(node.args[1])  # type: ignore[arg-type]
    return Value(low.b.op("Shape", low.exact(node.args[0]), start=axis, end=axis + 1))


@emits(aten.view.default, aten.reshape.default)
def reshape(low: Lowering, node: Node) -> Value:
    """Sizes may be numbers or other nodes."""
    sizes = [low.exact(s) if isinstance(s, Node) else low.b.ints(int(s)) for s in node.args[1]]  # type: ignore[union-attr,arg-type]
    return Value(low.b.op("Reshape", low.exact(node.args[0]), low.b.op("Concat", *sizes, axis=0)))
