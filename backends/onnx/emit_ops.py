"""Emitters of resq_compiler.ops that do not depend on the profile: norms, heads, rotary embedding, projections, Hadamard."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from resq_compiler.backends.onnx.lowering import Lowering, emits
from resq_compiler.backends.onnx.values import Cache, Codes, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten, is_call, placeholders
from resq_compiler.numerics.hadamard import hadamard_plan


@emits(ops.rms_norm)
def rms_norm(low: Lowering, node: Node) -> Value:
    """x / sqrt(mean(x²) + eps) · weight, over columns; heads keep their order."""
    x, weight, eps = node.args
    value = low.value(x)
    heads_wise = isinstance(value, Value) and value.heads > 0 and value.split
    name = low.by_head(value) if heads_wise else low.fx_layout(value)
    width = int(x.meta["val"].shape[-1])  # type: ignore[union-attr]
    gain = low.exact(weight) if weight is not None else low.b.constant(np.ones(width, np.float32), name=f"ones_{width}")
    y = low.form.rms_norm(low, name, gain, float(eps))  # type: ignore[arg-type]
    return Value(y, value.heads, split=True, by_head=True) if heads_wise else Value(y)


@emits(ops.split_heads)
def split_heads(low: Lowering, node: Node) -> Value:
    """Nothing to compute: heads stay token-major."""
    return Value(low.exact(node.args[0]), int(node.args[1]), split=True)  # type: ignore[arg-type]


@emits(ops.merge_heads)
def merge_heads(low: Lowering, node: Node) -> Value:
    """Nothing to compute for token-major heads."""
    value = low.token_major(node.args[0])  # type: ignore[arg-type]
    return Value(value.name, value.heads, split=False, by_head=value.by_head)


@emits(ops.columns)
def columns(low: Lowering, node: Node) -> Value:
    """A piece of the last dimension."""
    value = low.value(node.args[0])
    name = low.piece(node)
    if isinstance(value, Value) and value.heads and value.split:
        return Value(name, value.heads, split=True, by_head=True)
    return Value(name)


@emits(ops.rope)
def rope(low: Lowering, node: Node) -> Value:
    """Rotary embedding of token-major heads, by the form's operator where cos and sin repeat their first half."""
    x, cos, sin = node.args
    value = low.token_major(x)  # type: ignore[arg-type]
    return low.form.rope(low, value, cos, sin, int(x.meta["val"].shape[-1]))  # type: ignore[arg-type,union-attr]


@emits(ops.project)
def project(low: Lowering, node: Node) -> Value:
    """x U, U shared by all heads."""
    x, u, *inverse = node.args
    matrix = low.tensor(u)  # type: ignore[arg-type]
    turned = bool(inverse[0]) if inverse else bool(node.kwargs.get("inverse", False))
    name = low.b.constant(matrix.T if turned else matrix, name=f"{u.target}{'.T' if turned else ''}")  # type: ignore[union-attr]
    value = low.value(x)
    if isinstance(value, Value) and value.heads and value.split:
        return Value(low.b.op("MatMul", low.by_head(value), name), value.heads, split=True, by_head=True)
    return Value(low.b.op("MatMul", low.fx_layout(value), name))


