"""The residual stream of a decoder, found backwards from its logits: who writes into it, who reads it, and where it can be cut.

What is not understood is a TopologyError that names the node and what was expected there.
"""

from __future__ import annotations

from collections.abc import Set

import networkx as nx
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import ReadGroup, Residual
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import operands, source
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Linear

LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
LINEARS = Linear.targets
NORMS = (ops.rms_norm, aten.layer_norm.default)
EMBEDDINGS = "embeddings"  # stands for all of them, before the nodes, where paths are looked for


def find_head(gm: GraphModule) -> Node:
    """The linear that makes logits, through scalings and soft-caps."""
    node = graph_tools.output_args(gm.graph)[0]
    while not is_call(node, LINEAR):
        if not is_call(node, aten.div.Tensor, aten.mul.Tensor, aten.tanh.default):
            raise TopologyError(
                f"node {node.name}: expected the logits to come from a linear (lm_head), got {node.format_node()}",
                node=node.name,
            )
        node = source(node)
    return node


def _is_scalar(value: object) -> bool:
    if isinstance(value, Node):
        return value.op == "get_attr" and values.tensor_value(value).numel() == 1
    return isinstance(value, (int, float))


def _scaled(product: Node) -> Node | None:
    """What a product or quotient scales: the factor beside a number, or beside one number a token. None where it mixes channels."""
    first, second = operands(product)
    if _is_scalar(second):
        return first
    if is_call(product, aten.div.Tensor):
        return None
    for x, by in ((first, second), (second, first)):
        if isinstance(by, Node) and len(values.shape(by)) == 3 and values.width(by) == 1 < values.width(x):
            return x
    return None


def find_residual(head: Node) -> Residual:
    """Close the set of stream values under add and scaling, backwards from the last norm, then collect readers."""
    x = source(head)
    start = source(x) if is_call(x, *NORMS) else x
    found: dict[Node, None] = {}
    writers: dict[Node, None] = {}
    gained: dict[Node, None] = {}
    pending = [start]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found[node] = None
        if is_call(node, aten.add.Tensor):
            pending.extend(a for a in operands(node) if isinstance(a, Node))
        elif is_call(node, aten.mul.Tensor, aten.div.Tensor) and (scaled := _scaled(node)) is not None:
            pending.append(scaled)
        elif is_call(node, ops.combine_experts):
            pending.append(source(node))
        elif is_call(node, *LINEARS, EMBEDDING):
            writers[node] = None
        elif is_call(node, *NORMS):
            gained[node] = None
        else:
            raise TopologyError(
                f"node {node.name}: in the residual stream; expected an add, a scaling, a linear, experts, an embedding or a norm "
                f"(gated streams are not supported); got {node.format_node()}",
                node=node.name,
            )
    order = {n: i for i, n in enumerate(head.graph.nodes)}
    stream = sorted(found, key=order.__getitem__)
    readers = find_readers(stream, set(gained))
    return Residual(
        stream, sorted(writers, key=order.__getitem__), sorted(gained, key=order.__getitem__), readers, fusable=not gained
    )  # fmt: skip


def find_readers(stream: list[Node], gained: set[Node]) -> list[ReadGroup]:
    """Group the linears that read the stream by the value they read."""
    inside, groups = set(stream), []
    for value in stream:
        direct: list[Node] = []
        for user in value.users:
            if user in inside and user not in gained:
                continue
            if is_call(user, *LINEARS):
                direct.append(user)
            elif is_call(user, *NORMS) and user not in gained:
                groups.append(ReadGroup(user, user, _linear_users(user)))
            else:
                raise TopologyError(
                    f"node {user.name}: reads the residual stream; expected a norm or a linear, got {user.format_node()}",
                    node=user.name,
                )
        if direct:
            groups.append(ReadGroup(value, None, direct))
    return groups


def _linear_users(norm: Node) -> list[Node]:
    others = [u for u in norm.users if not is_call(u, *LINEARS)]
    if others:
        raise TopologyError(
            f"node {others[0].name}: reads {norm.name}; expected only linears after a norm, got {others[0].format_node()}",
            node=others[0].name,
        )
    return list(norm.users)


def find_cuts(
    gm: GraphModule, residual: Residual, head: Node, beside: Set[tuple[Node, Node]] = frozenset()
) -> list[Node]:  # fmt: skip
    """Stream values through which every path from the embeddings to the logits goes (dominators of the head).

    beside: edges that lead past cuts, of what blocks read beside the stream (beside.py).
    """
    graph: nx.DiGraph = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_edges_from((source, node) for source in node.all_input_nodes if (source, node) not in beside)
    for node in residual.writers:
        if is_call(node, EMBEDDING):
            graph.add_edge(EMBEDDINGS, node)
    if EMBEDDINGS not in graph:
        first = residual.values[0]
        raise TopologyError(
            f"node {first.name}: the residual stream starts here; expected a token embedding, got {first.format_node()}",
            node=first.name,
        )
    live = nx.descendants(graph, EMBEDDINGS) | {EMBEDDINGS}
    dominator = nx.immediate_dominators(graph.subgraph(live), EMBEDDINGS)
    chain: list[Node] = []
    stream = set(residual.values)
    node = dominator[head]
    while isinstance(node, Node):
        if node in stream:
            chain.append(node)
        node = dominator[node]
    return chain[::-1]
