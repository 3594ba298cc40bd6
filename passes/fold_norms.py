"""fold-norms: multiply the gain of every norm into the linears that read it, so that norms commute with rotations.

    linear(rms_norm(x, g), W)          -> linear(rms_norm(x, None), W diag(g))
    linear(layer_norm(x, g, b), W, c)  -> linear(layer_norm(x), W diag(g), c + W b)
    layer_norm(x), all writers centred -> rms_norm(x)

Where every norm on the stream is a LayerNorm, its mean subtraction moves into the writers: embeddings and output projections
lose their mean over the hidden dimension, after which LayerNorm and RMSNorm agree (SliceGPT, arXiv 2401.15024, section 3.2).
Models with RMSNorm are not centred: that would change them. Arithmetic in float64, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Topology
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten, emit, is_call
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
        norms = [g.norm for g in residual.readers]
        if residual.fusable and all(is_call(n, LAYER_NORM) for n in norms):
            for writer in residual.writers:
                center(gm, writer)
            for group in residual.readers:
                group.norm = group.value = to_rms_norm(gm, group.norm)
            done += len(norms)
        graph_tools.delete_unused_tensors(gm)
        return done


def norm_weights(norm: Node) -> tuple[Node | None, Node | None]:
    """(gain, bias) of a norm."""
    if is_call(norm, ops.rms_norm):
        return norm.args[1], None
    padded = (*norm.args, None, None)
    return padded[2], padded[3]


def fold_gain(gm: GraphModule, norm: Node, linears: list[Node]) -> bool:
    """Move gain and bias into the linears; False if there are none."""
    gain_node, bias_node = norm_weights(norm)
    if gain_node is None and bias_node is None:
        return False
    gain = graph_tools.get_tensor(gm, gain_node).double() if gain_node is not None else None
    bias = graph_tools.get_tensor(gm, bias_node).double() if bias_node is not None else None
    for linear in linears:
        weight = linear_weight(gm, linear)
        if bias is not None:
            add_to_bias(gm, linear, weight.double() @ bias)
        if gain is not None:
            replace_weight(gm, linear, by_row_chunks(weight, lambda w: w * gain))
    if is_call(norm, ops.rms_norm):
        norm.update_arg(1, None)
    else:
        norm.args = (norm.args[0], norm.args[1], None, None, *norm.args[4:])
    return True


def center(gm: GraphModule, writer: Node) -> None:
    """Remove the mean over the hidden dimension from what a linear or embedding writes."""
    if is_call(writer, aten.embedding.default):
        node = writer.args[0]
        graph_tools.set_tensor(
            gm,
            str(node.target),
            by_row_chunks(graph_tools.get_tensor(gm, node), lambda w: w - w.mean(-1, keepdim=True)),
        )
        return
    weight = linear_weight(gm, writer)
    replace_weight(gm, writer, (weight.double() - weight.double().mean(0)).to(weight.dtype))
    if len(writer.args) > 2 and writer.args[2] is not None:
        bias = graph_tools.get_tensor(gm, writer.args[2])
        graph_tools.set_tensor(gm, str(writer.args[2].target), (bias.double() - bias.double().mean()).to(bias.dtype))


def to_rms_norm(gm: GraphModule, norm: Node) -> Node:
    """Replace a bare LayerNorm of a centred stream by RMSNorm."""
    eps = norm.args[4] if len(norm.args) > 4 else 1e-5
    with gm.graph.inserting_after(norm):
        new = emit(gm.graph, ops.rms_norm, (norm.args[0], None, eps), norm, FoldNorms.name)
    new.meta["val"] = norm.meta["val"]
    norm.replace_all_uses_with(new)
    gm.graph.erase_node(norm)
    return new


def linear_weight(gm: GraphModule, linear: Node) -> Tensor:
    """Weight [out, in] of a linear node."""
    return graph_tools.get_tensor(gm, linear.args[1])


def replace_weight(gm: GraphModule, linear: Node, value: Tensor) -> None:
    """Bind a new weight under the same name."""
    graph_tools.set_tensor(gm, str(linear.args[1].target), value)


def add_to_bias(gm: GraphModule, linear: Node, value: Tensor) -> None:
    """Add to the bias of a linear, making one if it has none."""
    old = linear.args[2] if len(linear.args) > 2 else None
    dtype = linear_weight(gm, linear).dtype
    if old is not None:
        total = graph_tools.get_tensor(gm, old).double() + value
        graph_tools.set_tensor(gm, str(old.target), total.to(dtype))
        return
    base = str(linear.args[1].target).removesuffix(".weight")
    linear.args = (*linear.args[:2], graph_tools.add_tensor(gm, f"{base}.bias", value.to(dtype), FoldNorms.name))


def by_row_chunks(weight: Tensor, change: object, rows: int = 4096) -> Tensor:
    """Apply a float64 function to a weight a few thousand rows at a time: vocabularies are large."""
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], rows):
        result[start : start + rows] = change(weight[start : start + rows].double())
    return result
