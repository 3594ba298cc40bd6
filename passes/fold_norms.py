"""fold-norms: multiply the gain of every norm into the linears that read it, so that norms commute with rotations.

    linear(rms_norm(x, g), W)          -> linear(rms_norm(x, None), W diag(g))
    linear(layer_norm(x, g, b), W, c)  -> linear(layer_norm(x), W diag(g), c + W b)
    layer_norm(x), all writers centred -> rms_norm(x)

Where every norm on the stream is a LayerNorm, its mean subtraction moves into the writers: embeddings and output projections
lose their mean over the hidden dimension, after which LayerNorm and RMSNorm agree (SliceGPT, arXiv 2401.15024, section 3.2).
Models with RMSNorm are not centred: that would change them. Arithmetic in float64, rounded once.

A gain often puts down a channel that is far larger than all others, and quantized before it the others would be lost. What that costs is
estimated for every norm on a calibration window (analysis/folding.py). Above `most_lost` dB the norm keeps its gain, and the linears get
a basis of their own behind it, whose product stays an operator: one matrix of hidden size squared. Where the mean over all norms is above
`most_lost`, every norm keeps its gain: the norms below it would still lose much. Where that is so, or where U_A stays online anyway
(post-norm models), nothing is folded.

U_B and U_D ask no such question: they are orthogonal, no gain moves with them, and values are quantized in the basis that they make.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.folding import FoldingCost
from resq_compiler.analysis.topology import ReadGroup, Topology
from resq_compiler.calibration.statistics import both, observe
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.args import set_argument
from resq_compiler.ir.graph_tools import aten, is_call, rewrite
from resq_compiler.ir.promises import Around
from resq_compiler.ir.views import Embedding, Linear, Norm
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory
from resq_compiler.util.text import number, table

LAYER_NORM = aten.layer_norm.default
TOKENS = 256  # enough: what matters is in every token
HEADER = ("norm", "folding costs, dB", "gain")


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Fold gains, biases and means of the norms that read the residual stream.

    most_lost: dB that folding may cost the values that linears read. high_fraction: of columns that will have 8 bits, for the estimate.
    """

    name: ClassVar[str] = "fold-norms"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    most_lost: float = option(8.0, 0)
    high_fraction: float = option(1 / 8, 0, 0.5)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology = ctx.facts.get(Topology)
        residual = topology.residual
        if ctx.calibration is not None:
            self._choose_vectors(gm, topology, ctx)
        done = fold_vectors(gm, topology)
        if residual.fusable and ctx.calibration is not None:
            self._choose(gm, topology, ctx)
        if not residual.fusable:
            return done
        for group in residual.readers:
            fold = fold_bias if group.online else fold_gain
            if group.norm is not None and fold(gm, group.norm, group.linears):
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

    def _choose(self, gm: GraphModule, topology: Topology, ctx: PassContext) -> None:
        """Say which norms keep their gains."""
        costs = measure_costs(gm, topology.readers, self.high_fraction, ctx)
        lost = [cost.lost for _, cost in costs]
        everywhere = bool(lost) and statistics.fmean(lost) > self.most_lost
        for group, cost in costs:
            group.online = everywhere or cost.lost > self.most_lost
        ctx.lines += lines_of(costs)
        kept = [group for group, _ in costs if group.online]
        if not kept:
            return
        topology.residual.fusable = len(kept) < len(topology.readers)
        cost_text = f"{statistics.fmean(lost):.0f} dB in the mean" if everywhere else f"up to {max(lost):.0f} dB"
        ctx.note(
            f"U_A stays online before {len(kept)} of {len(topology.readers)} inputs of attention and feed-forward "
            f"({graph_tools.module_of(kept[0].value)}, ...): folding the gains of their norms would cost {cost_text}, more than "
            f"{self.most_lost:g} (fold-norms, most-lost); a matrix of {topology.hidden_size}² each"
        )

    def _choose_vectors(self, gm: GraphModule, topology: Topology, ctx: PassContext) -> None:
        """Say which norms of compressed vectors keep their gains: each for itself, as each has a basis of its own."""
        costs = measure_costs(gm, topology.vectors, self.high_fraction, ctx)
        for group, cost in costs:
            group.online = cost.lost > self.most_lost
        ctx.lines += lines_of(costs)
        kept = [(group, cost.lost) for group, cost in costs if group.online]
        if kept:
            ctx.note(
                f"the basis of {len(kept)} of {len(costs)} compressed vectors of latent attention stays online "
                f"({graph_tools.module_of(kept[0][0].norm or kept[0][0].value)}, ...): folding the gains of their norms would cost up to "
                f"{max(lost for _, lost in kept):.0f} dB, more than {self.most_lost:g} (fold-norms, most-lost)"
            )


