"""backend="triton": run a compiled model's graph on the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from resq_compiler.backends.base import Backend
from resq_compiler.backends.fused.runner import FusedRunner, prepare
from resq_compiler.backends.fused.targets import find_target
from resq_compiler.backends.triton.launch import unavailable

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult


class TritonBackend(Backend):
    """Fused mixed-precision kernels for NVIDIA and AMD GPUs; integers are those of `reference`, floats to rounding.

    dtype: of what is not integer (residual stream, queries): float32, float16 or bfloat16.
    allow_fallback: leave quantized nodes no kernel takes to PyTorch, instead of raising.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, dtype: torch.dtype = torch.float32, allow_fallback: bool = False):
        self.dtype, self.allow_fallback = dtype, allow_fallback

    def unavailable(self) -> str | None:
        return unavailable()

    def prepare(self, result: CompileResult) -> FusedRunner:
        """Lower a copy of the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
        index = len(result.stages) or 1
        return prepare(result.graph_module, find_target("triton"), self.dtype, self.allow_fallback, index)
