"""learn-rotations: turn bases further, inside their parts, so that the quantized model predicts what the float model does.

    U_A -> U_A R, U_B -> U_B R        R learned, orthogonal, the identity at first; multiplied into weights, so it costs nothing

Behind quantize-activations and quantize-kv-cache: activations are quantized while learning, weights still float. The loss is the
divergence from the float model's top predictions (OSTQuant), or the cross entropy of the text (SpinQuant, and ResQ's trained variant).
`scales` learns scales of channels beside the rotations: between norms and linears, and of the hidden channels of gated feed-forwards.

Source: SpinQuant, arXiv 2405.16406; OSTQuant, arXiv 2501.13987. Differs: rotations are Cayley maps around their start, whose parameters
are free, in place of steps on the manifold; both have the same gradient there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.learning.end_to_end import Loss, Model
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.loop import Plan, judge_every
from resq_compiler.learning.losses import Teacher, cross_entropy, top_divergence
from resq_compiler.learning.places import Places
from resq_compiler.pipeline.learning_end_to_end import learn_end_to_end
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class LearnRotations(Pass):
    """Learn, and multiply what was learned into the weights; the start stays where nothing better was found.

    loss: what falls; "divergence" needs keep-predictions before. scales: of channels, too. steps: at most. rate: the highest.
    batch: windows a step. patience: judgements, 20 in all or one every 10 steps, without a better one that bring the last quarter of the
    rate's fall forward; inside it, as many end learning.
    """

    name: ClassVar[str] = "learn-rotations"
    exact: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    loss: Literal["divergence", "cross-entropy"] = "divergence"
    scales: bool = False
    optimizer: Literal["adam", "sgd"] = "adam"
    steps: int = option(100, 1)
    rate: float = option(0.003, 0)
    batch: int = option(2, 1)
    patience: int = option(5, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology = ctx.facts.get(Topology)
        places = Places(gm, topology, ctx.facts.get(ColumnPlan))
        places.check(self.name, pairs=True)
        learned = self._places(places, ctx)
        if not learned.transforms:
            ctx.note(f"{self.name}: nothing is learned: values do not come from a linear alone, either")
            return 0
        plan = Plan(self.steps, self.rate, self.batch, judge_every(self.steps), self.patience, self.optimizer)
        return learn_end_to_end(self.name, Model(gm, topology), learned, self._loss_of(ctx), plan, ctx)

    def _places(self, places: Places, ctx: PassContext) -> Learned:
        """What is learned."""
        learned = Learned()
        reason = places.add_stream(learned)
        if reason is not None:
            ctx.note(f"{self.name}: the rotation of the stream is not learned: {reason}")
        for block in places.topology.blocks:
            places.add_values(learned, block)
            if self.scales:
                places.add_gains(learned, block)
                places.add_hidden(learned, block)
        return learned

    def _loss_of(self, ctx: PassContext) -> Loss:
        """What falls on the calibration windows."""
        if self.loss == "cross-entropy":
            return lambda logits, index: cross_entropy(logits, ctx.windows[index])
        teacher = ctx.facts.get(Teacher)
        return lambda logits, index: top_divergence(logits, teacher.windows[index])
