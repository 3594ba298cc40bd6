"""What the graph says about the model: residual stream, decoder blocks, attention and feed-forward, found by dataflow alone.

Works on the named graph (after split-fused). Module names label reports; they decide nothing. What is not understood is a
TopologyError that names the node and what was expected there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx
from torch.fx import GraphModule, Node

from resq_compiler import graph_tools, meta, ops
from resq_compiler.errors import TopologyError
from resq_compiler.graph_tools import aten, is_call

LINEAR, EMBEDDING, LAYER_NORM = aten.linear.default, aten.embedding.default, aten.layer_norm.default
NORMS = (ops.rms_norm, LAYER_NORM)
ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default)
ELEMENTWISE = (*ACTIVATIONS, aten.mul.Tensor, aten.add.Tensor, aten.pow.Tensor_Scalar)


@dataclass
class ReadGroup:
    """Linears that read the residual stream through the same value. `norm` is None where they read it directly."""

    value: Node
    norm: Node | None
    linears: list[Node]


@dataclass
class Residual:
    """The residual stream: every value that must stay in one basis, and what writes into it and reads it."""

    values: list[Node]
    writers: list[Node]  # linears and embeddings: a basis change fuses into their weight
    gained_writers: list[Node]  # norms that write into the stream: a basis change cannot pass their gain
    readers: list[ReadGroup]

    @property
    def fusable(self) -> bool:
        """True when U_A can be multiplied into all writers."""
        return not self.gained_writers


@dataclass
class Attention:
    """One attention: its operator, the linears around it, and the nodes where projections go."""

    core: Node
    q: Node
    k: Node
    v: Node
    o: Node
    key_cache: Node
    value_cache: Node
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    value_is_linear: bool  # nothing between v and the cache: U_B fuses into v

    @property
    def window(self) -> int | None:
        """Sliding window, or None."""
        mask = self.core.args[3]
        return mask.args[2] if is_call(mask, ops.causal_mask) else None


@dataclass
class FeedForward:
    """down(f(up linears)): `gates` are the linears that an activation follows, `ups` the others."""

    gates: list[Node]
    ups: list[Node]
    down: Node
    channelwise: bool  # only elementwise operators between: hidden channels may be permuted freely


@dataclass
class Block:
    """A decoder block: from the cut `start` (a value of the stream) to the cut `end`."""

    index: int
    start: Node
    end: Node
    attention: Attention
    feed_forwards: list[FeedForward] = field(default_factory=list)


@dataclass
class Topology:
    """A validated description of a decoder."""

    residual: Residual
    blocks: list[Block]
    head: Node
    hidden_size: int

    @property
    def linears(self) -> list[Node]:
        """All linears inside blocks, in execution order."""
        return [n for n in self.head.graph.nodes if is_call(n, LINEAR) and n is not self.head]


def analyze(gm: GraphModule) -> Topology:
    """Find the topology of a named graph and label its linears with `meta.LinearSite`."""
    head = find_head(gm)
    residual = find_residual(head)
    cuts = find_cuts(gm, residual, head)
    attentions = [trace_attention(n) for n in gm.graph.find_nodes(op="call_function", target=ops.attention)]
    if not attentions:
        raise TopologyError("no attention operator was found; expected a decoder with scaled-dot-product attention")
    blocks = make_blocks(gm, cuts, attentions, residual)
    hidden = residual.values[0].meta["val"].shape[-1]
    topology = Topology(residual, blocks, head, hidden)
    label_linears(gm, topology)
    return topology


def find_head(gm: GraphModule) -> Node:
    """The linear that makes logits, through scalings and soft-caps."""
    node = graph_tools.output_args(gm.graph)[0]
    while not is_call(node, LINEAR):
        if not is_call(node, aten.div.Tensor, aten.mul.Tensor, aten.tanh.default):
            raise TopologyError(
                f"node {node.name}: expected the logits to come from a linear (lm_head), got {node.format_node()}"
            )
        node = node.args[0]
    return node


def _is_scalar(value: object) -> bool:
    if isinstance(value, Node):
        val = value.meta.get("val")
        return value.op == "get_attr" and val is not None and val.numel() == 1
    return isinstance(value, (int, float))


def find_residual(head: Node) -> Residual:
    """Close the set of stream values under add and scaling, backwards from the last norm, then collect readers."""
    source = head.args[0]
    start = source.args[0] if is_call(source, *NORMS) else source
    values: dict[Node, None] = {}
    writers: dict[Node, None] = {}
    gained: dict[Node, None] = {}
    pending = [start]
    while pending:
        node = pending.pop()
        if node in values:
            continue
        values[node] = None
        if is_call(node, aten.add.Tensor):
            pending.extend(a for a in node.args[:2] if isinstance(a, Node))
        elif is_call(node, aten.mul.Tensor) and _is_scalar(node.args[1]):
            pending.append(node.args[0])
        elif is_call(node, LINEAR, EMBEDDING):
            writers[node] = None
        elif is_call(node, *NORMS):
            gained[node] = None
        else:
            raise TopologyError(
                f"node {node.name}: in the residual stream; expected an add, a scaling, a linear, an embedding or a norm "
                f"(experts and gated streams are not supported); got {node.format_node()}"
            )
    order = {n: i for i, n in enumerate(head.graph.nodes)}
    stream = sorted(values, key=order.__getitem__)
    readers = find_readers(stream, set(gained))
    return Residual(stream, sorted(writers, key=order.__getitem__), sorted(gained, key=order.__getitem__), readers)


def find_readers(stream: list[Node], gained: set[Node]) -> list[ReadGroup]:
    """Group the linears that read the stream by the value they read."""
    inside, groups = set(stream), []
    for value in stream:
        direct: list[Node] = []
        for user in value.users:
            if user in inside and user not in gained:
                continue
            if is_call(user, LINEAR):
                direct.append(user)
            elif is_call(user, *NORMS) and user not in gained:
                groups.append(ReadGroup(user, user, _linear_users(user)))
            else:
                raise TopologyError(
                    f"node {user.name}: reads the residual stream; expected a norm or a linear, got {user.format_node()}"
                )
        if direct:
            groups.append(ReadGroup(value, None, direct))
    return groups


def _linear_users(norm: Node) -> list[Node]:
    others = [u for u in norm.users if not is_call(u, LINEAR)]
    if others:
        raise TopologyError(
            f"node {others[0].name}: reads {norm.name}; expected only linears after a norm, got {others[0].format_node()}"
        )
    return list(norm.users)


def find_cuts(gm: GraphModule, residual: Residual, head: Node) -> list[Node]:
    """Stream values through which every path from the embeddings to the logits goes (dominators of the head)."""
    graph = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_edges_from((source, node) for source in node.all_input_nodes)
    for node in residual.writers:
        if is_call(node, EMBEDDING):
            graph.add_edge("embeddings", node)
    if "embeddings" not in graph:
        first = residual.values[0]
        raise TopologyError(
            f"node {first.name}: the residual stream starts here; expected a token embedding, got {first.format_node()}"
        )
    live = nx.descendants(graph, "embeddings") | {"embeddings"}
    dominator = nx.immediate_dominators(graph.subgraph(live), "embeddings")
    chain, node = [], head
    stream = set(residual.values)
    while node != "embeddings":
        node = dominator[node]
        if node in stream:
            chain.append(node)
    return chain[::-1]


def trace_back(node: Node, goal: str) -> Node:
    """The one linear that a value is made from, position tables apart: norms, rotary embeddings of any form, scalings between."""
    linears: dict[Node, None] = {}
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if is_call(current, LINEAR):
            linears[current] = None
            continue
        if is_call(current, EMBEDDING, ops.attention):
            raise TopologyError(
                f"node {node.name}: expected a linear ({goal}) behind it, met node {current.name}: {current.format_node()}"
            )
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    if len(linears) != 1:
        names = ", ".join(n.name for n in linears) or "none"
        raise TopologyError(f"node {node.name}: expected one linear ({goal}) behind it, met {len(linears)}: {names}")
    return next(iter(linears))


def trace_attention(core: Node) -> Attention:
    """The linears around an attention operator and the shapes of its heads."""
    q_value, key_cache, value_cache = core.args[:3]
    for cache in (key_cache, value_cache):
        if not is_call(cache, ops.append_cache):
            raise TopologyError(
                f"node {core.name}: expected append_cache for keys and values, got {cache.format_node()}"
            )
    q = trace_back(q_value, "query projection")
    k = trace_back(key_cache.args[1], "key projection")
    v = trace_back(value_cache.args[1], "value projection")
    merged = [u for u in core.users if is_call(u, ops.merge_heads)]
    outputs = [u for m in merged for u in m.users if is_call(u, LINEAR)]
    if len(outputs) != 1 or len(core.users) != 1 or len(merged[0].users) != 1:
        raise TopologyError(
            f"node {core.name}: expected merge_heads and then one linear (output projection) to read the attention"
        )
    key_shape, value_shape = key_cache.meta["val"].shape, value_cache.meta["val"].shape
    new_value = value_cache.args[1]
    return Attention(
        core, q, k, v, outputs[0], key_cache, value_cache, q_value.meta["val"].shape[1], key_shape[1], key_shape[3], value_shape[3],
        value_is_linear=is_call(new_value, ops.split_heads) and new_value.args[0] is v,
    )  # fmt: skip


def make_blocks(gm: GraphModule, cuts: list[Node], attentions: list[Attention], residual: Residual) -> list[Block]:
    """One block for each attention: from the last cut before it to the last cut before the next one."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    starts = []
    for attention in attentions:
        before = [c for c in cuts if order[c] < order[attention.core] and c in graph_tools.ancestors([attention.core])]
        if not before:
            raise TopologyError(f"node {attention.core.name}: no cut of the residual stream before this attention")
        starts.append(before[-1])
    if len(set(starts)) != len(starts):
        raise TopologyError("two attentions share a stretch of the residual stream; expected one attention in a block")
    ends = [*starts[1:], cuts[-1]]
    blocks = [Block(i, s, e, a) for i, (s, e, a) in enumerate(zip(starts, ends, attentions, strict=True))]
    readers = {n for g in residual.readers for n in g.linears}
    for block in blocks:
        for node in (block.attention.q, block.attention.k, block.attention.v):
            if node not in readers:
                raise TopologyError(
                    f"node {node.name} ({graph_tools.module_of(node)}): makes queries, keys or values; expected a linear that reads "
                    f"the residual stream through a norm at most, got {node.format_node()} (latent attention is not supported)"
                )
        inside = _between(order, block)
        used = {block.attention.q, block.attention.k, block.attention.v, block.attention.o}
        rest = [n for n in inside if is_call(n, LINEAR) and n not in used]
        writers = set(residual.writers) | {n.args[0] for n in residual.gained_writers}
        block.feed_forwards = [trace_feed_forward(n, readers) for n in rest if n in writers]
        known = {n for f in block.feed_forwards for n in (*f.gates, *f.ups, f.down)}
        for node in rest:
            if node not in known:
                raise TopologyError(
                    f"node {node.name} ({graph_tools.module_of(node)}): a linear that is part of no attention or feed-forward"
                )
    return blocks


