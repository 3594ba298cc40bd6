from __future__ import annotations

import pytest
from resq_compiler.passes import ComputeBases, FindTopology, PartitionLinears, PlanColumns, QuantizeKvCache, RotateBases

import resq_compiler
from resq_compiler.analysis.topology import Topology
from resq_compiler.errors import ConfigError
from resq_compiler.pipeline.order import check_comparable, check_order
from resq_compiler.recipes.named import RECIPES, passes_for, resolve


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_in_order(recipe):
    check_order(passes_for(resolve(recipe)))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ((PlanColumns(), PartitionLinears()), "pass 1 partition-linears: needs Topology, .*: find-topology$"),
        ((FindTopology(), QuantizeKvCache()), "needs ColumnPlan, .*: allocate-bits or plan-columns or threshold-outliers$"),
        ((PlanColumns(), RotateBases()), "pass 1 rotate-bases: needs Bases, .*: compute-bases$"),
        ((ComputeBases(), FindTopology()), "pass 0 compute-bases: needs Topology"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_missing_is_named_with_what_provides_it(passes, message):
    with pytest.raises(ConfigError, match=message):
        check_order(passes)


def test_what_is_known_need_not_be_provided():
    check_order((PlanColumns(), PartitionLinears()), known={Topology})


def test_a_compile_refuses_before_any_work(tiny):
    with pytest.raises(ConfigError, match="partition-linears: needs Topology"):
        resq_compiler.compile("no such model", recipe=(PlanColumns(), PartitionLinears()))


def test_learned_weights_cannot_be_compared_with_those_of_the_exact_passes():
    """What attribution and on_float would do; learned scales and codes leave float weights alone."""
    with pytest.raises(ConfigError, match="learn-rotations: it changes float weights behind the exact passes"):
        check_comparable(passes_for(resolve("resq-trained")))
    check_comparable(passes_for(resolve("resq++")))
