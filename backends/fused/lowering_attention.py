"""Attention over a quantized cache: its cache inputs become packed, and rope_cache and attention take the place of its nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import HeadParts, head_parts
from resq_compiler.backends.fused.lowering import AttentionSite, Lowering
from resq_compiler.backends.fused.patterns import CacheSide, NormCall, Turned, node_at, padded, turned
from torch.fx import Node

from resq_compiler.errors import QuantError
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call

aten = torch.ops.aten


@dataclass(frozen=True)
class _Attention:
    """An attention node that an operator takes."""

    node: Node
    keys: CacheSide
    values: CacheSide
    key_parts: HeadParts
    value_parts: HeadParts
    scale: float
    softcap: float | None
    window: int | None


def lower_attentions(low: Lowering) -> None:
    """Replace every attention whose cache is quantized; the others get a reason."""
    for node in list(low.graph.find_nodes(op="call_function", target=ops.attention)):
        found = _match(low, node)
        if isinstance(found, str):
            low.reasons[node.name] = found
        else:
            _replace(low, found)


def _match(low: Lowering, node: Node) -> _Attention | str:
    """The view of an attention node, or why no operator takes it."""
    _, k, v, mask, scale, softcap = padded(node, None, None, None, None, None, None)
    if is_call(mask, ops.see_prefix):
        return "it has prefix tokens, which the kernel does not take: compile with prefix_tokens=none"
    if not is_call(mask, ops.causal_mask) or mask.args[0] is not low.mask:
        return "its mask is not causal_mask(attention_mask, ...), which is all the kernel computes"
    keys, values = CacheSide.of(k, low.cache_inputs), CacheSide.of(v, low.cache_inputs)
    if isinstance(keys, str) or isinstance(values, str):
        return keys if isinstance(keys, str) else str(values)
    key_index, value_index = low.cache_inputs.index(keys.past), low.cache_inputs.index(values.past)
    if key_index % 2 or value_index != key_index + 1 or keys.clip != values.clip:
        return "keys and values come from different layers or have different clips"
    try:
        parts = head_parts(keys.spans), head_parts(values.spans)
    except QuantError as e:
        return str(e)
    if parts[0].head_dim != parts[1].head_dim:
        return f"keys of {parts[0].head_dim} and values of {parts[1].head_dim} columns a head"
    window = padded(mask, None, None, None)[2]
    return _Attention(node, keys, values, *parts, scale, softcap, window)


def _replace(low: Lowering, found: _Attention) -> None:
    node, before = found.node, turned(node_at(found.node, 0), found.keys.new)
    _note_left(low, before)
    parts = (found.key_parts.attribute, found.value_parts.attribute)
    cache = (found.keys.past, found.values.past, low.table, low.start)
    with low.graph.inserting_before(node):
        flat = tuple(_heads_last(low, x, node) for x in (before.q, before.k, found.values.new))
        rotation = (*_cos_sin(low, before, node), _bases(low, before, node))
        norms = (before.q_norm, before.k_norm, before.eps)
        arguments = (*flat, *rotation, *cache, *norms, found.keys.clip, *parts, low.target.name)
        q = low.emit(operators.rope_cache, arguments, node)
        attended = (q, *cache, low.visible(), *parts, found.scale, found.window, found.softcap)
        output = low.emit(operators.attention, (*attended, low.target.name), node)
        heads_first = low.emit(aten.transpose.int, (output, 1, 2), node)
    low.attention_sites[heads_first] = AttentionSite(attended, found.value_parts)
    low.replace(node, heads_first)
    low.caches[low.cache_inputs.index(found.keys.past) // 2] = (found.key_parts, found.value_parts)


def _note_left(low: Lowering, before: Turned) -> None:
    """Norms, rotary embedding and bases that queries and keys do not share are computed by PyTorch."""
    for node in (before.q, before.k):
        if is_call(node, ops.project, ops.project_heads, ops.rope) or NormCall.of(node) is not None:
            low.left[node.name] = "queries and keys differ in it, or it has other readers, or it comes out of order"


def _heads_last(low: Lowering, x: Node, node: Node) -> Node:
    """x [B, H, S, D] as [B, S, H * D]: what it was split from, if it was."""
    return node_at(x, 0) if is_call(x, ops.split_heads) else low.emit(ops.merge_heads, (x,), node)


def _cos_sin(low: Lowering, before: Turned, node: Node) -> tuple[Node, Node]:
    """cos and sin [B, S, R]; without rotation, zero columns of something that has the right leading dimensions."""
    if before.cos_sin is not None:
        cos, sin = (low.emit(aten.squeeze.dim, (table, 1), node) for table in before.cos_sin)
        return cos, sin
    column = low.emit(aten.unsqueeze.default, (low.positions, 2), node)
    nothing = low.emit(ops.columns, (low.emit(aten.to.dtype, (column, torch.float32), node), 0, 0), node)
    return nothing, nothing


def _bases(low: Lowering, before: Turned, node: Node) -> Node | None:
    """The basis as [1 or G, D, D]."""
    if before.u is not None and low.value_of(before.u).dim() == 2:
        return low.emit(aten.unsqueeze.default, (before.u, 0), node)
    return before.u
