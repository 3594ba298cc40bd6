"""What a pass is, and what passes share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.overrides import TopologyOverrides
from resq_compiler.calibration import executor
from resq_compiler.calibration.shards import SavedStatistics
from resq_compiler.calibration.statistics import Request, spread
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import DataError
from resq_compiler.pipeline.facts import Facts
from resq_compiler.pipeline.options import check_options, options_text
from resq_compiler.util import processes
from resq_compiler.util.text import megabytes

log = logging.getLogger("resq_compiler")


def no_progress(what: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass
class PassContext:
    """What all passes of a compile share: its inputs, and the facts that passes found.

    example_inputs: of the graph, one tensor for each placeholder. calibration: token ids [n, length] int64, None without. overrides:
    what the user states about the model. work: where finished work of an interrupted compile is kept. saved: statistics that were taken
    before, for the first pass that asks. bos_token: what the model's texts begin with. seed: of all draws. calibration_dtype: of linears
    in calibration runs, hidden_dtype: of what is kept between two blocks there. basis_samples: how many of the windows statistics are
    taken of. notes: what a user should know. lines: what the running pass adds to its stage, such as a table.
    """

    example_inputs: tuple[Tensor, ...]
    calibration: Tensor | None = None
    overrides: TopologyOverrides | None = None
    work: WorkDirectory | None = None
    saved: SavedStatistics | None = None
    bos_token: int | None = None
    seed: int = 0
    calibration_dtype: str = "float32"
    basis_samples: int = 16
    hidden_dtype: str = "float32"
    facts: Facts = field(default_factory=Facts)
    notes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    progress: Callable[[str, int, int], None] = no_progress

    def note(self, message: str) -> None:
        """Tell the user something, once."""
        if message not in self.notes:
            self.notes.append(message)
            log.info(message)

    @property
    def windows(self) -> Tensor:
        """The calibration windows. Raises DataError: there are none."""
        if self.calibration is None:
            raise DataError("this pass looks at activations; expected calibration data, got none")
        return self.calibration

    @property
    def statistics_windows(self) -> Tensor:
        """Those of the calibration windows that statistics are taken of."""
        return spread(self.windows, self.basis_samples)

    @property
    def batch_tokens(self) -> int | None:
        """Tokens of a batch, where the work directory says that there was no memory for as many as usual."""
        return None if self.work is None else self.work.batch_tokens()

    def out_of_memory(self, reason: str) -> str:
        """What to do where memory ran out in the middle; with a work directory the next compile there has batches of half the tokens."""
        length = 0 if self.calibration is None else self.calibration.shape[1]
        half = (self.batch_tokens or executor.TOKENS_PER_BATCH) // 2
        less = "shorter calibration windows (calibration_length) need less, as does weight_method=rtn; or take a device with more memory"
        if half < length or not length:
            return f"out of memory ({reason}); {less}"
        if self.work is None:
            return (
                f"out of memory ({reason}); with a work directory the next compile there runs smaller batches; {less}"
            )
        self.work.use_batches(half)
        return f"out of memory ({reason}); finished work is kept: the same compile goes on from it with batches of {half} tokens"

    def note_processes(self) -> None:
        """Tell how many processes shared the work, if there were several."""
        shared = processes.current()
        if shared.size > 1:
            self.note(
                f"computed by {shared.size} processes, which sent {megabytes(shared.traffic.moved)} to each other; codes may differ from "
                "those of another number of processes by rounding"
            )

    @property
    def own_windows(self) -> Tensor:
        """Those of the calibration windows that this process runs, of those that share the work."""
        return processes.current().part(self.windows)


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the graph. Options are the dataclass fields; the file is the snake_case of `name`.

    exact: the same function up to rounding; quantizers are not. rewrites: False where the pass only finds facts, so that statistics
    taken before it hold after it. learns: it changes float weights behind the last exact pass. requires, provides: types of facts
    (Facts) that must be there before, and are there after.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True
    learns: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        check_options(self)

    def __str__(self) -> str:
        """The text form, such as `quantize-weights{method=rtn}`."""
        options = options_text(self)
        return f"{self.name}{{{options}}}" if options else self.name

    @property
    def needs_calibration(self) -> bool:
        """Whether the pass, with these options, looks at activations."""
        return False

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        """What the pass wants to have seen of the calibration run before it runs; found in the fact Statistics."""
        return ()

    @abstractmethod
    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        """Rewrite in place; returns the number of rewrites, 0 = unchanged."""
