"""learn-blocks: weights become codes whose scales are learned, block by block, against the output of the float block.

    linear(dequantize(codes), W)  ->  quantized_linear(codes, q, scale)

Learned for each block: the share of the range of every row (or group) of a weight, scales of channels between norms and linears and of
hidden channels, and shares of the range of quantizers. The block reads what the quantized blocks before it make. Behind
quantize-activations and quantize-kv-cache; quantize-weights after it finds lm_head alone, if that.

Source: OmniQuant, arXiv 2308.13137. Differs: no shifts, which norms without biases have no place for; the loss is relative to the size of
every token; scales start from a search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resq_compiler.passes.quantize_weights import replace_by_codes
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.ir import meta
from resq_compiler.ir.views import Linear
from resq_compiler.learning.blockwise import BlockTask, advance
from resq_compiler.learning.clipped_weights import ClippedWeights, coded_parts
from resq_compiler.learning.end_to_end import Border, Model
from resq_compiler.learning.holding import hold
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.loop import Plan, Task, held_back, learn, report
from resq_compiler.learning.places import Places
from resq_compiler.learning.running import Run
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class LearnBlocks(Pass):
    """Learn and quantize block by block.

    scales: of channels, too. clips: of quantizers, too. windows: of the calibration text, at most. steps, rate, batch, patience: of every
    block, as in learn-rotations.
    """

    name: ClassVar[str] = "learn-blocks"
    exact: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    scales: bool = True
    clips: bool = True
    windows: int = option(32, 2)
    steps: int = option(60, 1)
    rate: float = option(0.005, 0)
    batch: int = option(2, 1)
    patience: int = option(3, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, windows = ctx.facts.get(Topology), ctx.windows[: self.windows]
        held_back(len(windows), self.name)
        Places(gm, topology, ctx.facts.get(ColumnPlan)).check(self.name, pairs=True)
        hold(gm, ctx.work)
        model = Model(gm, topology)
        start = [model.stream_start(Run(gm), ids) for ids in windows.split(1)]
        exact, quantized = start, start
        done = 0
        for block in topology.blocks:
            ctx.progress(self.name, block.index, len(topology.blocks))
            exact = advance(model, Run(gm, quantized=False), block, windows, exact)
            done += self._block(gm, ctx, model, block, windows, quantized, exact)
            quantized = advance(model, Run(gm), block, windows, quantized)
        ctx.progress(self.name, len(topology.blocks), len(topology.blocks))
        return done

    def _block(
        self, gm: GraphModule, ctx: PassContext, model: Model, block: Block, windows: Tensor, inputs: list[Border],
        targets: list[Border],
    ) -> int:  # fmt: skip
        """Learn for one block and put its codes in place; returns how many parts got codes."""
        plan, nodes = ctx.facts.get(ColumnPlan), nodes_of(gm, block)
        learned, places = Learned(), Places(gm, model.topology, plan)
        if self.scales:
            places.add_gains(learned, block)
            places.add_hidden(learned, block)
        if self.clips:
            places.add_clips(learned, quantizers_of(gm, block))
        learned.weights = ClippedWeights(gm, coded_parts(nodes, plan.weight_group_size))
        name, held = f"{self.name} {block.index}", held_back(len(windows), self.name)
        work = BlockTask(model, block, learned, windows, inputs, targets, held)
        task = Task(name, learned, len(windows) - held, work.step, work.judge)
        plan_of_steps = Plan(self.steps, self.rate, self.batch, patience=self.patience)
        with learned.computing():
            outcome = learn(task, plan_of_steps, ctx.seed, ctx.work, quiet)
        report(ctx.lines, ctx.note, name, outcome)
        learned.write(gm, self.name)
        for part in learned.weights.parts.values():
            weight = Linear.require(part.node).weight_tensor(gm)
            replace_by_codes(gm, part.node, learned.weights.codes(part.target, weight))
        return len(learned.weights.parts)


def nodes_of(gm: GraphModule, block: Block) -> list[Node]:
    """The parts of the linears of a block."""
    facts = ((node, meta.get(node, meta.LinearPart)) for node in gm.graph.nodes)
    return [node for node, fact in facts if fact is not None and fact.site.block == block.index]


def quantizers_of(gm: GraphModule, block: Block) -> list[Node]:
    """The quantizers of a block."""
    facts = ((node, meta.get(node, meta.QuantizerSite)) for node in gm.graph.nodes)
    return [node for node, fact in facts if fact is not None and fact.block == block.index]


def quiet(what: str, done: int, total: int) -> None:
    """Steps inside a block are not told."""
