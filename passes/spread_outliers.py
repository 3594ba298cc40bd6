"""spread-outliers: rotate blocks of channels so that outliers are spread over their block, and deal channels evenly to blocks (DuQuant).

    x  ->  x R1 P R2        linears read it with W (R1 P R2)⁻ᵀ

At the input of every linear. R1 and R2 are block-diagonal, found greedily on the loudest tokens; P is the zigzag permutation. The
transform stays an operator of the graph (online), its inverse is multiplied into weights. A value that a projection already spreads is
left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.ir import meta
from resq_compiler.numerics.channels import LoudTokens
from resq_compiler.numerics.spreading import spreading_transform
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.placing import place


@dataclass(frozen=True)
class SpreadOutliers(Pass):
    """Insert the transforms. block: channels that are rotated together, at most. steps: of the greedy search, at most."""

    name: ClassVar[str] = "spread-outliers"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    block: int = option(128, 2)
    steps: int = option(256, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        return requests.loud_inputs(ctx.facts.get(Topology))

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, seen = ctx.facts.get(Topology), ctx.facts.get(Statistics)
        places = list(requests.linear_inputs(topology).items())
        for i, (site, (value, linears)) in enumerate(places):
            ctx.progress("spread outliers", i, len(places))
            self._spread(gm, ctx, site, value, linears, seen.get(LoudTokens, site))
        ctx.progress("spread outliers", len(places), len(places))
        return 2 * len(places)

    def _spread(
        self, gm: GraphModule, ctx: PassContext, site: Site, value: Node, linears: list[Node], loud: LoudTokens
    ) -> None:
        transform = spreading_transform(loud.rows, self.block, self.steps, ctx.seed, str(site))
        name = str(site).replace(".", "_")
        spread = place(gm, ctx, transform, f"D.{name}", linears[0], SpreadOutliers)
        turned = spread.forward(value, linears, meta.Projection("D", online=True, block=site.block))
        spread.inverse(turned, linears, meta.Projection("D", inverse=True, block=site.block))
