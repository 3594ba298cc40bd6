"""What blocks read beside the residual stream: values made of the token ids for all blocks, and keys and values of an earlier block.

embeddings of each layer    a factor of a feed-forward, from a lookup that does not write into the stream (and, with it, a linear of
                            the embedded tokens)
shared keys and values      several attentions read the same cache: the first of them keeps it
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Residual
from resq_compiler.calibration import executor
from resq_compiler.errors import TopologyError
from resq_compiler.ir import ops, views
from resq_compiler.ir.graph_tools import is_call


def find_beside(gm: GraphModule, residual: Residual) -> set[Node]:
    """Values that depend on a lookup of token ids which does not write into the stream, on no attention, and are not of the stream."""
    stream, lookups = {*residual.writers, *residual.values}, executor.lookups(gm)
    found: set[Node] = set()
    behind_attention: set[Node] = set()
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if is_call(node, ops.attention) or not behind_attention.isdisjoint(inputs):
            behind_attention.add(node)
        elif node not in stream and node.op != "output" and (node in lookups or not found.isdisjoint(inputs)):
            found.add(node)
    return found


def find_keepers(cores: Sequence[Node]) -> list[int]:
    """For each attention the number of the first one that reads the same keys and values. Raises TopologyError: the same of one alone."""
    found: list[int] = []
    for core in cores:
        view = views.Attention.require(core)
        read = [views.Attention.require(other) for other in cores[: len(found)]]
        keeper = next((i for i, other in enumerate(read) if other.k is view.k and other.v is view.v), len(found))
        half = next((other for other in read if (other.k is view.k) != (other.v is view.v)), None)
        if half is not None:
            raise TopologyError(
                f"nodes {half.node.name} and {core.name}: two attentions share keys or values alone; expected both, or neither",
                node=core.name,
            )
        found.append(keeper)
    return found


def edges_beside(beside: set[Node], cores: Sequence[Node], keepers: Sequence[int]) -> set[tuple[Node, Node]]:
    """The edges by which blocks read them."""
    edges = {(node, user) for node in beside for user in node.users if user not in beside}
    for i, core in enumerate(cores):
        if keepers[i] != i:
            view = views.Attention.require(core)
            edges |= {(view.k, core), (view.v, core)}
    return edges
