"""compute-bases: run the calibration data, take second moments, and make U_A, U_B and U_C from them. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler import calibration
from resq_compiler.pipeline import Pass, PassContext


@dataclass(frozen=True)
class ComputeBases(Pass):
    """Set ctx.moments and ctx.bases."""

    name: ClassVar[str] = "compute-bases"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if calibration.needs_moments(ctx.config):
            ctx.moments = ctx.moments or calibration.calibrate(gm, ctx)
        ctx.bases = calibration.make_bases(gm, ctx.moments, ctx.topology, ctx.config)
        return 0
