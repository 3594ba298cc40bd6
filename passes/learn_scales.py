"""learn-scales: learn the numbers around codes, and codes if wanted, so that the quantized model predicts what the float model does.

Scales of weight codes, gains of the norms before quantized linears, and shares of the range of the cache and of inputs below 8 bits.
All of them are there anyway, so this costs nothing at inference; a norm whose gain was folded gets one again. With `codes` the codes of
weights move too, from those that quantize-weights found: 20 bytes of memory for each weight of the whole model. Behind all quantizers.

Source: the second phase of EfficientQAT, arXiv 2407.11062, section 3.2. Differs: against the float model's top predictions, and more
than step sizes; codes as in quantization-aware training with the straight-through estimator (arXiv 1308.3432).
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
from resq_compiler.learning.learned_codes import LearnedCodes
from resq_compiler.learning.loop import Plan, judge_every
from resq_compiler.learning.losses import Teacher, divergence
from resq_compiler.learning.places import Places, coded_nodes
from resq_compiler.pipeline.learning_end_to_end import learn_end_to_end
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class LearnScales(Pass):
    """Learn scales of codes; gains, clips, codes: learn these too. steps, rate, batch, patience: as in learn-rotations.

    code_rate: the rate of codes, in steps between two codes.
    """

    name: ClassVar[str] = "learn-scales"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan, Teacher)

    gains: bool = True
    clips: bool = True
    codes: bool = False
    steps: int = option(100, 1)
    rate: float = option(0.0003, 0)
    code_rate: float = option(0.0007, 0)
    batch: int = option(1, 1)
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
        if self.codes:
            learned.codes = LearnedCodes(gm, coded_nodes(gm), ctx.seed)
        if learned.empty:
            return 0

        def loss(logits: Tensor, index: int) -> Tensor:
            return divergence(logits, teacher.windows[index])

        plan = Plan(self.steps, self.rate, self.batch, judge_every(self.steps), self.patience)
        factors = {"codes": self.code_rate / self.rate if self.rate else 0.0}
        return learn_end_to_end(self.name, Model(gm, topology), learned, loss, plan, ctx, factors)
