"""Recipes: a name for settings, and the tuple of passes that settings stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resq_compiler.errors import ConfigError
from resq_compiler.passes import ComputeBases, PlanColumns
from resq_compiler.pipeline.passes import Pass
from resq_compiler.recipes.settings import GIVEN, RUN_OPTIONS, CompileConfig, check_names
from resq_compiler.recipes.standard import standard_passes
from resq_compiler.recipes.text import parse

DEFAULT_RECIPE = "resq+"


@dataclass(frozen=True)
class Recipe:
    """settings: options of CompileConfig that differ from its defaults. passes: what settings stand for."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    passes: Callable[[CompileConfig], tuple[Pass, ...]] = standard_passes


PLAIN: dict[str, Any] = {"basis": "none", "down_proj": "none", "high_fraction": 0.0}
"""No change of basis, no parts."""

EIGHT: dict[str, Any] = {"weight_bits": 8, "activation_bits": 8, "kv_bits": 8, "o_proj_granularity": "token"}

PLUS: dict[str, Any] = {
    "down_proj": "energy-split",
    "allocation": "sensitivity",
    "activation_clip": "output",
    "basis_weighting": "readers",
    "weight_clip": "hessian",
    "gptq_act_order": True,
    "gptq_token_weighting": "residual",
    "gptq_damping": 0.03,
}
"""What resq+ adds to resq."""

RECIPES: dict[str, Recipe] = {
    "resq": Recipe(),
    "resq+": Recipe({**PLUS, "activation_group_size": 64}),
    "quarot": Recipe({"basis": "hadamard", "high_fraction": 0.0}),
    "quik": Recipe({"basis": "outliers", "rotation": "none", "down_proj": "outliers"}),
    "gptq": Recipe(PLAIN),
    "rtn": Recipe({**PLAIN, "weight_method": "rtn"}),
    "smoothquant": Recipe({**PLAIN, **EIGHT, "weight_method": "rtn", "weight_clip": "max", "smooth_alpha": 0.5}),
    "awq": Recipe(
        {
            **PLAIN,
            "activation_bits": 16,
            "kv_bits": 16,
            "weight_group_size": 128,
            "weight_method": "rtn",
            "weight_clip": "output",
            "scale_search": True,
        }
    ),
    "llm-int8": Recipe(
        {
            **EIGHT,
            "kv_bits": 16,
            "high_bits": 16,
            "high_fraction": 0.0,
            "basis": "outliers",
            "rotation": "none",
            "down_proj": "outliers",
            "outlier_threshold": 6.0,
            "weight_method": "rtn",
            "weight_clip": "max",
        }
    ),
    "duquant": Recipe(
        {
            **PLAIN,
            "smooth_alpha": 0.6,
            "spread_outliers": True,
            "activation_clip": 0.9,
            "weight_method": "rtn",
            "o_proj_granularity": "token",
        }
    ),
    "omniquant": Recipe(
        {
            **PLAIN,
            "weight_method": "rtn",
            "gptq_on_quantized_activations": True,
            "learn_blocks": True,
            "o_proj_granularity": "token",
        }
    ),
    "spinquant": Recipe(
        {
            "basis": "hadamard",
            "high_fraction": 0.0,
            "gptq_on_quantized_activations": True,
            "learn_rotations": "cross-entropy",
        }
    ),
    "ostquant": Recipe(
        {
            "basis": "weights",
            "high_fraction": 0.0,
            "gptq_on_quantized_activations": True,
            "learn_rotations": "divergence",
            "learn_pairs": True,
        }
    ),
    "resq-trained": Recipe({"gptq_on_quantized_activations": True, "learn_rotations": "cross-entropy"}),
    "resq++": Recipe(
        {
            **PLUS,
            "allocation": "widths",
            "key_basis": "head",
            "activation_group_size": 32,
            "gptq_on_quantized_activations": True,
            "learn_scales": True,
            "learn_codes": True,
            "learning_steps": 200,
        }
    ),
    "resq-cpu": Recipe(
        {
            **PLUS,
            "activation_bits": 8,
            "kv_bits": 8,
            "gptq_on_quantized_activations": True,
            "learn_scales": True,
            "learn_codes": True,
        }
    ),
    "prefixquant": Recipe(
        {
            "basis": "hadamard",
            "high_fraction": 0.0,
            "prefix_tokens": "auto",
            "activation_scales": "static",
            "weight_method": "rtn",
            "o_proj_granularity": "token",
        }
    ),
}
"""A recipe of one's own is added here: RECIPES["mine"] = Recipe({"weight_bits": 8})."""

SHARES_STATED = {"site_fractions": "", "expert_bits": "", "low_fraction": 0.0, "basis": "pca"}
"""Options that leave nothing to share out, and their usual values."""

WITHOUT_GROUPS = {"activation_scales": ("static",), "activation_bits": (8, 16)}
"""Options beside which activations have no groups of columns, unless the user asks for these, and gets the error or the note."""


