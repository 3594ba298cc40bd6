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
from torch.fx import GraphModule, Node

from resq_compiler import api
from resq_compiler.frontend.capture import Captured, capture
from resq_compiler.ir import graph_tools, verify
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import tiny_model, tiny_tokens

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


@pytest.fixture(scope="session")
def tiny():
    """family -> its tiny model, the same object every time; do not change it."""
    models: dict = {}

    def make(family: str):
        if family not in models:
            models[family] = tiny_model(family)
        return models[family]

    return make


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

    `double` turns the weights to float64 once composites are named, so that exact passes can be held to 1e-9. Every state is
    made once; a test gets a copy of the graph that shares the weights, which passes rebind and never write into.
    """
    made: dict = {}

    def state(family: str, count: int, double: bool, config: CompileConfig) -> Built:
        """After the first `count` passes; those up to fold-norms do not look at options, so all options share them."""
        passes = named.passes_for(config)
        names = [p.name for p in passes]
        common = names.index("fold-norms") + 1
        double = double and count > names.index("find-topology")
        key = (family, count, double, config if count > common else None)
        if key not in made:
            made[key] = advance(family, count, double, config, passes)
        return made[key]

    def advance(family: str, count: int, double: bool, config: CompileConfig, passes: list) -> Built:
        if count == 0:
            source = captured(family)
            ctx = PassContext(config, source.example_inputs, tiny_tokens(4, 32))
            built = Built(source.graph_module, ctx, Pipeline(ctx))
            built.pipeline.start(built.gm)
            return built
        built = copy_of(state(family, count - 1, double, config))
        built.ctx.config = config
        last = passes[count - 1]
        with torch.no_grad():
            if double and last.name == "find-topology":
                to_float64(built)
            built.pipeline.run(built.gm, [last])
        return built

    def run(family: str, before: str | None = None, *, double: bool = False, recipe: str = "resq", **options) -> Built:
        config = named.resolve(recipe, **options)
        names = [p.name for p in named.passes_for(config)]
        built = copy_of(state(family, names.index(before) if before else len(names), double, config))
        built.ctx.config = config
        return built

    return run


def copy_of(built: Built) -> Built:
    """The same state with its own graph; facts that hold nodes hold those of the copy."""
    gm, table = graph_tools.snapshot(built.gm), {}
    for old, new in zip(built.gm.graph.nodes, gm.graph.nodes, strict=True):
        table[old] = new
    values = {f.name: moved(getattr(built.ctx, f.name), table) for f in dataclasses.fields(built.ctx)}
    ctx = PassContext(**values)
    pipeline = Pipeline(ctx)
    pipeline.stages, pipeline.reference = list(built.pipeline.stages), built.pipeline.reference
    return Built(gm, ctx, pipeline)


def moved(value, table: dict[Node, Node]):
    """value with nodes replaced, through lists, dicts and dataclasses."""
    if isinstance(value, Node):
        return table.get(value, value)
    if isinstance(value, list):
        return [moved(v, table) for v in value]
    if isinstance(value, dict):
        return {moved(k, table): moved(v, table) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, CompileConfig)):
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
            with mock.patch.object(api, "capture", lambda model: captured(family)):
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
