"""backend="cpu": run a compiled model on the CPU kernels, in an ONNX Runtime session or operator by operator in PyTorch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from resq_compiler.backends.base import Backend, Runner
from resq_compiler.backends.cpu import library
from resq_compiler.backends.fused.runner import prepare
from resq_compiler.backends.fused.targets import find_target
from resq_compiler.backends.onnx import export, session
from resq_compiler.backends.onnx.backend import OnnxRunner
from resq_compiler.backends.onnx.native import kernels_library
from torch import Tensor

from resq_compiler.errors import BackendError

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult

ENGINES = ("onnxruntime", "torch")


class CpuBackend(Backend):
    """Fused mixed-precision kernels for CPUs; integers are those of `reference`, floats to rounding.

    engine: "onnxruntime" (profile `native` in this process) or "torch" (a call from PyTorch for each operator: slower, the lowered
    graph can be looked at, and the weights are held once).
    allow_fallback: with "torch", leave quantized nodes no kernel takes to PyTorch instead of raising.
    """

    name: ClassVar[str] = "cpu"

    def __init__(self, engine: str = "onnxruntime", allow_fallback: bool = False):
        if engine not in ENGINES:
            raise BackendError(f"backend cpu: engine expected one of {', '.join(ENGINES)}; got {engine!r}")
        if allow_fallback and engine != "torch":
            raise BackendError("backend cpu: allow_fallback needs engine='torch'; ONNX Runtime cannot call PyTorch")
        self.engine, self.allow_fallback = engine, allow_fallback

    def unavailable(self) -> str | None:
        if self.engine == "torch":
            return library.unavailable()
        try:
            export.require_onnx()
            export.require_runtime("1.23", "backend cpu")
        except BackendError as error:
            return str(error)
        return library.unavailable()

    def prepare(self, result: CompileResult) -> Runner:
        """Lower a copy of the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
        if self.engine == "torch":
            target, index = find_target("cpu"), len(result.stages) or 1
            return prepare(result.graph_module, target, torch.float32, self.allow_fallback, index)
        built = export.build_model(result, "native", embedding="float32")
        if built.ByteSize() <= export.EXTERNAL_DATA_ABOVE:
            return NativeRunner(session.open_session(built.SerializeToString(), library=kernels_library()))
        with tempfile.TemporaryDirectory(prefix="resq-native-", ignore_cleanup_errors=True) as directory:
            export.save_model(built, Path(directory))
            return NativeRunner(session.open_session(Path(directory) / export.MODEL_FILE, library=kernels_library()))


class NativeRunner(OnnxRunner):
    """Runs a session of profile `native`; past and present are uint8 [B, G, T, bytes of a packed row]."""

    def __init__(self, opened: Any):
        super().__init__(opened)
        self.rows = [entry.shape[3] for entry in opened.get_inputs()[3:]]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens = [tensor.cpu().long() for tensor in tensors[:3]]
        past = [self._packed(i, tensor) for i, tensor in enumerate(tensors[3:])]
        return self.run([*tokens, *past])

    def _packed(self, index: int, past: Tensor) -> Tensor:
        """A packed cache as it is, and an empty one in its shape. Raises BackendError: the cache of another backend."""
        if past.dtype == torch.uint8 and past.shape[3] == self.rows[index]:
            return past.cpu()
        if past.shape[2]:
            raise BackendError(
                f"backend cpu: layer {index // 2} got a {past.dtype} cache of {past.shape[2]} tokens; "
                "continue a cache with the backend that made it, or start from an empty one"
            )
        return torch.zeros(*past.shape[:3], self.rows[index], dtype=torch.uint8)
