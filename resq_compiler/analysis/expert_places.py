"""From the mixtures of a model to the experts whose bits are free."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.expert_choices import ExpertChoice
from resq_compiler.analysis.sensitivity import Felt
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import FeedForward, Topology
from resq_compiler.ir import values
from resq_compiler.ir.args import source
from resq_compiler.ir.views import Linear
from resq_compiler.util import processes


def choices(
    gm: GraphModule, topology: Topology, plan: ColumnPlan, energies: Mapping[Site, Tensor], measured: Felt
) -> list[ExpertChoice]:  # fmt: skip
    """All experts of the model, by block. energies: of what linears read, those columns first that get high bits."""
    found = []
    for block, feed_forward, experts in topology.mixtures:
        shares, sizes = parts_of_experts(gm, plan, feed_forward, block.index, energies)
        felt = processes.current().from_first(measured.experts[source(feed_forward.down)])
        seen_once = felt.sum() / max(measured.tokens * experts.choices, 1)
        found += [ExpertChoice(block.index, each, shares, sizes) for each in (felt + seen_once).tolist()]
    return found


def parts_of_experts(
    gm: GraphModule, plan: ColumnPlan, feed_forward: FeedForward, block: int, energies: Mapping[Site, Tensor]
) -> tuple[tuple[float, float], tuple[int, int]]:  # fmt: skip
    """Of one expert: the shares of what its linears read in main and in high columns, added up, and how many weights read these."""
    shares, sizes = [0.0, 0.0], [0, 0]
    for linear, name in linears_of(feed_forward):
        width, (_, rows, _) = values.width(source(linear)), Linear.require(linear).weight_shape(gm)
        site = Site("mlp") if name == "mlp" else Site("down", block)
        each = energies[site].flip(0) / energies[site].sum() if site in energies else torch.full((width,), 1 / width)
        for part in plan.linear_parts(width, name, block):
            if part.kind != "low":
                i = int(part.kind == "high")
                shares[i] += float(each[part.start : part.stop].sum())
                sizes[i] += rows * (part.stop - part.start)
    return (shares[0], shares[1]), (sizes[0], sizes[1])


def linears_of(feed_forward: FeedForward) -> list[tuple[Node, str]]:
    """The linears of a feed-forward, and the site of what they read."""
    return [*((n, "mlp") for n in (*feed_forward.gates, *feed_forward.ups)), (feed_forward.down, "down")]
