"""What a backend is: it takes a compiled graph and gives back something that runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult

Runner = Callable[..., tuple[Tensor, ...]]
"""Runs the graph: (input_ids, attention_mask, position_ids, *past) -> (logits, *present), as in resq_compiler.capture.

One with `takes_logits_to_keep` takes that argument too: logits of the last so many tokens are asked for (0: of all)."""


class Backend(ABC):
    """Lowers the quantized graph of a compile. `reference` defines the results; others say how close they come."""

    name: ClassVar[str]

    @abstractmethod
    def unavailable(self) -> str | None:
        """None if the backend can run here, else what is missing and what to install. Never raises."""

    @abstractmethod
    def prepare(self, result: CompileResult) -> Runner:
        """Lower the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
