"""backend="cpu": run a compiled model's graph on the CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from resq_compiler.backends.base import Backend
from resq_compiler.backends.cpu import library
from resq_compiler.backends.fused.runner import FusedRunner, prepare
from resq_compiler.backends.fused.targets import find_target

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult


class CpuBackend(Backend):
    """Fused mixed-precision kernels for CPUs; integers are those of `reference`, floats to rounding.

    allow_fallback: leave quantized nodes no kernel takes to PyTorch, instead of raising.
    """

    name: ClassVar[str] = "cpu"

    def __init__(self, allow_fallback: bool = False):
        self.allow_fallback = allow_fallback

    def unavailable(self) -> str | None:
        return library.unavailable()

    def prepare(self, result: CompileResult) -> FusedRunner:
        """Lower a copy of the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
        index = len(result.stages) or 1
        return prepare(result.graph_module, find_target("cpu"), torch.float32, self.allow_fallback, index)
