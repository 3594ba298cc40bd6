"""What a pass is, and how a list of passes runs over a graph: check, run, record, verify, compare."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from resq_compiler import memory, products, verify
from resq_compiler.config import CompileConfig
from resq_compiler.errors import ModelError, PassError, ResqError, VerifyError

log = logging.getLogger("resq_compiler")

EXACT_TOLERANCE = (
    1e-4  # relative float32 error of the logits that an exact pass may add: rounding, not a change of function
)


@dataclass
class PassContext:
    """What passes share: options, example inputs, calibration windows, and the facts that earlier passes found."""

    config: CompileConfig
    example_inputs: tuple[Tensor, ...]
    calibration: Tensor | None = None  # token ids [n, length], int64
    overrides: Any = None  # resq_compiler.topology_overrides.TopologyOverrides, what the user states about the model
    topology: Any = None  # resq_compiler.topology.Topology, set by the topology analysis
    moments: Any = None  # resq_compiler.calibration.Moments, set by compute-bases where a recipe needs them
    bases: Any = None  # resq_compiler.calibration.Bases, set by compute-bases
    work: Any = None  # resq_compiler.resume.WorkDirectory, where finished work of an interrupted compile is kept
    bos_token: int | None = None  # what the model's texts begin with
    notes: list[str] = field(
        default_factory=list
    )  # what a user should know: approximations, projections that stay online
    lines: list[str] = field(default_factory=list)  # text that the running pass adds to its stage, such as a table
    progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def note(self, message: str) -> None:
        """Tell the user something, once."""
        if message not in self.notes:
            self.notes.append(message)
            log.info(message)


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the graph. Options are the dataclass fields; the file is the snake_case of `name`."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True  # the same function up to rounding; quantizers are not

    @abstractmethod
    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrite in place; returns the number of rewrites, 0 = unchanged."""


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, without weights, and what the pass did. `max_error` is relative; None where not compared."""

    index: int
    name: str
    options: str
    graph: Graph
    rewrites: int
    seconds: float
    max_error: float | None
    exact: bool = True
    failed: str | None = None  # the message of the error
    failed_node: str | None = None  # the node it names
    lines: tuple[str, ...] = ()  # what the pass has to say, such as the table of a search

    @property
    def label(self) -> str:
        """File-name form, such as 03-fold-norms."""
        return f"{self.index:02d}-{self.name}"


class Pipeline:
    """Runs passes in order and keeps a `Stage` for each. `on_stage` sees every stage, also that of a failing pass."""

    def __init__(self, ctx: PassContext, on_stage: Callable[[Stage], None] = lambda stage: None):
        self.ctx = ctx
        self.stages: list[Stage] = []
        self.on_stage = on_stage
        self.reference: Tensor | None = None

    def start(self, gm: GraphModule, name: str = "capture", seconds: float = 0.0) -> None:
        """Record the graph that passes start from and its outputs on the example inputs."""
        verify.propagate_shapes(gm, self.ctx.example_inputs)
        self.reference = self._outputs(gm)
        if self.reference is not None and not bool(torch.isfinite(self.reference).all()):
            raise ModelError(
                "model: its logits on example tokens are NaN or infinite although its weights are finite: activations overflow float32; "
                "check the weights, a damaged layer has very large ones"
            )
        self._record(Stage(len(self.stages), name, "", copy_graph(gm.graph), 0, seconds, None))

    def run(self, gm: GraphModule, passes: Sequence[Pass]) -> None:
        """Run passes in order. A failure is a PassError that names the pass; the stage that failed is still recorded."""
        for i, item in enumerate(passes):
            self.ctx.progress(item.name, i, len(passes))
            self._run_one(gm, item)
        self.ctx.progress("done", len(passes), len(passes))

    def _run_one(self, gm: GraphModule, item: Pass) -> None:
        start = time.perf_counter()
        index, options = len(self.stages), option_text(item)
        memory.release(gm)
        rewrites = 0
        self.ctx.lines.clear()
        try:
            with products.linears_in(self.ctx.config.calibration_dtype):
                rewrites = item.run(gm, self.ctx)
            gm.graph.eliminate_dead_code()
            gm.recompile()
            verify.check_graph(gm)
            verify.propagate_shapes(gm, self.ctx.example_inputs)
            error = self._compare(gm, item)
        except Exception as error:
            seconds = time.perf_counter() - start
            where = failing_node(gm.graph, str(error))  # the graph itself: a malformed one cannot be copied
            self._record(
                Stage(index, item.name, options, gm.graph, rewrites, seconds, None, item.exact, str(error), where)
            )
            if isinstance(error, ResqError):
                raise type(error)(f"pass {index} {item.name}: {error}") from error
            what = f"{type(error).__name__}: {error}; a structure that this pass does not foresee, or a bug in it"
            raise PassError(f"pass {index} {item.name}: {what}") from error
        seconds = time.perf_counter() - start
        log.info("pass %02d %s: %d rewrites, %.2f s, error %s", index, item.name, rewrites, seconds, error)
        lines = tuple(self.ctx.lines)
        self._record(Stage(index, item.name, options, copy_graph(gm.graph), rewrites, seconds, error, item.exact, lines=lines))

    def _compare(self, gm: GraphModule, item: Pass) -> float | None:
        if self.reference is None:
            return None
        logits = self._outputs(gm)
        assert logits is not None
        error = relative_error(logits, self.reference)
        if item.exact and not error <= EXACT_TOLERANCE:
            raise VerifyError(
                f"the outputs changed by {error:.2e} relative to those before the pass; an exact pass may change them by "
                f"{EXACT_TOLERANCE:g}: this is a bug in the pass, or the model is not finite on its example inputs"
            )
        self.reference = logits
        return error

    def _outputs(self, gm: GraphModule) -> Tensor | None:
        if any(t.is_meta for t in gm.state_dict().values()):
            return None
        outputs = prefill_and_decode(gm, self.ctx.example_inputs)
        return None if outputs.is_meta else outputs

    def _record(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.on_stage(stage)


@torch.no_grad()
def prefill_and_decode(gm: GraphModule, example_inputs: tuple[Tensor, ...]) -> Tensor:
    """Logits of a left-padded prefill and of a decode that reads the cache it wrote: [tokens that are not padding, vocabulary].

    The cache is not compared: passes may change its basis.
    """
    new_ids, mask, new_positions, *past = example_inputs
    length = past[0].shape[2]
    old_ids = new_ids.repeat(1, -(-length // new_ids.shape[1]))[:, :length]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    empty = [t[:, :, :0] for t in past]
    prefill, *cache = gm(old_ids, mask[:, :length], positions[:, :length].contiguous(), *empty)
    decode, *_ = gm(new_ids, mask, new_positions, *cache)
    return torch.cat((prefill, decode), 1)[mask.bool()]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-300))


def failing_node(graph: Graph, message: str) -> str | None:
    """The node that an error message names, as all of ours do: `node NAME`."""
    names = {node.name for node in graph.nodes}
    return next((name for name in re.findall(r"\bnode (\w+)", message) if name in names), None)


def option_text(item: Pass) -> str:
    """The options of a pass that differ from their defaults, as `name=value` pairs."""
    values = ((f, getattr(item, f.name)) for f in dataclasses.fields(item))
    return ", ".join(f"{f.name}={value!r}" for f, value in values if value != f.default)


def copy_graph(graph: Graph) -> Graph:
    """A copy of the nodes and their metadata that holds no weights."""
    copy = Graph()
    table: dict[Node, Node] = {}
    output = copy.graph_copy(graph, table, return_output_node=True)
    assert output is not None
    copy.output(output[0])
    return copy
