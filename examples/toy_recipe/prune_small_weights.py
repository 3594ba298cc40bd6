"""prune-small-weights: zero the smallest weights of every linear, before what is left is quantized."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.ir import meta
from resq_compiler.ir.views import Linear
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class PruneSmallWeights(Pass):
    """Zero a share of every linear part's weights. Options of a pass are its fields; they are checked, and are its text form."""

    name: ClassVar[str] = "prune-small-weights"
    exact: ClassVar[bool] = False  # it changes the outputs, so the pipeline does not hold it to float rounding
    requires: ClassVar[tuple[type, ...]] = (ColumnPlan,)  # in the order of passes, something before it provides this

    share: float = option(0.1, 0, 1)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        parts = [Linear.require(node) for node in gm.graph.nodes if meta.get(node, meta.LinearPart) is not None]
        for part in parts:
            part.change_weight(gm, functools.partial(zero_smallest, share=self.share))
        ctx.lines.append(f"weights below the {self.share:g} quantile of {len(parts)} linear parts are zero")
        return len(parts)


def zero_smallest(weight: Tensor, share: float) -> Tensor:
    """A weight with its smallest values set to zero."""
    return weight.masked_fill(weight.abs() < torch.quantile(weight.abs(), share), 0.0)
