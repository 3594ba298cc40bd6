"""How a list of passes runs over a graph: check, run, record, verify, compare."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import aside, executor, precision
from resq_compiler.calibration.decode import run_behind
from resq_compiler.calibration.statistics import Request, Statistics, distinct, take
from resq_compiler.errors import ConfigError, ModelError, PassError, ResqError, VerifyError
from resq_compiler.ir import graph_tools, verify
from resq_compiler.pipeline.options import options_text
from resq_compiler.pipeline.order import check_order
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.stages import Stage
from resq_compiler.util import devices, memory
from resq_compiler.util.text import first_line

log = logging.getLogger("resq_compiler")

EXACT_TOLERANCE = (
    1e-4  # relative float32 error of the logits that an exact pass may add: rounding, not a change of function
)


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
        unknown = any(
            map(graph_tools.writes_into_argument, gm.graph.nodes)
        )  # canonicalize refuses such a node, by name
        if self.reference is not None and not unknown and not bool(torch.isfinite(self.reference).all()):
            raise ModelError(
                "model: its logits on example tokens are NaN or infinite although its weights are finite: activations overflow float32; "
                "check the weights, a damaged layer has very large ones"
            )
        self._record(Stage(len(self.stages), name, "", graph_tools.copy_graph(gm.graph), 0, seconds, None))

    def run(self, gm: GraphModule, passes: Sequence[Pass]) -> None:
        """Run passes in order. A failure is a PassError that names the pass; the stage that failed is still recorded."""
        check_order(passes, self.ctx.facts.kinds())
        for i, item in enumerate(passes):
            self.ctx.progress(item.name, i, len(passes))
            self._run_one(gm, item, passes[i + 1 :])
        self.ctx.progress("done", len(passes), len(passes))

    def _run_one(self, gm: GraphModule, item: Pass, rest: Sequence[Pass]) -> None:
        start = time.perf_counter()
        index, options = len(self.stages), options_text(item)
        memory.release(gm)
        rewrites = 0
        self.ctx.lines.clear()
        try:
            with self._run_options():
                self._observe(gm, item, rest)
                rewrites = item.run(gm, self.ctx)
            if item.rewrites:
                self.ctx.facts.drop(Statistics)
            gm.graph.eliminate_dead_code()
            gm.recompile()
            verify.check_graph(gm)
            verify.propagate_shapes(gm, self.ctx.example_inputs)
            change = self._compare(gm, item, rest)
        except Exception as error:
            seconds = time.perf_counter() - start
            where = error.node if isinstance(error, ResqError) else None
            self._record(
                Stage(index, item.name, options, gm.graph, rewrites, seconds, None, item.exact, str(error), where)
            )
            if isinstance(error, ResqError):
                raise type(error)(f"pass {index} {item.name}: {error}", node=error.node) from error
            if memory.ran_out(error):
                raise PassError(f"pass {index} {item.name}: {self.ctx.out_of_memory(first_line(error))}") from error
            what = f"{type(error).__name__}: {error}; a structure that this pass does not foresee, or a bug in it"
            raise PassError(f"pass {index} {item.name}: {what}") from error
        seconds = time.perf_counter() - start
        log.info("pass %02d %s: %d rewrites, %.2f s, error %s", index, item.name, rewrites, seconds, change)
        lines = tuple(self.ctx.lines)
        self._record(
            Stage(
                index,
                item.name,
                options,
                graph_tools.copy_graph(gm.graph),
                rewrites,
                seconds,
                change,
                item.exact,
                lines=lines,
            )
        )

    @contextlib.contextmanager
    def _run_options(self) -> Iterator[None]:
        """Inside, calibration runs are as the context says."""
        ctx = self.ctx
        with (
            precision.linears_in(ctx.calibration_dtype),
            aside.kept_in(ctx.hidden_dtype),
            executor.batches_of(ctx.batch_tokens),
        ):
            yield

    def _observe(self, gm: GraphModule, item: Pass, rest: Sequence[Pass]) -> None:
        """Take the statistics that a pass asks for and, in the same run, those of later passes that see the same graph."""
        ctx, requests = self.ctx, self._asked(gm, item, rest)
        if not requests:
            return
        if ctx.basis_samples < len(ctx.windows):
            ctx.note(
                f"calibration: bases and channel order from {ctx.basis_samples} of {len(ctx.windows)} windows (basis_samples)"
            )
        if ctx.saved is not None:
            ctx.saved.fill(requests)
            ctx.note(f"calibration: statistics from {len(ctx.saved.files)} files that were taken before")
            ctx.saved = None
            ctx.facts.put(Statistics(requests))
        else:
            topology = ctx.facts.find(Topology)
            blocks = () if topology is None else topology.blocks
            ctx.facts.put(take(gm, requests, ctx.statistics_windows, ctx.work, ctx.progress, blocks))

    def _asked(self, gm: GraphModule, item: Pass, rest: Sequence[Pass]) -> list[Request]:
        """What a pass and, if that was not seen before, later passes that see the same graph ask for."""
        requests = list(item.statistics(gm, self.ctx))
        seen = self.ctx.facts.find(Statistics)
        if not requests or (seen is not None and seen.covers(requests)):
            return []
        for last, following in itertools.pairwise((item, *rest)):
            if last.rewrites:
                break
            requests += following.statistics(gm, self.ctx)
        return distinct(requests)

    def run_to_statistics(self, gm: GraphModule, passes: Sequence[Pass]) -> list[Request]:
        """Run passes up to the first that asks for statistics; what it and those after it ask for. Raises ConfigError: no pass asks."""
        check_order(passes, self.ctx.facts.kinds())
        for i, item in enumerate(passes):
            self.ctx.progress(item.name, i, len(passes))
            with self._run_options():
                requests = self._asked(gm, item, passes[i + 1 :])
            if requests:
                return requests
            self._run_one(gm, item, passes[i + 1 :])
        raise ConfigError("no pass of this recipe asks for statistics; there is nothing to take in parts")

    def _compare(self, gm: GraphModule, item: Pass, rest: Sequence[Pass]) -> float | None:
        """What the pass changed in the outputs. Weights that are promised are made for it once, behind the last of the exact passes."""
        if self.reference is None:
            return None
        if graph_tools.promised_bytes(gm) > memory.SMALL_MODEL and (not item.exact or (rest and rest[0].exact)):
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
    prefill = (old_ids, mask[:, :length], positions[:, :length].contiguous(), *empty)
    first, second = run_behind(gm, prefill, (new_ids, mask, new_positions))
    return torch.cat((first, second), 1)[devices.here(mask).bool()]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-300))
