"""fold-norms: multiply the gain of every norm into the linears that read it, so that norms commute with rotations.

    linear(rms_norm(x, g), W)          -> linear(rms_norm(x, None), W diag(g))
    linear(layer_norm(x, g, b), W, c)  -> linear(layer_norm(x), W diag(g), c + W b)
    layer_norm(x), all writers centred -> rms_norm(x)

Where every norm on the stream is a LayerNorm, its mean subtraction moves into the writers: embeddings and output projections
lose their mean over the hidden dimension, after which LayerNorm and RMSNorm agree (SliceGPT, arXiv 2401.15024, section 3.2).
Models with RMSNorm are not centred: that would change them. Arithmetic in float64, rounded once.

Where folding would cost more than `most_lost` dB of what 8-bit activations keep (analysis/folding.py; mean over the reading linears, on a
calibration window), U_A of the whole stream stays online, as the override `residual: {fusable: false}` says.

Where U_A stays online (post-norm models) nothing is folded: it is multiplied in behind the gain, and what is quantized is the value with
its gain. A gain often puts down a channel that is far larger than all others, and quantized before it the others would be lost.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.folding import FoldingCost
from resq_compiler.analysis.topology import ReadGroup, Topology
from resq_compiler.calibration.statistics import both, observe
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten, is_call, rewrite
from resq_compiler.ir.views import Embedding, Linear, Norm
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory
from resq_compiler.util.text import number, table

LAYER_NORM = aten.layer_norm.default
TOKENS = 256  # enough: what matters is in every token
HEADER = ("norm", "8 bits before the gain, dB", "behind it, dB", "lost, dB")


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Fold gains, biases and means of the norms that read the residual stream."""

    name: ClassVar[str] = "fold-norms"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    most_lost: float = option(12.0, 0)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology = ctx.facts.get(Topology)
        residual = topology.residual
        if residual.fusable and ctx.calibration is not None:
            costs = measure_costs(gm, topology, ctx)
            ctx.lines += lines_of(costs)
            lost = statistics.fmean(cost.lost for _, cost in costs) if costs else 0.0
            if lost > self.most_lost:
                residual.fusable = False
                ctx.note(
                    f"U_A stays online before attention and feed-forward: folding the gains of norms would cost 8-bit activations "
                    f"{lost:.0f} dB, more than {self.most_lost:g} (fold-norms, most-lost); it is two matrices for each block"
                )
        if not residual.fusable:
            return 0
        done = 0
        for group in residual.readers:
            if group.norm is not None and fold_gain(gm, group.norm, group.linears):
                done += 1
                memory.trim()  # the weights before
        norms = [group for group in residual.readers if is_call(group.norm, LAYER_NORM)]
        if len(norms) == len(residual.readers):
            for writer in residual.writers:
                center(gm, writer)
            for group in norms:
                group.norm = group.value = to_rms_norm(group.value)
            done += len(norms)
        graph_tools.delete_unused_tensors(gm)
        return done


def measure_costs(gm: GraphModule, topology: Topology, ctx: PassContext) -> list[tuple[ReadGroup, FoldingCost]]:
    """What folding costs every group of linears, on the beginning of a calibration window."""
    costs = [(group, cost) for group in topology.readers if (cost := FoldingCost.of(gm, group)) is not None]
    taps: dict[Node, Callable[[Tensor], None]] = {}
    for group, cost in costs:
        x = Norm.require(group.norm).x
        taps[x] = both(taps[x], cost.see) if x in taps else cost.see
    if taps:
        observe(gm, taps, ctx.windows[:1, :TOKENS], lambda done, total: ctx.progress("folding", done, total))
    return costs


def lines_of(costs: list[tuple[ReadGroup, FoldingCost]]) -> list[str]:
    """The table of this stage."""
    rows = [
        (graph_tools.module_of(group.value), *(number(v / cost.tokens, 1) for v in (cost.before, cost.behind)), number(cost.lost, 1))
        for group, cost in costs
    ]  # fmt: skip
    return table(HEADER, rows).splitlines() if rows else []


def fold_gain(gm: GraphModule, node: Node, linears: list[Node]) -> bool:
    """Move gain and bias of a norm into the linears; False if it has none."""
    norm = Norm.require(node)
    if norm.gain is None and norm.bias is None:
        return False
    gain, bias = (None if t is None else graph_tools.get_tensor(gm, t).double() for t in (norm.gain, norm.bias))
    for linear in map(Linear.require, linears):
        if bias is not None:
            add_to_bias(gm, linear, linear.weight_tensor(gm).double() @ bias)
        if gain is not None:
            linear.change_rows(gm, functools.partial(torch.mul, gain))
    norm.drop_affine()
    return True


def center(gm: GraphModule, writer: Node) -> None:
    """Remove the mean over the hidden dimension from what a linear or embedding writes."""
    embedding = Embedding.of(writer)
    if embedding is not None:
        embedding.change_rows(gm, lambda w: w - w.mean(-1, keepdim=True))
        return
    linear = Linear.require(writer)
    linear.change_weight(gm, lambda w: (w.double() - w.double().mean(-2, keepdim=True)).to(w.dtype))
    bias = linear.bias_tensor(gm)
    if bias is not None:
        linear.set_bias(gm, (bias.double() - bias.double().mean(-1, keepdim=True)).to(bias.dtype), FoldNorms.name)


def to_rms_norm(node: Node) -> Node:
    """Replace a bare LayerNorm of a centred stream by RMSNorm."""
    norm = Norm.require(node)
    return rewrite(node, ops.rms_norm, (norm.x, None, norm.eps), FoldNorms.name)


def add_to_bias(gm: GraphModule, linear: Linear, value: Tensor) -> None:
    """Add to the bias of a linear, making one if it has none."""
    old = linear.bias_tensor(gm)
    total = value if old is None else old.double() + value
    linear.set_bias(gm, total.to(linear.weight_dtype(gm)), FoldNorms.name)
