"""Latent attention: the cache holds one vector a token, from which a linear makes keys and values of all heads, and the rotary columns of
keys, which all heads share.

    latent = append_cache(past, c) [B, 1, T, r],   rotary = append_cache(past, rope(...)) [B, 1, T, R]
    attention(q, cat([linear(latent, W)[keys], expand(rotary, heads)], -1), linear(latent, W)[values])

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, which introduced it.
"""

from __future__ import annotations

from torch.fx import Node

from resq_compiler.ir import ops, values
from resq_compiler.ir.args import argument, set_argument, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, is_call

LINEAR = aten.linear.default


def expands(key: Node, value: Node, heads: int, made_by: str) -> bool:
    """Whether keys and values are made from a compressed cache; the linear that makes them then reads it as [B, T, r]."""
    pieces = argument(key, "tensors") if is_call(key, aten.cat.default) else []
    linears = [behind_views(node) for node in (*pieces[:1], value)]
    if len(pieces) != 2 or shared_by_heads(pieces[1]) is None or values.shape(value)[1] != heads:
        return False
    if not all(is_call(linear, LINEAR) and cache_of(linear) is not None for linear in linears):
        return False
    for linear in linears:
        cache = source(linear)
        if is_call(cache, ops.append_cache):  # [B, 1, T, r] -> [B, T, r]
            with linear.graph.inserting_before(linear):
                merged = emit(linear.graph, ops.merge_heads, (cache,), cache, made_by)
            set_argument(linear, "input", merged)
            values.forget(linear)
    return True


def behind_views(node: Node) -> Node:
    """What views are taken of."""
    while is_call(node, *VIEW_OPS):
        node = source(node)
    return node


def cache_of(linear: Node) -> Node | None:
    """The cache of one vector a token, [B, 1, T, r], that a linear reads."""
    cache = source(linear)
    cache = source(cache) if is_call(cache, ops.merge_heads) else cache
    return cache if is_call(cache, ops.append_cache) and values.shape(cache)[1] == 1 else None


def readers_of_vector(cache: Node) -> list[Node]:
    """The cached vectors as linears read them: [B, T, r], whole or some columns."""
    merged = [node for node in cache.users if is_call(node, ops.merge_heads)]
    return merged + [user for node in merged for user in node.users if is_call(user, ops.columns)]


def is_quantized_vector(x: Node) -> bool:
    """Whether a value is one of `readers_of_vector` of a cache that holds codes."""
    x = source(x) if is_call(x, ops.columns) else x
    cache = source(x) if is_call(x, ops.merge_heads) else x
    return is_call(cache, ops.append_cache) and is_call(argument(cache, "new"), ops.quantize_dequantize)


def cache_site(cache: Node) -> str | None:
    """Of latent attention what a cache holds: "latent", compressed vectors, or "key", rotary columns; None of any other."""
    readers = [n for user in cache.users for n in (user.users if is_call(user, ops.prepend) else (user,))]
    if any(is_call(node, ops.merge_heads) for node in readers):
        return "latent"
    return "key" if any(is_call(node, aten.expand.default, aten.cat.default) for node in readers) else None


def shared_by_heads(node: Node) -> Node | None:
    """The cache [B, 1, T, R] that a value repeats for every head: expand alone, or nothing where there is one head."""
    cache = source(node) if is_call(node, aten.expand.default) else node
    return cache if is_call(cache, ops.append_cache) and values.shape(cache)[1] == 1 else None
