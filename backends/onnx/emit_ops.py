"""Emitters of resq_compiler.ir.ops that do not depend on the profile: norms, heads, rotary embedding, projections, Hadamard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.expert_products import choices_of, expert_products
from resq_compiler.backends.onnx.lowering import Lowering
from resq_compiler.backends.onnx.plan import ExpertProduct
from resq_compiler.backends.onnx.registry import emits
from resq_compiler.backends.onnx.values import Codes, Emitted, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops, values
from resq_compiler.ir.args import argument, int_arg, node_arg
from resq_compiler.ir.expert_views import CombineExperts, ExpertBias
from resq_compiler.ir.graph_tools import aten, placeholders
from resq_compiler.ir.mask_views import CausalMask
from resq_compiler.ir.views import (
    AppendCache,
    Attention,
    Columns,
    Dequantize,
    Hadamard,
    Linear,
    MergeHeads,
    Norm,
    PermuteChannels,
    Project,
    ProjectBlocks,
    ProjectKronecker,
    Quantize,
    QuantizeDequantize,
    Rope,
    ScaleChannels,
    SplitHeads,
)
from resq_compiler.numerics.hadamard import hadamard_plan


def like(name: str, heads: int) -> Value:
    """What an operator over columns made of a value that `columns_last` gave."""
    return Value(name, heads, split=True, by_head=True) if heads else Value(name)


def gain_of(low: Lowering, norm: Norm) -> str:
    """The gain of a norm; ones where it has none."""
    if norm.gain is not None:
        return low.exact(norm.gain)
    width = values.width(norm.x)
    return low.b.constant(np.ones(width, np.float32), name=f"ones_{width}")


@emits(ops.rms_norm)
def rms_norm(low: Lowering, node: Node) -> Value:
    """x / sqrt(mean(x²) + eps) · weight, over columns; heads keep their order."""
    norm = Norm.require(node)
    name, heads = low.columns_last(norm.x)
    return like(low.form.rms_norm(low, name, gain_of(low, norm), norm.eps), heads)


@emits(aten.layer_norm.default)
def layer_norm(low: Lowering, node: Node) -> Value:
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over columns; heads keep their order."""
    norm, shape = Norm.require(node), argument(node, "normalized_shape")
    if len(shape) != 1:
        raise BackendError(
            f"onnx: node {node.name}: expected a norm over the last dimension, got one over {shape}", node=node.name
        )
    name, heads = low.columns_last(norm.x)
    bias = [] if norm.bias is None else [low.exact(norm.bias)]
    return like(low.b.op("LayerNormalization", name, gain_of(low, norm), *bias, axis=-1, epsilon=norm.eps), heads)


@emits(ops.split_heads)
def split_heads(low: Lowering, node: Node) -> Value:
    """Nothing to compute: heads stay token-major."""
    view = SplitHeads.require(node)
    return Value(low.exact(view.x), view.num_heads, split=True)


@emits(ops.merge_heads)
def merge_heads(low: Lowering, node: Node) -> Value:
    """Nothing to compute for token-major heads."""
    value = low.token_major(MergeHeads.require(node).x)
    return Value(value.name, value.heads, split=False, by_head=value.by_head)


@emits(ops.columns)
def columns(low: Lowering, node: Node) -> Value:
    """A piece of the last dimension."""
    view = Columns.require(node)
    value = low.value(view.x)
    return like(low.piece(view), value.heads if isinstance(value, Value) and value.is_split else 0)


@emits(ops.rope)
def rope(low: Lowering, node: Node) -> Value:
    """Rotary embedding of token-major heads, by the form's operator where cos and sin repeat their first half."""
    view = Rope.require(node)
    return low.form.rope(low, low.token_major(view.x), view.cos, view.sin, values.width(view.x))


@emits(ops.project)
def project(low: Lowering, node: Node) -> Value:
    """x U, U shared by all heads."""
    view = Project.require(node)
    matrix, name = low.tensor(view.u), str(view.u.target)
    u = low.b.constant(matrix.T, name=f"{name}.T") if view.inverse else low.b.constant(matrix, name=name)
    x, heads = low.columns_last(view.x)
    return like(low.b.op("MatMul", x, u), heads)


