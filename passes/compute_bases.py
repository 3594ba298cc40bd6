"""compute-bases: run the calibration data, take second moments, and make U_A, U_B and U_C from them. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler.calibration.bases import make_bases, needs_moments
from resq_compiler.calibration.moments import calibrate
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class ComputeBases(Pass):
    """Set ctx.moments and ctx.bases."""

    name: ClassVar[str] = "compute-bases"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if needs_moments(ctx.config):
            ctx.moments = ctx.moments or calibrate(gm, ctx)
        ctx.bases = make_bases(gm, ctx.moments, ctx.topology, ctx.config)
        return 0
