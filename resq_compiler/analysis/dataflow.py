"""Finds the topology of a decoder by dataflow alone, on the named graph (after split-fused).

Module names label reports; they decide nothing, unless the user overrides the topology by names (overrides.py). What is not understood
is a TopologyError that names the node and what was expected there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch.fx import GraphModule, Node

from resq_compiler.analysis.beside import edges_beside, find_beside, find_keepers
from resq_compiler.analysis.latents import find_latent, latent_attention
from resq_compiler.analysis.mixtures import find_experts, weighs_tokens
from resq_compiler.analysis.overrides import (
    BlockOverride,
    FeedForwardOverride,
    LinearNames,
    TopologyOverrides,
    switched_off,
)
from resq_compiler.analysis.residual import EMBEDDING, LINEARS, NORMS, find_cuts, find_head, find_residual
from resq_compiler.analysis.topology import STREAM_ROLES, Attention, Block, FeedForward, Residual, Topology
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, meta, ops, values, views
from resq_compiler.ir.args import operands, source
from resq_compiler.ir.graph_tools import aten, is_call, only_user
from resq_compiler.ir.views import AppendCache, Linear, MergeHeads, Norm, SplitHeads

ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default)
ELEMENTWISE = (*ACTIVATIONS, aten.mul.Tensor, aten.add.Tensor, aten.pow.Tensor_Scalar, aten.clamp.default)


def analyze(gm: GraphModule, overrides: TopologyOverrides | None = None) -> Topology:
    """Find the topology of a named graph and label its linears with `meta.LinearSite`. What the user states goes before."""
    overrides = overrides or TopologyOverrides()
    names = LinearNames(gm)
    floats = [names.find(name, "float") for name in overrides.floats]
    head = names.find(overrides.head, "head") if overrides.head else find_head(gm)
    residual = find_residual(head)
    why = "norms with a gain write into the stream: " + ", ".join(n.name for n in residual.gained_writers)
    residual.fusable = switched_off(residual.fusable, overrides.fusable, "residual fusable", why)
    cores = list(gm.graph.find_nodes(op="call_function", target=ops.attention))
    beside, keepers = find_beside(gm, residual), find_keepers(cores)
    cuts = find_cuts(gm, residual, head, edges_beside(beside, cores, keepers))
    attentions = [
        trace_attention(n, (i, k), overrides.block(i), names)
        for i, (n, k) in enumerate(zip(cores, keepers, strict=True))
    ]
    if not attentions:
        raise TopologyError("no attention operator was found; expected a decoder with scaled-dot-product attention")
    if unknown := [i for i in overrides.blocks if i >= len(attentions)]:
        raise TopologyError(
            f"topology override, block {unknown[0]}: the model has the blocks 0 to {len(attentions) - 1}"
        )
    blocks = make_blocks(gm, cuts, attentions, residual, overrides, set(floats), beside)
    hidden = values.width(residual.values[0])
    if overrides.hidden_size not in (None, hidden):
        raise TopologyError(f"topology override, hidden_size: the graph says {hidden}; got {overrides.hidden_size!r}")
    routers = [n for block in blocks for n in block.routers]
    topology = Topology(residual, blocks, head, hidden, floats, routers, linears_beside(gm, beside))
    label_linears(gm, topology)
    return topology


def trace_back(node: Node, goal: str) -> Node:
    """The one linear that a value is made from, position tables apart: norms, rotary embeddings of any form, scalings between."""
    linears: dict[Node, None] = {}
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_call(current, *LINEARS):
            linears[current] = None
            continue
        if is_call(current, EMBEDDING, ops.attention):
            raise TopologyError(
                f"node {node.name}: expected a linear ({goal}) behind it, met node {current.name}: {current.format_node()}",
                node=node.name,
            )
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    if len(linears) != 1:
        names = ", ".join(n.name for n in linears) or "none"
        raise TopologyError(
            f"node {node.name}: expected one linear ({goal}) behind it, met {len(linears)}: {names}", node=node.name
        )
    return next(iter(linears))


def linears_beside(gm: GraphModule, beside: set[Node]) -> list[Node]:
    """The linears that values beside the stream are made with."""
    behind = graph_tools.ancestors(beside)
    return [n for n in gm.graph.nodes if n in behind and is_call(n, *LINEARS)]


def trace_attention(core: Node, place: tuple[int, int], stated: BlockOverride, names: LinearNames) -> Attention:
    """The linears around an attention operator and the shapes of its heads. place: its block, and that of its keys and values."""
    view, (index, keeper) = views.Attention.require(core), place
    where = f"block {index}, attention"

    def behind(value: Node, role: str, goal: str) -> Node:
        name = stated.linears.get(role)
        return trace_back(value, goal) if name is None else names.find_feeding(name, value, f"{where} {role}")

    output = output_projection(core)
    o = Linear.require(output).name
    if stated.linears.get("o", o) != o:
        raise TopologyError(
            f"topology override, {where} o: expected {o}, the linear that reads node {core.name}; got {stated.linears['o']}"
        )
    found = find_latent(core)
    if found is not None:
        attention = latent_attention(core, place, output, found, trace_back)
        check_stated(attention, stated, where)
        check_derived(attention, stated, where)
        return attention
    for cache in (view.k, view.v):
        if not is_call(cache, ops.append_cache):
            raise TopologyError(
                f"node {core.name}: expected append_cache for keys and values, got {cache.format_node()}",
                node=core.name,
            )
    new_key, new_value = AppendCache.require(view.k).new, AppendCache.require(view.v).new
    q = behind(view.q, "q", "query projection")
    k = behind(new_key, "k", "key projection")
    v = behind(new_value, "v", "value projection")
    key_shape = values.shape(view.k)
    split = SplitHeads.of(new_value)
    direct = split is not None and split.x is v
    why = f"node {new_value.name} stands between the value projection and the cache"
    attention = Attention(
        core, q, k, v, output, view.k, view.v, values.shape(view.q)[1], key_shape[1], key_shape[3], values.width(view.v),
        switched_off(direct, stated.values_fusable, f"{where} values_fusable", why), index, keeper,
    )  # fmt: skip
    check_derived(attention, stated, where)
    return attention


def output_projection(core: Node) -> Node:
    """The one linear that reads an attention's merged heads. Raises TopologyError."""
    merged = MergeHeads.of(only_user(core))
    output = None if merged is None else Linear.of(only_user(merged.node))
    if output is None:
        raise TopologyError(
            f"node {core.name}: expected merge_heads and then one linear (output projection) to read the attention",
            node=core.name,
        )
    return output.node


