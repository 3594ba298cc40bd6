"""search-scales: multiply weights by scales of the channels that they read, found by what rounding then does to the block (AWQ).

    linear(norm(x, g), W)   ->  linear(norm(x, g / s), W diag(s))          s = mean|x|^power, centred
    down(act(g) * up)       ->  up's rows / s, down's columns · s          (and through relu)
    o(attention(.., v))     ->  v's rows / s, o's columns · s              where every query head has a key/value head of its own

For every place the power from 0 to 0.95 is taken with which rounding its weights changes the output of the block least, on calibration
tokens. Power 0 is no scale at all, so no place gets worse by this measure. Inserted as transforms; fuse-projections multiplies them in.

Source: AWQ, arXiv 2306.00978, section 3.2. Differs: the error is always that of the whole block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.calibration import executor
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.args import operands, source
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Linear, Norm
from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.scaling import salience_scales
from resq_compiler.numerics.transforms import Scaling
from resq_compiler.numerics.weights import dequantize_weight, quantize_weight_rtn
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.placing import place
from resq_compiler.util import processes
from resq_compiler.util.text import number, table

HEADER = ("place", "power", "error of the block, dB against none")


@dataclass(frozen=True)
class Place:
    """A value whose channels may be scaled: `written` is where the scale goes in, `read` the value that `linears` read."""

    name: str
    written: Node
    read: Node
    linears: tuple[Node, ...]


@dataclass(frozen=True)
class SearchScales(Pass):
    """Insert the scales. windows: calibration windows that the search looks at. steps: powers that are tried."""

    name: ClassVar[str] = "search-scales"
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    windows: int = option(2, 1)
    steps: int = option(20, 2)

    @property
    def needs_calibration(self) -> bool:
        return True

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, plan = ctx.facts.get(Topology), ctx.facts.get(ColumnPlan)
        if plan.weight_bits == FLOAT_BITS:
            ctx.lines.append("weights stay in float: nothing to search")
            return 0
        runner = Lockstep.begin(gm, executor.batches(ctx.windows[: self.windows]), topology.blocks[0].start, ctx.work)
        found: list[tuple[Place, Block, Tensor]] = []
        rows = []
        for block in topology.blocks:
            ctx.progress("search scales", block.index, len(topology.blocks))
            for where in places(topology, block):
                if any(len(Linear.require(node).weight_shape(gm)) > 2 for node in where.linears):
                    ctx.note(f"{where.name}: its weights are those of experts, whose channels are not scaled")
                    continue
                power, scale, gain = self._search(gm, where, block, runner, plan)
                rows.append((where.name, number(power, 2), number(gain, 2)))
                if power:
                    found.append((where, block, scale))
            runner.advance(block.end)
        for where, block, scale in found:
            insert(gm, ctx, where, block, scale)
        ctx.lines += table(HEADER, rows).splitlines()
        return len(found)

    def _search(
        self, gm: GraphModule, where: Place, block: Block, runner: Lockstep, plan: ColumnPlan
    ) -> tuple[float, Tensor, float]:
        """The best power, its scale, and by how many dB the block's error is below that of power 0."""
        batches = known_values(gm, runner, where, block)
        means = torch.stack([b[where.read].flatten(0, -2).abs().mean(0) for b in batches]).mean(0)
        errors, scales = [], []
        for step in range(self.steps):
            scales.append(salience_scales(means, step / self.steps) if step else torch.ones_like(means).double())
            errors.append(rounding_error(gm, where, block, batches, scales[-1], plan))
        best = min(range(self.steps), key=errors.__getitem__)
        tiny = torch.finfo(torch.float64).tiny
        best = processes.current().agreed(best)
        gain = 10 * float(torch.tensor((errors[0] + tiny) / (errors[best] + tiny)).log10())
        return best / self.steps, scales[best], gain


def places(topology: Topology, block: Block) -> Iterator[Place]:
    """The values of a block whose channels can be scaled at no cost."""
    name = f"blocks.{block.index}"
    a = block.attention
    inside = {*a.readers, *(n for f in block.feed_forwards for n in (*f.gates, *f.ups))}
    for group in topology.readers:
        norm = Norm.of(group.norm)
        if norm is not None and norm.gain is not None and inside & set(group.linears):
            kind = "attention" if a.readers[0] in group.linears else "mlp"
            yield Place(f"{name}.{kind}", group.value, group.value, tuple(group.linears))
    if a.num_heads == a.value_heads and a.value_is_linear and a.head_dim == a.value_dim:
        yield Place(f"{name}.o", a.v, source(a.o), (a.o,))
    for f in block.feed_forwards:
        if passes_scales(source(f.down)):
            yield Place(f"{name}.down", source(f.down), source(f.down), (f.down,))


def passes_scales(x: Node) -> bool:
    """Whether positive scales of channels go through what makes a value, into a linear."""
    if is_call(x, aten.mul.Tensor):
        return any(Linear.of(factor) is not None for factor in operands(x))
    return is_call(x, aten.relu.default) and Linear.of(source(x)) is not None


def known_values(gm: GraphModule, runner: Lockstep, where: Place, block: Block) -> list[dict[Node, Any]]:
    """For every batch the value in question, the block's output, and what else the way between them needs."""
    found: list[dict[Node, Any]] = []
    for i in range(len(runner.states)):
        env = runner.known(i)
        executor.Schedule(gm, [where.read, block.end], env, keep=set(gm.graph.nodes)).run(env)
        found.append(env)
    return found


def rounding_error(
    gm: GraphModule, where: Place, block: Block, batches: list[dict[Node, Any]], scale: Tensor, plan: ColumnPlan
) -> float:
    """Sum of squares of what rounding the scaled weights of a place changes in the block's output."""
    rounded: dict[Node, Tensor] = {}
    for linear in map(Linear.require, where.linears):
        weight = linear.weight_tensor(gm)
        scaled = weight.double() * scale
        parts = [Part(plan.weight_bits, 0, weight.shape[1])]
        codes = quantize_weight_rtn(scaled, parts, clip="max", group_size=plan.weight_group_size)
        rounded[linear.weight] = (dequantize_weight(codes).double() / scale).to(weight.dtype)
    total = 0.0
    changed = executor.depends_on(gm, where.linears)
    with graph_tools.substituted(gm, rounded):
        for env in batches:
            given = {n: v for n, v in env.items() if n not in changed and n.op != "get_attr"}
            expected = env[block.end]
            executor.Schedule(gm, [block.end], given).run(given)
            total += float((given[block.end].double() - expected.double()).square().sum())
    return total


def insert(gm: GraphModule, ctx: PassContext, where: Place, block: Block, scale: Tensor) -> None:
    """x / s where it is written, x · s where linears read it."""
    divide = place(gm, ctx, Scaling(1 / scale), f"S.{where.name}", where.linears[0], SearchScales)
    users = [user for user in where.written.users if user in where.linears or where.written is not where.read]
    divided = divide.forward(where.written, users, meta.Projection("S", block=block.index))
    value = divided if where.written is where.read else where.read
    divide.inverse(value, where.linears, meta.Projection("S", inverse=True, block=block.index))
