"""What calibration sees of the experts of a mixture: the tokens routed to each, or every token through every expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Experts, Topology
from resq_compiler.calibration import executor
from resq_compiler.errors import DataError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.graph_tools import emit, module_of
from resq_compiler.util import memory


def every_expert(indices: Tensor, count: int) -> Tensor:
    """Indices that send every token through all experts: [..., k] -> [..., count]. For statistics: no compiled graph has it."""
    return torch.arange(count, device=indices.device).expand(*indices.shape[:-1], count).contiguous()


def on_every_expert(value: Node, experts: Experts) -> tuple[Node, Node]:
    """(value, indices) where every token goes through every expert: nodes that nothing reads, for a calibration run to look at.

    Of all that lies between the choice of experts and the value there is a second copy, which the next elimination of dead code removes.
    """
    graph, made_by = value.graph, "calibration"
    behind = _depending([experts.indices], graph_tools.ancestors([value]))
    with graph.inserting_after(value if value in behind else experts.indices):
        indices = emit(graph, every_expert, (experts.indices, experts.count), value, made_by)
    copies, last = {experts.indices: indices}, indices
    for node in graph.nodes:
        if node in behind and node is not experts.indices:
            with graph.inserting_after(last):
                last = graph.node_copy(node, lambda n: copies.get(n, n))
            values.forget(last)
            copies[node] = last
    return copies.get(value, value), indices


def _depending(sources: list[Node], inside: set[Node]) -> set[Node]:
    """The nodes of a set that depend on the sources, which are among them."""
    found = set(sources)
    pending = list(sources)
    while pending:
        for user in pending.pop().users:
            if user in inside and user not in found:
                found.add(user)
                pending.append(user)
    return found


def check_reached(counts: list[int], experts: Experts, allowed: bool) -> None:
    """Raise DataError naming the router where no token reached an expert, unless that is allowed."""
    missed = [i for i, count in enumerate(counts) if count == 0]
    if missed and not allowed:
        shown = ", ".join(map(str, missed[:8])) + (", ..." if len(missed) > 8 else "")
        raise DataError(
            f"node {experts.router.name} ({module_of(experts.router)}): no calibration token was routed to {len(missed)} of "
            f"{experts.count} experts ({shown}); expected tokens for each: give more calibration data, or say "
            "calibrate_all_experts=True (every token goes through every expert, for statistics only) or unreached_experts='layer' "
            "(they take the statistics of all tokens of their layer)",
            node=experts.router.name,
        )


Routes = dict[Node, Tensor]
"""Values of the nodes that say which experts tokens go through, and what each counts."""


def float_routes(gm: GraphModule, batches: Sequence[Tensor], topology: Topology) -> list[Routes]:
    """How the float model routes every batch of token ids: activations and cache as they are before their quantizers."""
    wanted = [node for _, _, e in topology.mixtures for node in (e.indices, e.weights)]
    if not wanted:
        return []
    schedule = executor.Schedule(gm, wanted, graph_tools.placeholders(gm.graph))
    found: list[Routes] = []
    for ids in batches:
        env = executor.first_tokens(gm, ids)
        schedule.run(env, instead=UNQUANTIZED)
        found.append({node: env[node] for node in wanted})
        memory.trim()
    return found


UNQUANTIZED: dict[object, Callable] = {
    ops.quantize: lambda x, *_: x, ops.dequantize: lambda x: x, ops.quantize_dequantize: lambda x, *_: x,
}  # fmt: skip
"""Quantizers that change nothing."""