def check_stated(attention: Attention, stated: BlockOverride, where: str) -> None:
    """Raise TopologyError where linears of latent attention are stated to be others than those of the graph."""
    found = {role: Linear.require(node).name for role, node in attention.linears.items()}
    for role, name in stated.linears.items():
        if found.get(role) != name:
            raise TopologyError(
                f"topology override, {where} {role}: the linears of latent attention are those of the graph, {found}; got {name!r}"
            )


def check_derived(attention: Attention, stated: BlockOverride, where: str) -> None:
    """Compare what an override says about shapes with the graph, which alone decides them."""
    found: dict[str, object] = {
        "heads": attention.num_heads, "kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim,
        "value_dim": attention.value_dim, "window": attention.window, "compressed": attention.compressed,
        "keys_of": None if attention.keeps else attention.keeper,
    }  # fmt: skip
    if others := stated.linears.keys() - attention.linears.keys():
        raise TopologyError(
            f"topology override, {where} {min(others)}: this attention has no such linear; expected {', '.join(attention.linears)}"
        )
    for key, value in stated.expected.items():
        if found[key] != value:
            raise TopologyError(
                f"topology override, {where} {key}: the graph says {found[key]}, and only it can; got {value!r}"
            )


def make_blocks(
    gm: GraphModule, cuts: list[Node], attentions: list[Attention], residual: Residual, overrides: TopologyOverrides, floats: set[Node],
    beside: set[Node],
) -> list[Block]:  # fmt: skip
    """One block for each attention: from the last cut before it to the last cut before the next one."""
    outside = set(linears_beside(gm, beside))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    starts = find_starts(cuts, attentions, order, set(residual.values))
    ends = [*starts[1:], cuts[-1]]
    blocks = [Block(i, s, e, a) for i, (s, e, a) in enumerate(zip(starts, ends, attentions, strict=True))]
    readers = {n for g in residual.readers for n in g.linears}
    writers = {*residual.writers, *itertools.chain.from_iterable(map(written_through, residual.gained_writers))}
    for block in blocks:
        stated, attention = overrides.block(block.index), block.attention
        check_reads_stream(attention, readers, stated)
        used = {*attention.linears.values(), *outside}
        rest = [n for n in _between(order, block) if is_call(n, *LINEARS) and n not in used]
        block.feed_forwards = find_feed_forwards(block.index, rest, writers, readers, stated, floats, beside)
        known = {n for f in block.feed_forwards for n in (*f.gates, *f.ups, f.down)}
        block.routers = [f.experts.router for f in block.feed_forwards if f.experts is not None]
        block.routers += [n for n in rest if n not in known and n not in block.routers and weighs_tokens(n, readers)]
        known.update(block.routers)
        for node in rest:
            if node not in known and node not in floats:
                raise TopologyError(
                    f"node {node.name} ({graph_tools.module_of(node)}): a linear that is part of no attention, feed-forward or choice of "
                    "experts; expected the data flow to say which; say it yourself (option topology), or name the linear under `floats` "
                    "there: it stays in float",
                    node=node.name,
                )
    return blocks


