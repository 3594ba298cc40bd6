"""reference: the quantized graph itself, run by PyTorch. It defines what every other backend must compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from resq_compiler.backends.base import Backend, Runner

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult


class ReferenceBackend(Backend):
    """Integer products by torch._int_mm, everything else in float32."""

    name: ClassVar[str] = "reference"

    def unavailable(self) -> str | None:
        return None

    def prepare(self, result: CompileResult) -> Runner:
        return result.graph_module
