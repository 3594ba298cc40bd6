"""Add recipes: a name for options, and a pass of your own in the pipeline.

python examples/add_a_recipe.py            # on a tiny random model; takes seconds
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from resq_compiler.passes import QuantizeWeights
from torch.fx import GraphModule

import resq_compiler
from resq_compiler.ir import graph_tools, meta
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.recipes.named import RECIPES, Recipe, before
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.recipes.standard import standard_passes
from resq_compiler.tiny import tiny_model, tiny_tokens


@dataclass(frozen=True)
class PruneSmallWeights(Pass):
    """Zero the smallest weights of every linear. Options of a pass are its fields."""

    name: ClassVar[str] = "prune-small-weights"
    exact: ClassVar[bool] = False  # it changes the outputs, so the pipeline does not hold it to float rounding
    share: float = 0.1

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        parts = [n for n in gm.graph.nodes if meta.get(n, meta.LinearPart) is not None]
        for node in parts:
            weight = graph_tools.get_tensor(gm, node.args[1])
            smallest = weight.abs() < torch.quantile(weight.abs(), self.share)
            graph_tools.set_tensor(gm, str(node.args[1].target), weight.masked_fill(smallest, 0.0))
        return len(parts)


def passes(settings: CompileConfig) -> tuple[Pass, ...]:
    """The usual passes, with one before the weights are quantized, on the partitioned linears."""
    return before(standard_passes(settings), QuantizeWeights, PruneSmallWeights())


# A recipe is a name for settings, and for the passes they stand for: three precisions, 8 bits for 1/16 of the columns, 2 bits for 1/16.
THREE_PARTS = {"high_fraction": 1 / 16, "low_fraction": 1 / 16, "weight_method": "rtn"}
RECIPES["three-parts"] = Recipe(THREE_PARTS, passes)

if __name__ == "__main__":
    compiled = resq_compiler.compile(
        tiny_model("llama"), tiny_tokens(4, 32), recipe="three-parts", calibration_samples=4, calibration_length=32
    )
    for stage in compiled.stages:
        print(f"{stage.label:28} {stage.rewrites:3} rewrites, relative change {stage.max_error}")