def written_through(norm: Node) -> Iterator[Node]:
    """What a norm that writes into the stream is made of: behind sums, sums over experts and the norms of their terms."""
    pending = [Norm.require(norm).x]
    while pending:
        node = pending.pop()
        if is_call(node, aten.add.Tensor):
            pending.extend(n for n in operands(node) if isinstance(n, Node))
        elif is_call(node, ops.combine_experts, *NORMS):
            pending.append(source(node))
        else:
            yield node


def find_starts(cuts: list[Node], attentions: list[Attention], order: dict[Node, int], stream: set[Node]) -> list[Node]:
    """Of each attention the last cut before it. Raises TopologyError: there is none, or two attentions share one."""
    starts = []
    for attention in attentions:
        behind = graph_tools.ancestors([attention.core])
        before = [c for c in cuts if order[c] < order[attention.core] and c in behind]
        if not before:
            raise TopologyError(
                f"node {attention.core.name}: no cut of the residual stream before this attention",
                node=attention.core.name,
            )
        starts.append(before[-1])
    for (start, one), (following, other) in itertools.pairwise(zip(starts, attentions, strict=True)):
        if start is following:
            raise _shared_stretch(one.core, other.core, stream)
    return starts


def _shared_stretch(one: Node, other: Node, stream: set[Node]) -> TopologyError:
    across, why = _first_across(one, other, stream), ""
    if across is not None:
        why = (
            f"; node {across.name} ({graph_tools.module_of(across)}) reaches from before the first to behind the second"
        )
    return TopologyError(
        f"nodes {one.name} and {other.name}: two attentions share a stretch of the residual stream; expected one attention in a block, "
        f"and all that blocks read of each other in the stream{why}",
        node=(across or other).name,
    )


def _first_across(one: Node, other: Node, stream: set[Node]) -> Node | None:
    """The first linear that needs no attention and is read behind another one beside the stream, as embeddings for each layer are."""
    behind_one, behind_other = _behind(one), _behind(other)
    for linear in one.graph.nodes:
        if not is_call(linear, *LINEARS) or linear in behind_one:
            continue
        pending, seen = [linear], {linear, one, *stream}
        while pending:
            for user in pending.pop().users:
                if user.op != "output" and user not in seen:
                    if user in behind_other:
                        return linear
                    seen.add(user)
                    pending.append(user)
    return None


def _behind(node: Node) -> set[Node]:
    """A node and all that is made of it."""
    found = {node}
    for other in node.graph.nodes:
        if any(n in found for n in other.all_input_nodes):
            found.add(other)
    return found


