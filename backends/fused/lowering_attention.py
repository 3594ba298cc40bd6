"""Attention over a quantized cache: its cache inputs become packed, and rope_cache and attention take the place of its nodes.

Where several attentions read the same keys and values, the first appends them; the others have their queries from the graph's own
operators. A cache is packed for all of them, or for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.alibi import alibi_slopes
from resq_compiler.backends.fused.foreseen import LATENT, is_latent
from resq_compiler.backends.fused.formats import HeadParts, head_parts
from resq_compiler.backends.fused.lowering import AttentionSite, Lowering
from resq_compiler.backends.fused.lowering_latent import lower_latents
from resq_compiler.backends.fused.patterns import CacheSide, Turned, turned
from torch import Tensor
from torch.fx import Node

from resq_compiler.errors import QuantError
from resq_compiler.ir import ops
from resq_compiler.ir.args import node_arg
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.mask_views import CausalMask
from resq_compiler.ir.views import Attention, Norm, Project, Rope, SplitHeads

aten = torch.ops.aten


@dataclass(frozen=True)
class _Scores:
    """What happens to scores beyond their scale and cap; nodes of the graph, slopes as a tensor that is none yet."""

    window: int | None
    sinks: Node | None
    prefix: tuple[Node, Node] | None
    slopes: Tensor | None


@dataclass(frozen=True)
class _Match:
    """An attention that an operator takes."""

    attention: Attention
    keys: CacheSide
    values: CacheSide
    key_parts: HeadParts
    value_parts: HeadParts
    scores: _Scores


def lower_attentions(low: Lowering) -> None:
    """Replace every attention whose cache is quantized; the others get a reason."""
    latent: list[Attention] = []
    matches: dict[Node, _Match | str] = {}
    for node in list(low.graph.find_nodes(op="call_function", target=ops.attention)):
        view = Attention.require(node)
        if is_latent(view) and low.target.why_not_entry is not None:
            latent.append(view)
            continue
        matches[node] = _match(low, view)
    refused = {Attention.require(node).k: node.name for node, found in matches.items() if isinstance(found, str)}
    for node, found in matches.items():
        if isinstance(found, str):
            low.reasons[node.name] = found
        elif found.attention.k in refused:
            other = refused[found.attention.k]
            low.reasons[node.name] = f"node {other} reads the same keys and values, and cannot be taken"
        else:
            _replace(low, found)
    lower_latents(low, latent)


def _match(low: Lowering, attention: Attention) -> _Match | str:
    """What an operator needs to know, or why none takes this attention."""
    scores = _scores(low, attention)
    if isinstance(scores, str):
        return scores
    if is_latent(attention):
        return LATENT
    keys, values = (CacheSide.of(behind_prefix(x), low.cache_inputs) for x in (attention.k, attention.v))
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
    reason = low.target.why_not_head(parts[0].head_dim)
    if reason is not None:
        return reason
    return _Match(attention, keys, values, *parts, scores)


def _scores(low: Lowering, attention: Attention) -> _Scores | str:
    """What happens to the scores, or why the target does not compute it."""
    sinks, takes = attention.sinks, low.target.takes
    if sinks is not None and "sinks" not in takes:
        return "it has sinks, which the kernel does not take: use the reference backend"
    mask, prefix = attention.mask, None
    if is_call(mask, ops.see_prefix):
        if "prefix" not in takes:
            return "it has prefix tokens, which the kernel does not take: compile with prefix_tokens=none"
        prefix, mask = (node_arg(attention.k, "prefix"), node_arg(attention.v, "prefix")), node_arg(mask, "mask")
    view = CausalMask.of(mask)
    if view is not None and view.attention_mask is low.mask:
        return _Scores(view.window, sinks, prefix, None)
    slopes = None if mask is None or prefix is not None else alibi_slopes(low.gm, mask, low.inputs)
    if slopes is None:
        return "its mask is neither causal_mask(attention_mask, ...) nor a slope for each head (ALiBi) beside it"
    if "slopes" not in takes:
        return "its mask has a slope for each head (ALiBi), which the kernel does not take: use the reference backend"
    return _Scores(None, sinks, None, slopes)


def behind_prefix(x: Node) -> Node:
    """The cache behind prefix tokens, if there are any."""
    return node_arg(x, "x") if is_call(x, ops.prepend) else x


def _replace(low: Lowering, found: _Match) -> None:
    attention, node = found.attention, found.attention.node
    parts = (found.key_parts.attribute, found.value_parts.attribute)
    cache = (found.keys.past, found.values.past, low.table, low.start)
    written = low.caches[low.cache_inputs.index(found.keys.past) // 2] is not None
    with low.graph.inserting_before(node):
        q = _queries(low, found) if written else _appended(low, found)
        attended = (
            q,
            *cache,
            low.visible(),
            *parts,
            attention.scale,
            found.scores.window,
            attention.softcap,
            *_extras(low, found),
        )
        output = low.emit(operators.attention, (*attended, low.target.name), node)
        heads_first = low.emit(aten.transpose.int, (output, 1, 2), node)
    low.attention_sites[heads_first] = AttentionSite(attended, found.value_parts)
    low.replace(node, heads_first)
    low.caches[low.cache_inputs.index(found.keys.past) // 2] = (found.key_parts, found.value_parts)


def _appended(low: Lowering, found: _Match) -> Node:
    """Queries [B, S, H, D] as attention reads them; keys and values of the new tokens enter the cache."""
    node = found.attention.node
    before = turned(found.attention.q, found.keys.new)
    _note_left(low, before)
    flat = tuple(_heads_last(low, x, node) for x in (before.q, before.k, found.values.new))
    rotation = (*_cos_sin(low, before, node), _bases(low, before, node))
    norms = (before.q_norm, before.k_norm, before.eps)
    parts = (found.key_parts.attribute, found.value_parts.attribute)
    cache = (found.keys.past, found.values.past, low.table, low.start)
    arguments = (*flat, *rotation, *cache, *norms, found.keys.clip, *parts, low.target.name)
    return low.emit(operators.rope_cache, arguments, node)


def _queries(low: Lowering, found: _Match) -> Node:
    """The same of an attention whose keys and values have entered the cache before."""
    q, node = found.attention.q, found.attention.node
    low.left[q.name] = "keys and values that go with these queries entered the cache before"
    return low.emit(aten.contiguous.default, (low.emit(aten.transpose.int, (q, 1, 2), node),), node)


def _extras(low: Lowering, found: _Match) -> tuple[Node | None, Node | None, Node | None, Node | None]:
    """Sinks, keys and values of the prefix, slopes."""
    scores = found.scores
    keys, values = scores.prefix or (None, None)
    name = f"resq.slopes.{low.cache_inputs.index(found.keys.past) // 2}"
    return scores.sinks, keys, values, None if scores.slopes is None else low.tensor(name, scores.slopes)


def _note_left(low: Lowering, before: Turned) -> None:
    """Norms, rotary embedding and bases that queries and keys do not share are computed by PyTorch."""
    for node in (before.q, before.k):
        if any(view is not None for view in (Project.of(node), Rope.of(node), Norm.of(node))):
            low.left[node.name] = "queries and keys differ in it, or it has other readers, or it comes out of order"


def _heads_last(low: Lowering, x: Node, node: Node) -> Node:
    """x [B, H, S, D] as [B, S, H * D]: what it was split from, if it was."""
    split = SplitHeads.of(x)
    return low.emit(ops.merge_heads, (x,), node) if split is None else split.x


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
