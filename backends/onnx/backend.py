"""backend="onnx": a CompiledModel whose forward, generate and evaluation run in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from resq_compiler.backends.base import Backend, Runner
from resq_compiler.backends.onnx import export, session
from torch import Tensor

from resq_compiler.errors import BackendError

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult


class OnnxBackend(Backend):
    """The `ort` profile in this process: exact integer products, float32 embedding, CPU."""

    name: ClassVar[str] = "onnx"

    def unavailable(self) -> str | None:
        try:
            export.require_onnx()
            export.require_runtime("1.23", "backend onnx")
        except BackendError as error:
            return str(error)
        return None

    def prepare(self, result: CompileResult) -> Runner:
        built = export.draft_model(result, "ort", embedding="float32")
        if built.nbytes <= export.EXTERNAL_DATA_ABOVE:
            return OnnxRunner(session.open_session(built.whole().SerializeToString()))
        with tempfile.TemporaryDirectory(prefix="resq-onnx-", ignore_cleanup_errors=True) as directory:
            export.save_model(built, Path(directory))
            return OnnxRunner(session.open_session(Path(directory) / export.MODEL_FILE))


class OnnxRunner:
    """Runs a session on torch tensors in graph order; outputs share the memory that ONNX Runtime wrote."""

    def __init__(self, opened: Any):
        self.session = opened
        self.inputs = [i.name for i in opened.get_inputs()]
        self.outputs = [o.name for o in opened.get_outputs()]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run([tensor.cpu() if tensor.is_floating_point() else tensor.cpu().long() for tensor in tensors])

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs for tensors of the types that the session takes."""
        values = {name: session.to_ort(tensor) for name, tensor in zip(self.inputs, tensors, strict=True)}
        with session.denormals_of(self.session):
            results = self.session.run_with_ort_values(self.outputs, values)
        return tuple(session.to_torch(value) for value in results)