def check_reads_stream(attention: Attention, readers: set[Node], stated: BlockOverride) -> None:
    """Raise TopologyError where queries, keys or values are made from something else, unless the user states how."""
    for role, node in attention.linears.items():
        if role in STREAM_ROLES and node not in readers and role not in stated.linears:
            raise TopologyError(
                f"node {node.name} ({graph_tools.module_of(node)}): makes queries, keys or values; expected a linear that reads "
                f"the residual stream through a norm at most, or a compressed vector that one such linear makes, got {node.format_node()}",
                node=node.name,
            )


def _between(order: dict[Node, int], block: Block) -> list[Node]:
    inside = graph_tools.ancestors([block.end]) - graph_tools.ancestors([block.start])
    return sorted(inside, key=order.__getitem__)


def find_feed_forwards(
    index: int, linears: list[Node], writers: set[Node], readers: set[Node], stated: BlockOverride, floats: set[Node],
    beside: set[Node],
) -> list[FeedForward]:  # fmt: skip
    """The feed-forwards of a block: found from the linears that write into the stream, or stated."""
    said = {item.down: item for item in stated.feed_forwards or ()}
    result = []
    for node in linears:
        name = Linear.require(node).name
        if name not in said and node not in writers:
            continue
        try:
            result.append(
                trace_feed_forward(node, readers, said.get(name), floats, beside, f"block {index}, feed_forward {name}")
            )
        except TopologyError:
            if name in said or node not in floats:  # a linear that stays float needs no role
                raise
        said.pop(name, None)
    if said:
        others = ", ".join(Linear.require(n).name for n in linears)
        raise TopologyError(
            f"topology override, block {index}, feed_forward: no linear {next(iter(said))} there; expected one of {others}"
        )
    return result


def trace_feed_forward(
    down: Node, readers: set[Node], stated: FeedForwardOverride | None, floats: set[Node], beside: set[Node], where: str
) -> FeedForward:  # fmt: skip
    """Linears behind `down`, and whether only elementwise operators of them lie between."""
    gates: list[Node] = []
    ups: list[Node] = []
    channelwise = True
    said = {name: gates for name in (stated and stated.gate) or ()}
    said |= {name: ups for name in (stated and stated.up) or ()}
    pending, seen = [source(down)], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        linear = Linear.of(node)
        if linear is not None and (node in readers or linear.name in said):
            found = gates if meets_activation(node) else ups
            said.pop(linear.name, found).append(node)
            continue
        if linear is not None and node not in floats:
            raise TopologyError(
                f"node {node.name}: expected a linear that reads the residual stream before {down.name}", node=node.name
            )
        if node in beside:
            channelwise = False  # its channels would have to move, too
            continue
        channelwise &= is_call(node, *ELEMENTWISE)
        pending.extend(node.all_input_nodes)
    if said:
        raise TopologyError(f"topology override, {where}: {next(iter(said))} does not stand before it")
    why = "operators between up and down mix channels"
    channelwise = switched_off(channelwise, stated.channelwise if stated else None, f"{where} channelwise", why)
    return FeedForward(gates, ups, down, channelwise, find_experts(down, (*gates, *ups), readers))


def meets_activation(node: Node) -> bool:
    """An activation follows, behind clamps and scalings at most."""
    if any(is_call(user, *ACTIVATIONS) for user in node.users):
        return True
    inner = [
        u for u in node.users if is_call(u, aten.clamp.default) or (is_call(u, aten.mul.Tensor) and _times_number(u))
    ]
    return any(map(meets_activation, inner))


def _times_number(product: Node) -> bool:
    return isinstance(operands(product)[1], (int, float))


def label_linears(gm: GraphModule, topology: Topology) -> None:
    """Attach meta.LinearSite to every linear."""

    def label(node: Node, role: str, block: int | None) -> None:
        meta.put(node, meta.LinearSite(Linear.require(node).name, role, block))

    label(topology.head, "head", None)
    for node in topology.beside:
        label(node, "beside", None)
    for block in topology.blocks:
        attention = block.attention
        for role, node in attention.linears.items():
            label(node, role, block.index)
        for feed_forward in block.feed_forwards:
            for node in feed_forward.gates:
                label(node, "gate", block.index)
            for node in feed_forward.ups:
                label(node, "up", block.index)
            label(feed_forward.down, "down", block.index)
        for node in block.routers:
            label(node, "router", block.index)
