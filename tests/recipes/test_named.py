from __future__ import annotations

import pytest

from resq_compiler.errors import ConfigError
from resq_compiler.recipes.named import RECIPES, passes_for, resolve
from resq_compiler.recipes.settings import CompileConfig


def names(*args, **options) -> list[str]:
    return [p.name for p in passes_for(resolve(*args, **options))]


def test_options_go_on_top_of_the_recipe():
    config = resolve("quik", kv_bits=8)
    assert (config.recipe, config.basis, config.kv_bits) == ("quik", "outliers", 8)
    again = resolve(config, rotation="orthogonal")
    assert (again.basis, again.kv_bits, again.rotation) == ("outliers", 8, "orthogonal")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_and_names_itself(recipe):
    assert resolve(recipe).recipe == recipe and CompileConfig.from_dict(resolve(recipe).to_dict()) == resolve(recipe)


def test_unknown_recipes_and_options():
    with pytest.raises(
        ConfigError, match=r"recipe: expected one of resq, resq\+, quarot, quik, gptq, rtn, .*; got 'gguf'"
    ):
        resolve("gguf")
    with pytest.raises(ConfigError, match="did you mean basis"):
        resolve("resq", bases="pca")
    with pytest.raises(ConfigError, match="option basis: expected"):
        resolve(resolve("resq"), basis="x")


def test_pipelines():
    naming = ["canonicalize", "name-attention", "split-fused", "untie-embeddings", "find-topology"]
    keep, fold = [*naming, "plan-columns"], [*naming, "fold-norms", "plan-columns"]  # gains stay where no basis rotates
    project = ["insert-projections", "fuse-projections"]
    last = ["quantize-weights", "quantize-activations", "quantize-kv-cache"]
    assert names("resq") == [*fold, "compute-bases", "rotate-bases", *project, "partition-linears", *last]
    assert names("quik") == [*keep, "compute-bases", "reorder-channels", *project, "partition-linears", *last]
    bases = ["compute-bases", "allocate-bits", "rotate-bases", "reorder-channels"]
    assert names("resq+") == [*fold, *bases, *project, "partition-linears", *last]
    assert names("quarot") == [*fold, "compute-bases", *project, "partition-linears", *last]
    assert names("rtn") == names("gptq") == [*keep, "partition-linears", *last]
    assert names("resq", weight_bits=16)[-2:] == last[1:] and "quantize-weights" not in names("resq", weight_bits=16)
    assert names("resq", weight_bits=16, lm_head_bits=8).count("quantize-weights") == 1
    assert names("resq", gptq_on_quantized_activations=True)[-3:] == [*last[1:], last[0]]


def test_groups_give_way_to_what_has_none():
    """Beside 8 bits nothing is cut, and static scales are for all of a part: the recipe's groups are left out there, the user's are not."""
    assert resolve("resq+").activation_group_size == resolve("resq+", activation_bits=5).activation_group_size == 64
    for options in ({"activation_bits": 8}, {"activation_bits": 16}, {"activation_scales": "static"}):
        assert resolve("resq+", **options).activation_group_size is None
    assert resolve("resq+", activation_bits=8, activation_group_size=32).activation_group_size == 32
    with pytest.raises(ConfigError, match="option activation_group_size: expected activation_scales=dynamic"):
        resolve("resq+", activation_scales="static", activation_group_size=64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_passes_come_first(recipe):
    exact = [p.exact for p in passes_for(resolve(recipe))]
    assert exact == sorted(exact, reverse=True)