@emits(ops.project_heads)
def project_heads(low: Lowering, node: Node) -> Value:
    """x U with a basis for each key/value head. Token-major heads stay so, as rows of one: a transposition between two products
    and a blocked QuantizeLinear is one that ONNX Runtime 1.31 moves through the quantizer without moving its block axis."""
    x, u, *inverse = node.args
    matrix = low.tensor(u)  # type: ignore[arg-type]
    turned = bool(inverse[0]) if inverse else bool(node.kwargs.get("inverse", False))
    matrix = matrix.swapaxes(1, 2) if turned else matrix
    heads = int(x.meta["val"].shape[1])  # type: ignore[union-attr]
    each = low.b.constant(np.repeat(matrix, heads // len(matrix), 0))
    value = low.value(x)
    if isinstance(value, Value) and value.heads and value.split:
        rows = low.b.op("Unsqueeze", low.by_head(value), low.b.ints(-2))
        turned_rows = low.b.op("Squeeze", low.b.op("MatMul", rows, each), low.b.ints(-2))
        return Value(turned_rows, value.heads, split=True, by_head=True)
    return Value(low.b.op("MatMul", low.exact(x), each))


@emits(ops.project_blocks)
def project_blocks(low: Lowering, node: Node) -> Value:
    """x blockdiag(U), columns reordered: a small product for each block."""
    x, u, order, *inverse = node.args
    if inverse and inverse[0]:
        raise BackendError(
            f"node {node.name}: an inverse of project_blocks is not emitted; fuse-projections multiplies it into a weight"
        )
    groups, size, _ = u.meta["val"].shape  # type: ignore[union-attr]
    rows = low.b.op("Reshape", low.exact(x), low.b.ints(0, 0, groups, 1, size))
    turned = low.b.op("Reshape", low.b.op("MatMul", rows, low.exact(u)), low.b.ints(0, 0, groups * size))
    return Value(low.b.op("Gather", turned, low.exact(order), axis=-1))


@emits(ops.hadamard)
def hadamard(low: Lowering, node: Node) -> Value:
    """x H / sqrt(n) as one small product for each factor of H, never a large constant."""
    width = int(node.meta["val"].shape[-1])
    transpose = bool(argument(node, 1, "transpose", False))
    sizes = argument(node, 2, "sizes", None)
    x = low.exact(node.args[0])
    if sizes is None or len(sizes) == 1:
        return Value(hadamard_factors(low, x, width, transpose))
    pieces = low.b.op("Split", x, low.b.ints(*sizes), outputs=len(sizes), axis=-1)
    return Value(
        low.b.op(
            "Concat", *(hadamard_factors(low, p, n, transpose) for p, n in zip(pieces, sizes, strict=True)), axis=-1
        )
    )


def argument(node: Node, index: int, name: str, default: Any) -> Any:
    """An argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def hadamard_factors(low: Lowering, x: str, width: int, transpose: bool) -> str:
    """One transform, as in numerics/hadamard.py: y[..., j, r] = Σ_i f[i, j] x[..., i, r] for every factor f."""
    plan = hadamard_plan(width)
    right, shape = plan.block, (0, 0, width)
    for index, factor in enumerate(plan.factors):
        matrix = (factor.mT if transpose else factor).numpy()
        if index == len(plan.factors) - 1:
            matrix = matrix / math.sqrt(plan.block)
        order = matrix.shape[0]
        right //= order
        left = width // (order * right)
        wanted = factor_shape(left, order, right)
        x, shape = low.b.op("Reshape", x, low.b.ints(*wanted)) if wanted != shape else x, wanted
        if right == 1:
            x = low.b.op("MatMul", x, low.b.constant(matrix.astype(np.float32)))
        else:
            x = low.b.op("MatMul", low.b.constant(np.ascontiguousarray(matrix.T).astype(np.float32)), x)
    return low.b.op("Reshape", x, low.b.ints(0, 0, width))


def factor_shape(left: int, order: int, right: int) -> tuple[int, ...]:
    """The shape [B, S, ...] in which one factor of order `order` is one product."""
    if right == 1:
        return (0, 0, left, order)
    return (0, 0, order, right) if left == 1 else (0, 0, left, order, right)


@emits(ops.causal_mask)
def causal_mask(low: Lowering, node: Node) -> Value:
    """bool [B, 1, S, T], True = attend."""
    window = argument(node, 2, "window", None)
    b, total, new = low.b, low.length("total"), low.length("sequence")
    zero, one = b.constant(np.int64(0)), b.constant(np.int64(1))
    keys = b.op("Range", zero, total, one)
    queries = b.op("Unsqueeze", b.op("Range", b.op("Sub", total, new), total, one), b.ints(1))
    visible = b.op("LessOrEqual", keys, queries)
    if window is not None:
        visible = b.op("And", visible, b.op("Greater", keys, b.op("Sub", queries, b.constant(np.int64(window)))))
    present = b.op("Cast", b.op("Unsqueeze", low.exact(node.args[0]), b.ints(1, 2)), to=9)
    return Value(b.op("And", visible, present))


@emits(ops.see_prefix)
def see_prefix(low: Lowering, node: Node) -> Value:
    """bool [B, 1, S, P + T]: the mask with P columns of True in front."""
    count, visible = int(node.args[1]), low.b.constant(np.bool_(True))  # type: ignore[arg-type]
    return Value(low.b.op("Pad", low.exact(node.args[0]), low.b.ints(0, 0, 0, count, 0, 0, 0, 0), visible))


@emits(ops.prepend)
def prepend(low: Lowering, node: Node) -> Value:
    """Constant keys or values in front of the cache's, for every row of the batch."""
    prefix, cache = node.args
    values = low.value(prefix).name
    shape = low.b.op("Concat", low.size("input_ids", 0), low.b.ints(*prefix.meta["val"].shape[1:]), axis=0)  # type: ignore[union-attr]
    return Value(low.b.op("Concat", low.b.op("Expand", values, shape), low.exact(cache), axis=2))


@emits(ops.append_cache)
def append_cache(low: Lowering, node: Node) -> Cache:
    """Left to the attention operator, or to the output, whichever takes it."""
    past, new = node.args
    inputs = placeholders(low.gm.graph)
    index, is_value = divmod(inputs.index(past) - 3, 2)  # type: ignore[arg-type]
    spec = low.cache[index]
    width = spec.value_dim if is_value else spec.key_dim
    present = f"present.{index}.{'value' if is_value else 'key'}"
    return low.form.append(low, low.value(past), new, present, spec.num_heads, width)  # type: ignore[arg-type]


@emits(ops.attention)
def attention(low: Lowering, node: Node) -> Value:
    """Grouped-query attention; token-major heads out."""
    q, k, v, mask, scale = node.args[:5]
    softcap = argument(node, 5, "softcap", None)
    return low.form.attention(low, node, q, k, v, mask, float(scale), softcap)  # type: ignore[arg-type]


@emits(ops.quantize)
def quantize(low: Lowering, node: Node) -> Codes:
    bits, groups, clip = int(node.args[1]), int(argument(node, 2, "groups", 1)), float(argument(node, 3, "clip", 1.0))  # type: ignore[arg-type]
    value = low.value(node.args[0])
    width = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
    if groups == 1:
        return low.form.quantize(low, node, low.fx_layout(value), bits, 1, width, clip)
    grouped = isinstance(value, Value) and value.heads == groups and not value.split
    name = low.by_head(value) if grouped else low.b.op("Reshape", low.fx_layout(value), low.b.ints(0, 0, groups, -1))
    return low.form.quantize(low, node, name, bits, groups, width // groups, clip)


@emits(ops.dequantize)
def dequantize(low: Lowering, node: Node) -> Value:
    codes: Codes = low.value(node.args[0])
    image = low.form.image(low, codes)
    return Value(
        image if codes.groups == 1 else low.b.op("Reshape", image, low.b.ints(0, 0, codes.groups * codes.width))
    )


@emits(ops.quantize_dequantize)
def quantize_dequantize(low: Lowering, node: Node) -> Any:
    """The float image of cache codes, per token and head."""
    value = low.token_major(node.args[0])  # type: ignore[arg-type]
    parts, clip = node.args[1], float(argument(node, 2, "clip", 1.0))
    return low.form.cache_codes(low, node, value, tuple(tuple(map(int, p)) for p in parts), clip)  # type: ignore[union-attr]


@emits(ops.quantized_linear, ops.weight_only_linear)
def planned(low: Lowering, node: Node) -> Any:
    """Linears on codes are emitted by the plan, several nodes at once."""
    raise AssertionError(f"{node.name} is in no group of the plan")


def repeats_half(cos: Node) -> bool:
    """True when the table is cat(a, a) behind operators that keep that: its second half equals its first."""
    node: Any = cos
    while is_call(node, aten.unsqueeze.default, aten.cos.default, aten.sin.default, aten.to.dtype, aten.mul.Tensor):
        if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node):
            return False
        node = node.args[0]
    return is_call(node, aten.cat.default) and len(node.args[0]) == 2 and node.args[0][0] is node.args[0][1]
