"""Shared by the tests: tiny models, their captured graphs and compiles, each made once in a session."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run in Python here

import pytest
import torch
from resq_compiler.passes import FoldNorms, InsertPrefix
from torch.fx import GraphModule, Node

from resq_compiler import api
from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration.bases import Bases
from resq_compiler.calibration.statistics import Statistics
from resq_compiler.frontend.capture import Captured, capture
from resq_compiler.ir import graph_tools, verify
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.pipeline.facts import Facts
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import RUN_OPTIONS, CompileConfig
from resq_compiler.tiny import tiny_model, tiny_tokens
from tests.beside_models import BESIDE, beside_model
from tests.captures import SharedCaptures

with torch.device(
    "meta"
):  # torch remembers its constructors here, before a test replaces torch.empty by one that gives NaN
    torch.empty(0)

logging.getLogger(
    "torch.__trace"
).disabled = True  # pytest would format and keep thousands of its records for every export


def pytest_runtest_setup(item):
    """Tiny matrices gain nothing from threads and wait for them: measured, a compile takes 3 s with one thread and 7 to 30 s
    with two on a busy machine. Slow tests are about real models and use every core."""
    torch.set_num_threads((os.cpu_count() or 1) if item.get_closest_marker("slow") else 1)


@dataclass
class Built:
    """A graph on its way through the passes."""

    gm: GraphModule
    ctx: PassContext
    pipeline: Pipeline
    rest: tuple[Pass, ...] = ()  # the passes that come next

    @property
    def topology(self) -> Topology:
        return self.ctx.facts.get(Topology)

    @property
    def bases(self) -> Bases:
        return self.ctx.facts.get(Bases)

    @property
    def plan(self) -> ColumnPlan:
        return self.ctx.facts.get(ColumnPlan)

    @property
    def seen(self) -> Statistics:
        return self.ctx.facts.get(Statistics)


@pytest.fixture(scope="session")
def tiny():
    """family, or BESIDE -> its tiny model, the same object every time; do not change it."""
    models: dict = {}

    def make(family: str):
        if family not in models:
            models[family] = beside_model() if family == BESIDE else tiny_model(family)
        return models[family]

    return make


@pytest.fixture(scope="session", autouse=True)
def shared_captures():
    """torch.export runs once for each structure, in whatever test compiles it first; the tests of capture itself call it directly."""
    with mock.patch.object(api, "capture_promised", SharedCaptures()):
        yield


@pytest.fixture(scope="session")
def captured(tiny):
    """family -> a fresh graph of it; torch.export, which takes most of a tiny compile, runs once for each family."""
    made: dict[str, Captured] = {}

    def fresh(family: str) -> Captured:
        if family not in made:
            made[family] = capture(tiny(family))
        first = made[family]
        return Captured(graph_tools.snapshot(first.graph_module), first.cache, first.example_inputs)

    return fresh


@pytest.fixture(scope="session")
def build(captured):
    """(family, before=pass name, double=True, **options) -> Built: the passes of these options up to, not with, `before`.

    `passes` in place of options: a tuple of passes. `double` turns the weights to float64 once composites are named, so that exact passes
    can be held to 1e-9. Every state is made once for equal passes; a test gets a copy of the graph that shares the weights, which passes
    rebind and never write into.
    """
    made: dict = {}

    def state(family: str, double: bool, config: CompileConfig, passes: tuple[Pass, ...]) -> Built:
        """After all of these passes; those up to fold-norms look at nothing but the graph, so all settings share them."""
        names = [p.name for p in passes]
        double = double and "find-topology" in names
        run_options = [getattr(config, name) for name in RUN_OPTIONS] if "plan-columns" in names else []
        key = (family, double, passes, *run_options)
        if key not in made:
            made[key] = advance(family, double, config, passes)
        return made[key]

    def advance(family: str, double: bool, config: CompileConfig, passes: tuple[Pass, ...]) -> Built:
        if not passes:
            source = captured(family)
            ctx = PassContext(source.example_inputs, tiny_tokens(4, 32))
            built = Built(source.graph_module, ctx, Pipeline(ctx))
            built.pipeline.start(built.gm)
            return built
        built = with_options(copy_of(state(family, double, config, passes[:-1])), config)
        with torch.no_grad():
            if double and passes[-1].name == "find-topology":
                to_float64(built)
            built.pipeline.run(built.gm, passes[-1:])
        return built

    def run(
        family: str, before: str | None = None, *, double: bool = False, recipe: str = "resq", passes: tuple[Pass, ...] = (), **options
    ) -> Built:  # fmt: skip
        config = named.resolve(recipe, **options)
        passes = passes or named.passes_for(config)
        names = [p.name for p in passes]
        count = names.index(before) if before else len(names)
        built = with_options(copy_of(state(family, double, config, passes[:count])), config)
        built.rest = passes[count:]
        return built

    return run


def with_prefix(recipe: str = "resq", **options) -> tuple[Pass, ...]:
    """The passes of these options and a prefix; a random model has no tokens that are 64 times as large as others."""
    passes = named.passes_for(named.resolve(recipe, prefix_tokens="auto", **options))
    return tuple(InsertPrefix(massive=1.5) if isinstance(item, InsertPrefix) else item for item in passes)


def with_layer_norms() -> tuple[Pass, ...]:
    """Round to nearest: norms as the model has them, gains and biases are not folded, LayerNorms stay LayerNorms."""
    return named.passes_for(named.resolve("rtn"))


def with_online_bases(recipe: str = "resq", **options) -> tuple[Pass, ...]:
    """The passes of these options; folding costs a tiny random model 0.2 to 0.5 dB, so that some of its norms keep their gains."""
    passes = named.passes_for(named.resolve(recipe, **options))
    return tuple(FoldNorms(most_lost=0.35) if isinstance(item, FoldNorms) else item for item in passes)


def with_options(built: Built, config: CompileConfig) -> Built:
    """The same, with the options of a run that are no pass's own."""
    built.ctx.seed, built.ctx.basis_samples = config.seed, config.basis_samples
    built.ctx.calibration_dtype = config.calibration_dtype
    return built