@dataclass(frozen=True)
class Chosen:
    """What to do: passes in order, and the settings they come from. Of a tuple of passes, what its column plan says of them."""

    settings: CompileConfig
    passes: tuple[Pass, ...]


def choose(recipe: str | CompileConfig | Chosen | Sequence[Pass] = DEFAULT_RECIPE, **options: Any) -> Chosen:
    """Passes of a recipe's name, of settings, or as given, with the user's options on top.

    Raises ConfigError for unknown recipes, options and values, and for options beside a tuple of passes that are fields of these.
    """
    if isinstance(recipe, Chosen):
        given = recipe.settings.recipe == GIVEN
        options = {**(run_options(recipe.settings) if given else {}), **options}
        recipe = recipe.passes if given else recipe.settings
    if isinstance(recipe, (str, CompileConfig)):
        settings = resolve(recipe, **options)
        return Chosen(settings, passes_for(settings))
    passes = tuple(recipe)
    check_names(options)
    if fields := [name for name in options if name not in RUN_OPTIONS]:
        raise ConfigError(
            f"option {fields[0]}: a tuple of passes has it as a field; set it there. Beside passes are expected: "
            f"{', '.join(RUN_OPTIONS)}"
        )
    return Chosen(described(passes, options), passes)


def resolve(recipe: str | CompileConfig = DEFAULT_RECIPE, **options: Any) -> CompileConfig:
    """Settings of a recipe with the user's on top. Raises ConfigError for unknown recipes, options and values."""
    check_names(options)
    if isinstance(recipe, CompileConfig):
        return CompileConfig.from_dict({**recipe.to_dict(), **options})
    values = {**named(recipe).settings, **options}
    if any(options.get(name, usual) != usual for name, usual in SHARES_STATED.items()) and "allocation" not in options:
        values["allocation"] = "equal"  # shares that a user states are not shared out again
    if (
        any(options.get(name) in given for name, given in WITHOUT_GROUPS.items())
        and "activation_group_size" not in options
    ):
        values["activation_group_size"] = None
    return CompileConfig.from_dict({**values, "recipe": recipe})


def named(recipe: str) -> Recipe:
    """The recipe of a name. Raises ConfigError: there is none."""
    if recipe not in RECIPES:
        raise ConfigError(f"recipe: expected one of {', '.join(RECIPES)}; got {recipe!r}")
    return RECIPES[recipe]


def passes_for(settings: CompileConfig) -> tuple[Pass, ...]:
    """The passes that settings stand for, in order."""
    return named(settings.recipe).passes(settings)


def recorded(settings: CompileConfig, text: str) -> tuple[Pass, ...]:
    """The passes of a compile, from what a saved model says of it. Raises ConfigError: a pass or recipe that is not known here."""
    return parse(text) if settings.recipe == GIVEN else passes_for(settings)


def run_options(settings: CompileConfig) -> dict[str, Any]:
    """Options that are no pass's own."""
    return {name: getattr(settings, name) for name in RUN_OPTIONS}


def described(passes: tuple[Pass, ...], options: Mapping[str, Any]) -> CompileConfig:
    """Settings for a tuple of passes: bits, shares and basis as its passes say; the others are defaults that mean nothing here."""
    values: dict[str, Any] = {"recipe": GIVEN, "basis": "none"}
    for item in passes:
        if isinstance(item, PlanColumns):
            same = (
                "weight_bits",
                "activation_bits",
                "kv_bits",
                "high_bits",
                "high_fraction",
                "low_bits",
                "low_fraction",
            )
            values |= {
                name: getattr(item, name) for name in (*same, "rank_multiple", "lm_head_bits", "weight_group_size")
            }
            values["site_fractions"], values["expert_bits"] = str(item.sites), str(item.experts)
        elif isinstance(item, ComputeBases):
            values["basis"] = "hadamard" if item.basis == "orthogonal" else item.basis
    return CompileConfig(**values, **options)


def settled(settings: CompileConfig, sites: str, experts: str = "") -> CompileConfig:
    """Settings that give the same model without sharing out bits again: with the shares, and bits of experts, that were found."""
    if not settings.allocates:
        return settings
    return dataclasses.replace(
        settings, allocation="equal", average_bits=None, model_megabytes=None, site_fractions=sites, expert_bits=experts,
    )  # fmt: skip


def before(passes: Sequence[Pass], kind: type[Pass], *added: Pass) -> tuple[Pass, ...]:
    """The passes with others put before the first of a kind. Raises ConfigError: there is none of that kind."""
    at = next((i for i, item in enumerate(passes) if isinstance(item, kind)), None)
    if at is None:
        raise ConfigError(f"recipe: expected a pass {kind.name} to put {', '.join(p.name for p in added)} before")
    return (*passes[:at], *added, *passes[at:])
