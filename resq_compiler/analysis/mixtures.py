"""Mixtures of experts in a topology: which linear chooses the experts, and which linears weigh what a token gets."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from resq_compiler.analysis.topology import Experts
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.expert_views import CombineExperts
from resq_compiler.ir.graph_tools import is_call, only_user
from resq_compiler.ir.views import Linear


def find_experts(down: Node, inner: Iterable[Node], readers: set[Node]) -> Experts | None:
    """How the experts of a down projection are chosen; None where it is one of no mixture. inner: the linears before it.

    Raises TopologyError naming the node: not all of one mixture, or chosen by something else than one linear that reads the stream.
    """
    view = Linear.require(down)
    apart = [n for n in inner if Linear.require(n).indices is not view.indices]
    if apart:
        raise TopologyError(
            f"node {apart[0].name} ({graph_tools.module_of(apart[0])}): stands before {down.name}, which belongs to other experts, "
            "or to none",
            node=apart[0].name,
        )
    if view.indices is None:
        return None
    combined = CombineExperts.of(only_user(down))
    if combined is None:
        raise TopologyError(
            f"node {down.name} ({graph_tools.module_of(down)}): experts; expected one weighted sum over the choices of every token "
            "to read it",
            node=down.name,
        )
    count, _, _ = values.shape(view.weight)
    router = find_router(view.indices, readers)
    return Experts(router, view.indices, combined.weights, combined.node, int(count), int(values.width(view.indices)))


def find_router(indices: Node, readers: set[Node]) -> Node:
    """The one linear whose scores choose the experts. Raises TopologyError naming the node."""
    found: dict[Node, None] = {}
    pending, seen = [indices], {indices}
    while pending:
        node = pending.pop()
        if is_call(node, *Linear.targets):
            found[node] = None
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    where = f"node {indices.name} ({graph_tools.module_of(indices)}): chooses experts"
    if len(found) != 1:
        names = ", ".join(n.name for n in found) or "none"
        raise TopologyError(
            f"{where}; expected one linear behind it, a router, met {len(found)}: {names}", node=indices.name
        )
    (router,) = found
    if router not in readers:
        raise TopologyError(
            f"{where}; expected its router {router.name} to read the residual stream through a norm at most, got {router.format_node()}",
            node=router.name,
        )
    return router


def weighs_tokens(node: Node, readers: set[Node]) -> bool:
    """A linear with one output for a token, such as the gate of a shared expert: it scales what is written into the stream."""
    return node in readers and values.width(node) == 1