def fold_vectors(gm: GraphModule, topology: Topology) -> int:
    """Fold the norms of the compressed vectors of latent attention into the linears that make queries, keys and values of them."""
    folded = 0
    for vector in topology.vectors:
        fold = fold_bias if vector.online else fold_gain
        if vector.norm is not None and fold(gm, vector.norm, vector.linears):
            folded += 1
    if folded:
        graph_tools.delete_unused_tensors(gm)
    return folded


def measure_costs(
    gm: GraphModule, groups: Sequence[ReadGroup], high: float, ctx: PassContext
) -> list[tuple[ReadGroup, FoldingCost]]:
    """What folding costs every group of linears, on the beginning of a calibration window."""
    costs = [(group, cost) for group in groups if (cost := FoldingCost.of(gm, group, high)) is not None]
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
        (
            graph_tools.module_of(group.norm or group.value),
            number(cost.lost, 1),
            "kept, U_A online" if group.online else "folded",
        )
        for group, cost in costs
    ]
    return table(HEADER, rows).splitlines() if rows else []


def fold_gain(gm: GraphModule, node: Node, linears: list[Node]) -> bool:
    """Move gain and bias of a norm into the linears; False if it has none."""
    norm = Norm.require(node)
    if norm.gain is None and norm.bias is None:
        return False
    gain, bias = (None if t is None else graph_tools.get_tensor(gm, t).double() for t in (norm.gain, norm.bias))
    for linear in map(Linear.require, linears):
        if bias is not None:
            add_to_bias(gm, linear, product(gm, linear, bias))
        if gain is not None:
            scaled = functools.partial(times, gain)
            linear.change_rows(gm, scaled, Around(before=scaled))
    norm.drop_affine()
    return True


def times(gain: Tensor, value: Tensor) -> Tensor:
    """The channels of a weight, or of a value, each by its gain."""
    return value * gain.to(value.device)


def fold_bias(gm: GraphModule, node: Node, linears: list[Node]) -> bool:
    """Move the bias of a norm into the linears; the gain stays. False if it has none."""
    norm = Norm.require(node)
    if norm.bias is None:
        return False
    bias = graph_tools.get_tensor(gm, norm.bias).double()
    for linear in map(Linear.require, linears):
        add_to_bias(gm, linear, product(gm, linear, bias))
    set_argument(node, "bias", None)
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
    """Replace a LayerNorm without bias, of a centred stream, by RMSNorm."""
    norm = Norm.require(node)
    return rewrite(node, ops.rms_norm, (norm.x, norm.gain, norm.eps), FoldNorms.name)


def product(gm: GraphModule, linear: Linear, x: Tensor) -> Tensor:
    """W x [N], of experts [E, N]; float64."""
    return torch.cat([weight.double() @ x for weight in graph_tools.pieces(gm, linear.weight)])


def add_to_bias(gm: GraphModule, linear: Linear, value: Tensor) -> None:
    """Add to the bias of a linear, making one if it has none."""
    old = linear.bias_tensor(gm)
    total = value if old is None else old.double() + value
    linear.set_bias(gm, total.to(linear.weight_dtype(gm)), FoldNorms.name)
