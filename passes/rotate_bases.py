"""rotate-bases: turn the bases at random inside each part, so that outliers inside a part are spread over it. Changes nothing.

    U = P · blockdiag(R_low, R_high)

The subspaces of the parts stay as they are. Source: ResQ, arXiv 2412.14363, equations 2 to 5; R may be a randomized Hadamard matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.calibration.bases import Bases, rotated
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class RotateBases(Pass):
    """Provide rotated Bases; rotation: what kind of random matrix."""

    name: ClassVar[str] = "rotate-bases"
    rewrites: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Bases, ColumnPlan)
    provides: ClassVar[tuple[type, ...]] = (Bases,)

    rotation: Literal["hadamard", "orthogonal"] = "hadamard"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        ctx.facts.put(rotated(ctx.facts.get(Bases), ctx.facts.get(ColumnPlan), self.rotation, ctx.seed))
        return 0
