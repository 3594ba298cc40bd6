"""Recipes: named options, and the list of passes that options stand for."""

from __future__ import annotations

from typing import Any

from resq_compiler.errors import ConfigError
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.settings import CompileConfig, check_names

DEFAULT_RECIPE = "resq+"

RECIPES: dict[str, dict[str, Any]] = {
    "resq": {},
    "resq+": {
        "down_proj": "energy-split",
        "allocation": "sensitivity",
        "activation_clip": "output",
        "basis_weighting": "readers",
        "weight_clip": "hessian",
        "gptq_act_order": True,
        "gptq_token_weighting": "residual",
        "gptq_damping": 0.03,
    },
    "quarot": {"basis": "hadamard", "high_fraction": 0.0},
    "quik": {"basis": "outliers", "rotation": "none", "down_proj": "outliers"},
    "gptq": {"basis": "none", "down_proj": "none", "high_fraction": 0.0},
    "rtn": {"basis": "none", "down_proj": "none", "high_fraction": 0.0, "weight_method": "rtn"},
}
"""Options of each recipe that differ from the defaults of CompileConfig."""


SHARES_STATED = {"site_fractions": "", "low_fraction": 0.0, "basis": "pca"}
"""Options that leave nothing to share out, and their usual values."""


def resolve(recipe: str | CompileConfig = DEFAULT_RECIPE, **options: Any) -> CompileConfig:
    """Options of a recipe with the user's on top. Raises ConfigError for unknown recipes, options and values."""
    if isinstance(recipe, CompileConfig):
        check_names(options)
        return CompileConfig.from_dict({**recipe.to_dict(), **options})
    if recipe not in RECIPES:
        raise ConfigError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    check_names(options)
    values = {**RECIPES[recipe], **options}
    if any(options.get(name, usual) != usual for name, usual in SHARES_STATED.items()) and "allocation" not in options:
        values["allocation"] = "equal"  # shares that a user states are not shared out again
    return CompileConfig.from_dict({**values, "recipe": recipe})


def passes_for(config: CompileConfig) -> list[Pass]:
    """The whole pipeline, in order. Passes before insert-prefix and quantize-* are exact."""
    from resq_compiler.passes import (
        AllocateBits,
        Canonicalize,
        ComputeBases,
        FindTopology,
        FoldNorms,
        FuseProjections,
        InsertPrefix,
        InsertProjections,
        NameAttention,
        PartitionLinears,
        QuantizeActivations,
        QuantizeKvCache,
        QuantizeWeights,
        ReorderChannels,
        SplitFused,
        UntieEmbeddings,
    )  # fmt: skip

    exact: list[Pass] = [Canonicalize(), NameAttention(), SplitFused(), UntieEmbeddings(), FindTopology(), FoldNorms()]
    reorder = config.down_proj in ("energy-split", "outliers")
    if config.allocates:
        exact.append(AllocateBits())
    if config.basis != "none" or reorder or config.down_proj == "block-pca":
        exact.append(ComputeBases())
    if reorder:
        exact.append(ReorderChannels())
    if config.basis != "none" or config.down_proj != "none":
        exact += [InsertProjections(), FuseProjections()]
    exact.append(PartitionLinears())
    prefix: list[Pass] = [InsertPrefix()] if config.prefix_tokens != "none" else []
    weights: list[Pass] = [QuantizeWeights()] if config.weight_bits < 16 or config.lm_head_bits else []
    activations: list[Pass] = [QuantizeActivations(), QuantizeKvCache()]
    return exact + prefix + (activations + weights if config.gptq_on_quantized_activations else weights + activations)
