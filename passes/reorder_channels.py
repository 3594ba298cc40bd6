"""reorder-channels: put the strongest input channels of every down projection last, where they get more bits.

The channels between gate/up and down may be permuted freely when only elementwise operators lie between: rows of gate and up
and columns of down move together. Free at inference. By energy, or by peak as QUIK does. Every expert of a mixture has an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import FeedForward, Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.experts import check_reached
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.ir.promises import Around
from resq_compiler.ir.views import Linear
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.numerics.expert_channels import ExpertEnergy, ExpertPeak
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Sort the hidden channels of feed-forwards by their energy, or their peak, on the calibration data, ascending.

    Of experts: expert_tokens, how many tokens one needs for an order of its own, others have that of their layer; all_experts: every token
    counts for every expert, not only for those it is routed to; unreached: whether one without tokens is an error.
    """

    name: ClassVar[str] = "reorder-channels"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    by: Literal["energy", "peak"] = "energy"
    expert_tokens: int = option(128, 1)
    all_experts: bool = False
    unreached: Literal["error", "layer"] = "error"

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        return requests.down_sizes(ctx.facts.get(Topology), self.by, self.all_experts)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        seen = ctx.facts.get(Statistics)
        found = requests.feed_forwards(ctx.facts.get(Topology))
        free = [(site, f) for site, f in found if f.channelwise]
        if kept := [f.down.name for _, f in found if not f.channelwise]:
            others = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            ctx.note(
                f"node {kept[0]}{others}: its input channels cannot be reordered, operators before it mix them, or multiply them by "
                "what is made beside the stream; its 8-bit channels are the last ones, not the strongest (down_proj='hadamard' may serve "
                "this model better)"
            )
        for site, feed_forward in free:
            reorder(gm, feed_forward, self._sizes(seen, site, feed_forward).argsort(dim=-1, stable=True))
        return len(free)

    def _sizes(self, seen: Statistics, site: Site, feed_forward: FeedForward) -> Tensor:
        """Of each channel, [width] or [E, width]."""
        if feed_forward.experts is None:
            kind: type[Energy] | type[Peak] = Energy if self.by == "energy" else Peak
            return seen.get(kind, site).sizes
        found = seen.get(ExpertEnergy, site) if self.by == "energy" else seen.get(ExpertPeak, site)
        check_reached(found.counts.tolist(), feed_forward.experts, self.unreached == "layer")
        return found.sizes(self.expert_tokens)


def reorder(gm: GraphModule, feed_forward: FeedForward, order: Tensor) -> None:
    """Permute the hidden channels of a feed-forward: order [width], or [E, width] for each expert."""
    for linear in (*feed_forward.gates, *feed_forward.ups):
        reorder_rows(gm, linear, order)
    change(gm, Linear.require(feed_forward.down), order, -1)


def change(gm: GraphModule, linear: Linear, order: Tensor, dim: int) -> None:
    """Permute rows (-2) or columns (-1) of a weight, of each expert by an order of its own."""
    if linear.of_experts and order.dim() == 2:
        linear.change_experts(gm, lambda w, experts: taken(w, order[experts], dim))
    else:
        columns, rows = (
            Around(before=lambda x: taken(x, order.argsort(), -1)),
            Around(after=lambda y: taken(y, order, -1)),
        )
        linear.change_weight(gm, lambda w: taken(w, order, dim), columns if dim == -1 else rows)


def taken(value: Tensor, order: Tensor, dim: int) -> Tensor:
    """The value with the entries of a dimension, counted from the last, in another order, the same for all experts or one for each."""
    if order.dim() == 1:
        return value.index_select(dim, order.to(value.device))
    return torch.stack([one.index_select(dim, mine) for one, mine in zip(value, order, strict=True)])


def reorder_rows(gm: GraphModule, node: Node, order: Tensor) -> None:
    """Permute the output features of a linear."""
    linear = Linear.require(node)
    change(gm, linear, order, -2)
    bias = linear.bias_tensor(gm)
    if bias is not None:
        linear.set_bias(gm, taken(bias, order, -1), ReorderChannels.name)
