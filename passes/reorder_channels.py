"""reorder-channels: put the strongest input channels of every down projection last, where they get more bits.

The channels between gate/up and down may be permuted freely when only elementwise operators lie between: rows of gate and up
and columns of down move together. Free at inference. By energy, or by peak as QUIK does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import FeedForward, Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.ir.views import Linear
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Sort the hidden channels of feed-forwards by their energy, or their peak, on the calibration data, ascending."""

    name: ClassVar[str] = "reorder-channels"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    by: Literal["energy", "peak"] = "energy"

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        return requests.down_sizes(ctx.facts.get(Topology), self.by)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        seen = ctx.facts.get(Statistics)
        kind: type[Energy] | type[Peak] = Energy if self.by == "energy" else Peak
        done = 0
        for site, feed_forward in requests.feed_forwards(ctx.facts.get(Topology)):
            if not feed_forward.channelwise:
                ctx.note(
                    f"node {feed_forward.down.name}: its input channels cannot be reordered, operators before it mix them; its 8-bit "
                    "channels are the last ones, not the strongest (down_proj='hadamard' may serve this model better)"
                )
                continue
            reorder(gm, feed_forward, seen.get(kind, site).sizes.argsort(stable=True))
            done += 1
        return done


def reorder(gm: GraphModule, feed_forward: FeedForward, order: Tensor) -> None:
    """Permute the hidden channels of a feed-forward."""
    for linear in (*feed_forward.gates, *feed_forward.ups):
        reorder_rows(gm, linear, order)
    down = Linear.require(feed_forward.down)
    down.change_weight(gm, lambda w: w[:, order].contiguous())


def reorder_rows(gm: GraphModule, node: Node, order: Tensor) -> None:
    """Permute the output features of a linear."""
    linear = Linear.require(node)
    linear.change_weight(gm, lambda w: w[order].contiguous())
    bias = linear.bias_tensor(gm)
    if bias is not None:
        linear.set_bias(gm, bias[order], ReorderChannels.name)
