"""How often a compiled mixture of experts sends a token elsewhere than the float model does."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Experts, Topology
from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools
from resq_compiler.ir.args import argument
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.util import memory

Choices = dict[Node, Tensor]
"""What experts a graph chose for some tokens, by the node that chooses: int64 [tokens, choices]."""


@memory.sparing()
@torch.no_grad()
def record(gm: GraphModule, ids: Tensor) -> Choices:
    """The largest scores' numbers wherever a graph looks for them, for token ids [n, length]; passes keep these nodes."""
    wanted = [n for n in gm.graph.nodes if n.op == "call_function" and _picks_largest(n)]
    if not wanted:
        return {}
    env: dict[Node, Any] = executor.first_tokens(gm, ids)
    executor.Schedule(gm, wanted, env).run(env)
    return {node: env[node].flatten(0, -2) for node in wanted}


def _picks_largest(node: Node) -> bool:
    return (
        graph_tools.target_text(node.target) == "getitem"
        and is_call(argument(node, "a"), aten.topk.default)
        and argument(node, "b") == 1
    )


def findings(gm: GraphModule, ids: Tensor, before: Choices, topology: Topology | None) -> list[str]:
    """A note on a mixture of experts, none for other models. before: what the float graph recorded for the same tokens."""
    mixtures = [] if topology is None else [(b.index, e) for b, _, e in topology.mixtures if e.indices in before]
    if not mixtures:
        return []
    after = record(gm, ids)
    moved = {index: share_moved(before[e.indices], after[e.indices], e) for index, e in mixtures}
    worst = max(moved, key=moved.__getitem__)
    return [
        f"routing: {100 * statistics.fmean(moved.values()):.1f} % of the choices of experts are others than those of the float model, on "
        f"calibration text; most in block {worst}, {100 * moved[worst]:.1f} %"
    ]


def share_moved(before: Tensor, after: Tensor, experts: Experts) -> float:
    """Share of choices [tokens, k] that are not among those of the same token before; their order does not count."""
    chosen = torch.zeros(len(before), experts.count, dtype=torch.bool).scatter_(1, before.cpu(), True)
    return 1 - float(chosen.gather(1, after.cpu()).float().mean())
