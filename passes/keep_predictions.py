"""keep-predictions: what the float model predicts for the calibration windows, for passes that learn from it. Changes nothing.

Of every token the k largest logits: k · 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from resq_compiler.analysis.topology import Topology
from resq_compiler.learning.end_to_end import teach
from resq_compiler.learning.holding import hold
from resq_compiler.learning.losses import Teacher
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class KeepPredictions(Pass):
    """Provide the Teacher. top: logits of every token that are kept."""

    name: ClassVar[str] = "keep-predictions"
    rewrites: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology,)
    provides: ClassVar[tuple[type, ...]] = (Teacher,)

    top: int = option(1000, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology = ctx.facts.get(Topology)
        hold(gm, ctx.work)
        found = teach(gm, topology, ctx.windows, self.top, lambda i, n: ctx.progress("float predictions", i, n))
        ctx.facts.put(Teacher(found))
        return 0
