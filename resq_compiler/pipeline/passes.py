"""What a pass is, and what passes share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.recipes.settings import CompileConfig

log = logging.getLogger("resq_compiler")


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
