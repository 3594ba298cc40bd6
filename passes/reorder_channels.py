"""reorder-channels: put the strongest input channels of every down projection last, where they get more bits.

The channels between gate/up and down may be permuted freely when only elementwise operators lie between: rows of gate and up
and columns of down move together. Free at inference. `down_proj="energy-split"` orders by energy, "outliers" by peak (QUIK).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resq_compiler.passes.fold_norms import linear_weight, replace_weight
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Sort the hidden channels of feed-forwards by their size on the calibration data, ascending."""

    name: ClassVar[str] = "reorder-channels"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        size = ctx.moments.down_energy if ctx.config.down_proj == "energy-split" else ctx.moments.down_peak
        done = 0
        for block in ctx.topology.blocks:
            for feed_forward in block.feed_forwards:
                down = feed_forward.down
                if not feed_forward.channelwise:
                    ctx.note(
                        f"node {down.name}: its input channels cannot be reordered, operators before it mix them; its 8-bit channels are "
                        "the last ones, not the strongest (down_proj='hadamard' may serve this model better)"
                    )
                    continue
                order = size[down].argsort(stable=True)
                for linear in (*feed_forward.gates, *feed_forward.ups):
                    reorder_rows(gm, linear, order)
                replace_weight(gm, down, linear_weight(gm, down)[:, order].contiguous())
                done += 1
        return done


def reorder_rows(gm: GraphModule, linear: Node, order: Tensor) -> None:
    """Permute the output features of a linear."""
    replace_weight(gm, linear, linear_weight(gm, linear)[order].contiguous())
    bias = linear.args[2] if len(linear.args) > 2 else None
    if bias is not None:
        graph_tools.set_tensor(gm, str(bias.target), graph_tools.get_tensor(gm, bias)[order])
