"""prune-small-weights: zero the smallest weights of every linear, before what is left is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
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
            weight = part.weight_tensor(gm)
            smallest = weight.abs() < torch.quantile(weight.abs(), self.share)
            part.set_weight(gm, weight.masked_fill(smallest, 0.0))
        ctx.lines.append(f"weights below the {self.share:g} quantile of {len(parts)} linear parts are zero")
        return len(parts)