def _between(order: dict[Node, int], block: Block) -> list[Node]:
    inside = graph_tools.ancestors([block.end]) - graph_tools.ancestors([block.start])
    return sorted(inside, key=order.__getitem__)


def trace_feed_forward(down: Node, readers: set[Node]) -> FeedForward:
    """Linears behind `down` and whether only elementwise operators lie between."""
    gates, ups, channelwise = [], [], True
    pending, seen = [down.args[0]], set()
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node, Node) or node.op == "get_attr":
            continue
        seen.add(node)
        if is_call(node, LINEAR):
            if node not in readers:
                raise TopologyError(
                    f"node {node.name}: expected a linear that reads the residual stream before {down.name}"
                )
            gates.append(node) if any(is_call(u, *ACTIVATIONS) for u in node.users) else ups.append(node)
            continue
        channelwise &= is_call(node, *ELEMENTWISE)
        pending.extend(node.all_input_nodes)
    return FeedForward(gates, ups, down, channelwise)


def label_linears(gm: GraphModule, topology: Topology) -> None:
    """Attach meta.LinearSite to every linear."""

    def label(node: Node, role: str, block: int | None) -> None:
        name = str(node.args[1].target).removesuffix(".weight")
        meta.put(node, meta.LinearSite(name, role, block))

    label(topology.head, "head", None)
    for block in topology.blocks:
        attention = block.attention
        for role in ("q", "k", "v", "o"):
            label(getattr(attention, role), role, block.index)
        for feed_forward in block.feed_forwards:
            for node in feed_forward.gates:
                label(node, "gate", block.index)
            for node in feed_forward.ups:
                label(node, "up", block.index)
            label(feed_forward.down, "down", block.index)
