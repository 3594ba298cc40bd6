"""learn-scales: with all codes fixed, learn the numbers around them, so that the quantized model predicts what the float model does.

Scales of weight codes, gains of the norms before quantized linears, and shares of the range of quantizers below 8 bits. All of them are
there anyway, so this costs nothing at inference; a norm whose gain was folded gets one again. Behind all quantizers.

Source: the second phase of EfficientQAT, arXiv 2407.11062, section 3.2. Differs: against the float model's top predictions, and more
than step sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.learning.end_to_end import Model
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.loop import Plan
from resq_compiler.learning.losses import Teacher, divergence
from resq_compiler.learning.places import Places
from resq_compiler.pipeline.learning_end_to_end import learn_end_to_end
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class LearnScales(Pass):
    """Learn scales of codes; gains, clips: learn these too. steps, rate, batch, patience: as in learn-rotations."""

    name: ClassVar[str] = "learn-scales"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan, Teacher)

    gains: bool = True
    clips: bool = True
    steps: int = option(100, 1)
    rate: float = option(0.002, 0)
    batch: int = option(2, 1)
    patience: int = option(5, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, teacher = ctx.facts.get(Topology), ctx.facts.get(Teacher)
        learned, places = Learned(), Places(gm, topology, ctx.facts.get(ColumnPlan))
        places.check(self.name, pairs=False)
        places.add_codes(learned)
        if self.gains:
            places.add_free_gains(learned)
        if self.clips:
            places.add_clips(learned, list(gm.graph.nodes))
        if learned.empty:
            return 0

        def loss(logits: Tensor, index: int) -> Tensor:
            return divergence(logits, teacher.windows[index])

        plan = Plan(self.steps, self.rate, self.batch, patience=self.patience)
        return learn_end_to_end(self.name, Model(gm, topology), learned, loss, plan, ctx)
