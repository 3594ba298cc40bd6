"""A recipe of one's own: a name for settings, and for passes with a new one among them.

python examples/toy_recipe/recipe.py       # on a tiny random model; takes seconds
"""

from __future__ import annotations

from prune_small_weights import PruneSmallWeights
from resq_compiler.passes import PASSES, QuantizeWeights

import resq_compiler
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.named import RECIPES, Recipe, before
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.recipes.standard import standard_passes
from resq_compiler.tiny import tiny_model, tiny_tokens


def passes(settings: CompileConfig) -> tuple[Pass, ...]:
    """The usual passes, with the new one on the partitioned linears, before their weights are quantized."""
    return before(standard_passes(settings), QuantizeWeights, PruneSmallWeights(share=0.2))


PASSES[PruneSmallWeights.name] = PruneSmallWeights  # so that the text form knows it
RECIPES["pruned"] = Recipe({"weight_method": "rtn", "high_fraction": 1 / 16}, passes)

if __name__ == "__main__":
    options = {"calibration_samples": 4, "calibration_length": 32}
    compiled = resq_compiler.compile(tiny_model("llama"), tiny_tokens(4, 32), recipe="pruned", **options)
    print(compiled.passes)
    for stage in compiled.stages:
        print(f"{stage.label:28} {stage.rewrites:3} rewrites, relative change {stage.max_error}")
