"""Latent attention in a topology: the compressed vectors that queries, keys and values are made from, and the rotary columns of keys.

c = norm(linear(stream, Wa)), cached;    keys = [linear(c, Wk) | rope(linear(stream, Wr)), of all heads];    values = linear(c, Wv)
queries = [linear(d, Wq) | rope(linear(d, Wq'))],    d = norm(linear(stream, Wd)), or the stream itself
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from resq_compiler.analysis.topology import Attention, Compressed, Latent
from resq_compiler.errors import TopologyError
from resq_compiler.frontend.latent import behind_views, cache_of, shared_by_heads
from resq_compiler.ir import graph_tools, values, views
from resq_compiler.ir.args import argument
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import AppendCache, Linear, MergeHeads, Norm, SplitHeads

Behind = Callable[[Node, str], Node]
"""The linear that makes a value: (value, what it is called in messages)."""


@dataclass(frozen=True)
class Found:
    """The nodes of a latent attention.

    own, rotary_cache: the two pieces of keys. k, v: the linears that make keys and values from the compressed vector.
    """

    own: Node
    rotary_cache: Node
    k: Linear
    v: Linear


def find_latent(core: Node) -> Found | None:
    """The keys and values of an attention, where a compressed cache makes them; None where these are cached themselves."""
    view = views.Attention.require(core)
    pieces = argument(view.k, "tensors") if is_call(view.k, aten.cat.default) else []
    if len(pieces) != 2 or (rotary := shared_by_heads(pieces[1])) is None:
        return None
    own, value = SplitHeads.of(pieces[0]), SplitHeads.of(view.v)
    k, v = (None if split is None else Linear.of(split.x) for split in (own, value))
    return None if k is None or v is None else Found(pieces[0], rotary, k, v)


def latent_attention(
    core: Node, place: tuple[int, int], output: Node, found: Found, behind: Behind
) -> Attention:  # fmt: skip
    """The attention and its parts. Raises TopologyError naming the node that is not understood."""
    view = views.Attention.require(core)
    cached = cache_of(found.k.node)
    if cached is None or cache_of(found.v.node) is not cached:
        raise TopologyError(
            f"node {core.name}: expected keys and values that are made from one cache of compressed vectors, got keys from "
            f"{found.k.x.name} and values from {found.v.x.name}",
            node=core.name,
        )
    own, rotary = queries_of(view.q, values.width(found.own))
    q, q_rotary = behind(own, "query projection"), behind(rotary, "projection of rotary query columns")
    shared = behind(AppendCache.require(found.rotary_cache).new, "projection of rotary key columns")
    vectors = [compressed("latent", found.k.x, [found.k.node, found.v.node], cached)]
    if (queries := compressed_queries(q, q_rotary)) is not None:
        vectors.insert(0, queries)
    heads, key_shape = values.shape(view.q)[1], values.shape(found.rotary_cache)
    return Attention(
        core, q, found.k.node, found.v.node, output, found.rotary_cache, cached, heads, key_shape[1], values.width(view.q),
        values.width(view.v), True, *place, latent=Latent(shared, q_rotary, vectors, rotary, view.q),
    )  # fmt: skip


def queries_of(joined: Node, own: int) -> tuple[Node, Node]:
    """The columns of queries that meet those of every head, and those that meet the shared ones."""
    pieces = argument(joined, "tensors") if is_call(joined, aten.cat.default) else []
    if len(pieces) != 2 or values.width(pieces[0]) != own:
        raise TopologyError(
            f"node {joined.name}: queries of latent attention; expected {own} columns of every head joined with rotary ones, as keys "
            f"are, got {joined.format_node()}",
            node=joined.name,
        )
    return pieces[0], pieces[1]


def compressed_queries(q: Node, rotary: Node) -> Compressed | None:
    """What both linears of queries read, where one linear makes it; None where they read the stream."""
    x = Linear.require(q).x
    alone = set(x.users) == {q, rotary}
    return compressed("qlatent", x, [q, rotary], None) if alone and _written_by(x) is not None else None


def _written_by(x: Node) -> Node | None:
    """The linear behind a norm, or none, that makes a vector."""
    norm = Norm.of(x)
    before = x if norm is None else norm.x
    return before if Linear.of(before) is not None else None


def compressed(site: str, value: Node, linears: list[Node], cache: Node | None) -> Compressed:
    """A vector, from the linear that makes it to those that read it."""
    written = value if cache is None else behind_views(_before_split(AppendCache.require(cache).new))
    writer = _written_by(written)
    readers = [n for n in (value if cache is None else cache).users if n.op != "output"]
    merged = [n for n in readers if MergeHeads.of(n) is not None]
    if (
        writer is None
        or (cache is not None and (readers != [value] or merged != [value]))
        or set(value.users) != set(linears)
    ):
        where = graph_tools.module_of(value)
        raise TopologyError(
            f"node {written.name} ({where}): a compressed vector of latent attention; expected a linear, a norm or none, and the linears "
            "that make queries, or keys and values, of it alone",
            node=written.name,
        )
    norm = written if Norm.of(written) is not None else None
    return Compressed(value, norm, linears, site=site, writer=writer, written=written, cache=cache)


def _before_split(node: Node) -> Node:
    split = SplitHeads.of(node)
    return node if split is None else split.x
