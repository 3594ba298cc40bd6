"""find-topology: find the residual stream, blocks, attention and feed-forward, and label the linears. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler.analysis.dataflow import analyze
from resq_compiler.analysis.topology import Topology
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class FindTopology(Pass):
    """Provide the Topology."""

    name: ClassVar[str] = "find-topology"
    rewrites: ClassVar[bool] = False
    provides: ClassVar[tuple[type, ...]] = (Topology,)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        ctx.facts.put(analyze(gm, ctx.overrides))
        return 0