@emits(ops.project_heads)
def project_heads(low: Lowering, node: Node) -> Value:
    """x U with a basis for each key/value head. Token-major heads stay so, as rows of one: a transposition between two products
    and a blocked QuantizeLinear is one that ONNX Runtime 1.31 moves through the quantizer without moving its block axis."""
    view = Project.require(node)
    matrix = low.tensor(view.u)
    matrix = matrix.swapaxes(1, 2) if view.inverse else matrix
    each = low.b.constant(np.repeat(matrix, int(values.shape(view.x)[1]) // len(matrix), 0))
    x, heads = low.columns_last(view.x)
    if not heads:
        return Value(low.b.op("MatMul", x, each))
    rows = low.b.op("Unsqueeze", x, low.b.ints(-2))
    return like(low.b.op("Squeeze", low.b.op("MatMul", rows, each), low.b.ints(-2)), heads)


@emits(ops.project_blocks)
def project_blocks(low: Lowering, node: Node) -> Value:
    """x blockdiag(U), columns reordered: a small product for each block."""
    view = ProjectBlocks.require(node)
    if view.inverse:
        raise BackendError(
            f"onnx: node {node.name}: an inverse of project_blocks is not emitted; fuse-projections multiplies it into a weight",
            node=node.name,
        )
    groups, size, _ = values.shape(view.u)
    rows = low.b.op("Reshape", low.rows(view.x), low.b.ints(0, 0, groups, 1, size))
    turned = low.b.op("Reshape", low.b.op("MatMul", rows, low.exact(view.u)), low.b.ints(0, 0, groups * size))
    return Value(low.as_fx(low.b.op("Gather", turned, low.exact(view.order), axis=-1), view.x))


@emits(ops.project_kronecker)
def project_kronecker(low: Lowering, node: Node) -> Value:
    """x (A ⊗ B): rows as matrices, between two small products."""
    view = ProjectKronecker.require(node)
    a, b = (np.linalg.inv(m) if view.inverse else m for m in (low.tensor(view.a), low.tensor(view.b)))
    rows = low.b.op("Reshape", low.rows(view.x), low.b.ints(0, 0, len(a), len(b)))
    left = low.b.op("MatMul", low.b.constant(np.ascontiguousarray(a.T)), rows)
    both = low.b.op("MatMul", left, low.b.constant(b))
    return Value(low.as_fx(low.b.op("Reshape", both, low.b.ints(0, 0, len(a) * len(b))), view.x))


@emits(ops.scale_channels)
def scale_channels(low: Lowering, node: Node) -> Value:
    """x · s or x / s, over columns; heads keep their order."""
    view = ScaleChannels.require(node)
    x, heads = low.columns_last(view.x)
    return like(low.b.op("Div" if view.inverse else "Mul", x, low.exact(view.s)), heads)


@emits(ops.permute_channels)
def permute_channels(low: Lowering, node: Node) -> Value:
    """Columns in another order; heads keep theirs."""
    view = PermuteChannels.require(node)
    order = low.tensor(view.order)
    x, heads = low.columns_last(view.x)
    return like(low.b.op("Gather", x, low.b.constant(np.argsort(order) if view.inverse else order), axis=-1), heads)


@emits(ops.hadamard)
def hadamard(low: Lowering, node: Node) -> Value:
    view = Hadamard.require(node)
    return hadamard_of(low, view.x, view.transpose, view.sizes or ())


def hadamard_of(low: Lowering, x: Node, transpose: bool, sizes: Sequence[int]) -> Value:
    """x H / sqrt(n) as one small product for each factor of H, never a large constant. sizes: empty for one transform."""
    sizes = sizes or (values.width(x),)
    pieces = low.b.split(low.rows(x), sizes)
    turned = low.b.join([hadamard_factors(low, p, n, transpose) for p, n in zip(pieces, sizes, strict=True)])
    return Value(low.as_fx(turned, x))


def hadamard_factors(low: Lowering, x: str, width: int, transpose: bool) -> str:
    """One transform, as in numerics/hadamard.py: y[..., j, r] = Σ_i f[i, j] x[..., i, r] for every factor f."""
    plan = hadamard_plan(width)
    right = plan.block
    shape: tuple[int, ...] = (0, 0, width)
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
    view, b, total, new = CausalMask.require(node), low.b, low.length("total"), low.length("sequence")
    zero, one = b.constant(np.int64(0)), b.constant(np.int64(1))
    keys = b.op("Range", zero, total, one)
    queries = b.op("Unsqueeze", b.op("Range", b.op("Sub", total, new), total, one), b.ints(1))
    visible = b.op("LessOrEqual", keys, queries)
    if view.window is not None:
        oldest = b.op("Sub", queries, b.constant(np.int64(view.window)))
        visible = b.op("And", visible, b.op("Greater", keys, oldest))
    present = b.op("Cast", b.op("Unsqueeze", low.exact(view.attention_mask), b.ints(1, 2)), to=TensorProto.BOOL)
    return Value(b.op("And", visible, present))


@emits(ops.see_prefix)
def see_prefix(low: Lowering, node: Node) -> Value:
    """bool [B, 1, S, P + T]: the mask with P columns of True in front."""
    count, visible = int_arg(node, "length"), low.b.constant(np.bool_(True))
    return Value(low.b.op("Pad", low.exact(node_arg(node, "mask")), low.b.ints(0, 0, 0, count, 0, 0, 0, 0), visible))


@emits(ops.prepend)
def prepend(low: Lowering, node: Node) -> Value:
    """Constant keys or values in front of the cache's, for every row of the batch."""
    prefix, cache = node_arg(node, "prefix"), node_arg(node, "x")
    shape = low.b.join([low.size("input_ids", 0), low.b.ints(*values.shape(prefix)[1:])], axis=0)
    return Value(low.b.op("Concat", low.b.op("Expand", low.exact(prefix), shape), low.exact(cache), axis=2))


@emits(ops.append_cache)
def append_cache(low: Lowering, node: Node) -> Emitted:
    """Left to the attention operator, or to the output, whichever takes it."""
    view = AppendCache.require(node)
    index, is_value = divmod(placeholders(low.gm.graph).index(view.past) - 3, 2)
    spec = low.cache[index]
    width = spec.value_dim if is_value else spec.key_dim
    present = f"present.{index}.{'value' if is_value else 'key'}"
    return low.form.append(low, low.value(view.past), view.new, present, spec.num_heads, width)


@emits(ops.attention)
def attention(low: Lowering, node: Node) -> Value:
    """Grouped-query attention; token-major heads out."""
    return low.form.attention(low, Attention.require(node))


@emits(ops.quantize)
def quantize(low: Lowering, node: Node) -> Codes:
    """Codes per token, or per token and group of columns."""
    view = Quantize.require(node)
    value = low.value(view.x)
    if view.scale is not None:
        return low.form.quantize_static(low, view, low.rows(view.x))
    if view.groups == 1:
        return low.form.quantize(low, node, low.rows(view.x), view.bits, 1, view.columns, view.clip)
    grouped = isinstance(value, Value) and value.heads == view.groups and not value.split
    if isinstance(value, Value) and grouped:
        name = low.by_head(value)
    else:
        name = low.b.op("Reshape", low.rows(view.x), low.b.ints(0, 0, view.groups, -1))
    return low.form.quantize(low, node, name, view.bits, view.groups, view.columns // view.groups, view.clip)


@emits(ops.dequantize)
def dequantize(low: Lowering, node: Node) -> Value:
    """The float image of codes, [B, S, K]."""
    codes = low.value(Dequantize.require(node).codes)
    if not isinstance(codes, Codes):
        raise BackendError(
            f"onnx: node {node.name}: expected codes of quantize, got {node.format_node()}", node=node.name
        )
    image = low.form.image(low, codes)
    width = codes.groups * codes.width
    rows = image if codes.groups == 1 else low.b.op("Reshape", image, low.b.ints(0, 0, width))
    return Value(low.as_fx(rows, node))


@emits(ops.quantize_dequantize)
def quantize_dequantize(low: Lowering, node: Node) -> Emitted:
    """The float image of cache codes, per token and head."""
    view = QuantizeDequantize.require(node)
    return low.form.cache_codes(low, view, low.token_major(view.x))


@emits(ops.add_expert_bias)
def add_expert_bias(low: Lowering, node: Node) -> Value:
    """x plus the bias of each choice's expert."""
    view = ExpertBias.require(node)
    chosen = low.b.op("Gather", low.exact(view.bias), low.exact(view.indices), axis=0)
    shape = low.choice_shape(choices_of(node))
    return Value(low.b.op("Add", low.exact(view.x), low.b.op("Reshape", chosen, shape)))


@emits(ops.combine_experts)
def combine_experts(low: Lowering, node: Node) -> Value:
    """The sum of a token's choices, weighted by its router."""
    view = CombineExperts.require(node)
    weights = low.b.op("Reshape", low.exact(view.weights), low.choice_shape(choices_of(view.y)))
    return Value(low.b.op("ReduceSum", low.b.op("Mul", low.exact(view.y), weights), low.b.ints(-2), keepdims=0))


@emits(ops.expert_linear)
def expert_linear(low: Lowering, node: Node) -> Value:
    """Float weights of experts, in a loop of its own; its bias behind it."""
    view = Linear.require(node)
    (y,) = expert_products(low, [ExpertProduct(node, (view,))])
    if view.bias is None:
        return y
    chosen = low.b.op("Gather", low.exact(view.bias), low.exact(node_arg(node, "indices")), axis=0)
    return Value(low.b.op("Add", y.name, low.b.op("Reshape", chosen, low.choice_shape(choices_of(node)))))


@emits(
    ops.quantized_linear, ops.weight_only_linear, ops.quantized_expert_linear, ops.weight_only_expert_linear
)  # fmt: skip
def planned(low: Lowering, node: Node) -> Emitted:
    """Linears on codes are emitted by the plan, several nodes at once."""
    raise AssertionError(f"{node.name} is in no group of the plan")
