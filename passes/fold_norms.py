"""fold-norms: multiply the gain of every norm into the linears that read it, so that norms commute with rotations.

    linear(rms_norm(x, g), W)          -> linear(rms_norm(x, None), W diag(g))
    linear(layer_norm(x, g, b), W, c)  -> linear(layer_norm(x), W diag(g), c + W b)
    layer_norm(x), all writers centred -> rms_norm(x)

Where every norm on the stream is a LayerNorm, its mean subtraction moves into the writers: embeddings and output projections
lose their mean over the hidden dimension, after which LayerNorm and RMSNorm agree (SliceGPT, arXiv 2401.15024, section 3.2).
Models with RMSNorm are not centred: that would change them. Arithmetic in float64, rounded once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Topology
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten, is_call, rewrite
from resq_compiler.ir.views import Embedding, Linear, Norm
from resq_compiler.numerics.float64 import by_row_chunks
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory

LAYER_NORM = aten.layer_norm.default


@dataclass(frozen=True)
class FoldNorms(Pass):
    """Fold gains, biases and means of the norms that read the residual stream."""

    name: ClassVar[str] = "fold-norms"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        residual = ctx.facts.get(Topology).residual
        done = 0
        for group in residual.readers:
            if group.norm is not None and fold_gain(gm, group.norm, group.linears):
                done += 1
                memory.trim()  # the weights before
        norms = [group for group in residual.readers if is_call(group.norm, LAYER_NORM)]
        if residual.fusable and len(norms) == len(residual.readers):
            for writer in residual.writers:
                center(gm, writer)
            for group in norms:
                group.norm = group.value = to_rms_norm(group.value)
            done += len(norms)
        graph_tools.delete_unused_tensors(gm)
        return done


def fold_gain(gm: GraphModule, node: Node, linears: list[Node]) -> bool:
    """Move gain and bias of a norm into the linears; False if it has none."""
    norm = Norm.require(node)
    if norm.gain is None and norm.bias is None:
        return False
    gain, bias = (None if t is None else graph_tools.get_tensor(gm, t).double() for t in (norm.gain, norm.bias))
    for linear in map(Linear.require, linears):
        weight = linear.weight_tensor(gm)
        if bias is not None:
            add_to_bias(gm, linear, weight.double() @ bias)
        if gain is not None:
            linear.set_weight(gm, by_row_chunks(weight, functools.partial(torch.mul, gain)))
    norm.drop_affine()
    return True


def center(gm: GraphModule, writer: Node) -> None:
    """Remove the mean over the hidden dimension from what a linear or embedding writes."""
    embedding = Embedding.of(writer)
    if embedding is not None:
        table = by_row_chunks(embedding.table_tensor(gm), lambda w: w - w.mean(-1, keepdim=True))
        embedding.set_table(gm, table)
        return
    linear = Linear.require(writer)
    weight, bias = linear.weight_tensor(gm), linear.bias_tensor(gm)
    linear.set_weight(gm, (weight.double() - weight.double().mean(0)).to(weight.dtype))
    if bias is not None:
        linear.set_bias(gm, (bias.double() - bias.double().mean()).to(bias.dtype), FoldNorms.name)


def to_rms_norm(node: Node) -> Node:
    """Replace a bare LayerNorm of a centred stream by RMSNorm."""
    norm = Norm.require(node)
    return rewrite(node, ops.rms_norm, (norm.x, None, norm.eps), FoldNorms.name)


def add_to_bias(gm: GraphModule, linear: Linear, value: Tensor) -> None:
    """Add to the bias of a linear, making one if it has none."""
    old = linear.bias_tensor(gm)
    total = value if old is None else old.double() + value
    linear.set_bias(gm, total.to(linear.weight_tensor(gm).dtype), FoldNorms.name)
