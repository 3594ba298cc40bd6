"""Putting transforms into the graph of a compile: their exact values become a fact that fusing reads."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools
from resq_compiler.ir.transforms import Placing, Transforms
from resq_compiler.ir.views import Linear
from resq_compiler.numerics.transforms import Transform
from resq_compiler.pipeline.passes import Pass, PassContext


def place(
    gm: GraphModule, ctx: PassContext, transform: Transform, name: str, like: Node, made_by: type[Pass]
) -> Placing:
    """A transform to put in; its tensors get the type of a linear's weight."""
    known = ctx.facts.find(Transforms) or Transforms()
    ctx.facts.put(known)
    weight = graph_tools.held(gm, Linear.require(like).weight)
    return Placing(gm, transform, name, weight, made_by.name, known)