def copy_of(built: Built) -> Built:
    """The same state with its own graph; facts that hold nodes hold those of the copy."""
    gm, table = graph_tools.snapshot(built.gm), {}
    for old, new in zip(built.gm.graph.nodes, gm.graph.nodes, strict=True):
        table[old] = new
    facts = Facts(moved(fact, table) for fact in built.ctx.facts)
    ctx = dataclasses.replace(built.ctx, facts=facts, notes=list(built.ctx.notes), lines=list(built.ctx.lines))
    pipeline = Pipeline(ctx)
    pipeline.stages, pipeline.reference = list(built.pipeline.stages), built.pipeline.reference
    return Built(gm, ctx, pipeline)


def moved(value, table: dict[Node, Node]):
    """value with nodes replaced, through lists, tuples, dicts and dataclasses."""
    if isinstance(value, Node):
        return table.get(value, value)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, table) for v in value)
    if isinstance(value, dict):
        return {moved(k, table): moved(v, table) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: moved(getattr(value, f.name), table) for f in dataclasses.fields(value)})
    return value


def to_float64(built: Built) -> None:
    for node in built.gm.graph.find_nodes(op="get_attr"):
        value = graph_tools.get_tensor(built.gm, node)
        if value.is_floating_point():
            graph_tools.set_tensor(built.gm, str(node.target), value.double())
    built.ctx.example_inputs = tuple(t.double() if t.is_floating_point() else t for t in built.ctx.example_inputs)
    built.pipeline.start(built.gm, "float64")
    verify.propagate_shapes(built.gm, built.ctx.example_inputs)


@pytest.fixture(scope="session")
def compile_tiny(tiny, captured):
    """(family, **options) -> (CompiledModel, the float graph after the exact passes), made once for each set of options."""
    made: dict = {}

    def run(family: str, **options) -> tuple[CompiledModel, GraphModule]:
        key = (family, *sorted(options.items()))
        if key not in made:
            graphs: list[GraphModule] = []
            defaults = {
                "recipe": "resq",
                "calibration_samples": 4,
                "calibration_length": 32,
                "calibration_dtype": "float32",
            }
            with mock.patch.object(api, "capture_promised", lambda skeleton, weights: captured(family)):
                compiled = api.compile(
                    tiny(family), tiny_tokens(4, 32), on_float=graphs.append, **{**defaults, **options}
                )
            made[key] = compiled, graphs[0]
        return made[key]

    return run


@pytest.fixture(scope="session")
def compiled(compile_tiny):
    """(family, **options) -> CompiledModel, made once for each set of options; do not change it."""
    return lambda family, **options: compile_tiny(family, **options)[0]
