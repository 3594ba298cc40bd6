"""backend="cpu": run a compiled model on the CPU kernels, in an ONNX Runtime session or operator by operator in PyTorch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import torch
from resq_compiler.backends.base import Backend, Runner
from resq_compiler.backends.cpu import library
from resq_compiler.backends.cpu.target import CPU
from resq_compiler.backends.fused.cache import CacheTensor
from resq_compiler.backends.fused.runner import lowered_stage, prepare
from resq_compiler.backends.fused.source import QuantizedSource
from resq_compiler.backends.fused.targets import find_target
from resq_compiler.backends.onnx import export, session
from resq_compiler.backends.onnx.native import kernels_library
from resq_compiler.backends.onnx.shared_buffers import ROOM, BoundSession
from torch import Tensor, nn
from torch.fx import GraphModule

from resq_compiler.errors import BackendError
from resq_compiler.pipeline.stages import Stage

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult

ENGINES = ("onnxruntime", "torch")


class CpuBackend(Backend):
    """Fused mixed-precision kernels for CPUs; integers are those of `reference`, floats to rounding.

    engine: "onnxruntime" (profile `native` in this process) or "torch" (a call from PyTorch for each operator: slower). Both hold the
    weights once, packed.
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
        return native_runner(result)


def native_runner(result: CompileResult) -> NativeRunner:
    """A session of profile `native` on the packed weights of the lowered graph, which are not copied."""
    export.require_onnx()
    begun = time.perf_counter()
    lowered, builder = export.native_builder(result, "float32")
    model, weights = builder.model_around("resq_model", export.native_metadata(result, "float32"), export.version())
    opened = session.open_session(model.SerializeToString(), library=kernels_library())
    source = QuantizedSource(result.graph_module, lowered.places, CPU.codes)
    stage = lowered_stage(lowered, torch.float32, len(result.stages) or 1, time.perf_counter() - begun)
    return NativeRunner(BoundSession(opened, weights), lowered.graph_module, source, stage)


class NativeRunner(nn.Module):
    """Runs a session of profile `native`. past and present are `CacheTensor`s, whose bytes the kernels write in place; an empty ordinary
    tensor starts a cache. graph_module: the lowered graph, whose tensors the session reads; stages: the same, for dumps."""

    takes_logits_to_keep: ClassVar[bool] = True

    def __init__(self, bound: BoundSession, graph_module: GraphModule, source: QuantizedSource, stage: Stage):
        super().__init__()
        self.graph_module, self.source, self.stages = graph_module, source, [stage]
        self.bound = bound

    def quantized_graph(self) -> GraphModule:
        """The graph this was made from, bit for bit, with codes unpacked from the packed weights for whoever asked."""
        return self.source.restored(self.graph_module)

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor, logits_to_keep: int = 0
    ) -> tuple[Tensor, ...]:
        """Logits of the last `logits_to_keep` tokens (0: of all) and the cache with the new tokens."""
        present = [self._appended(i, tensor, ids.shape[1]) for i, tensor in enumerate(past)]
        keep = (
            logits_to_keep if bool(mask[:, -1].all()) else 0
        )  # else the last token of a row is padding, which is not kept
        tokens, seen, places = (tensor.cpu().numpy() for tensor in (ids, mask, positions))
        logits = self.bound.run(tokens, seen, places, [entry.packed for entry in present], keep)
        return torch.from_numpy(logits[:, -logits_to_keep:]), *present

    def _appended(self, index: int, past: Tensor, new: int) -> CacheTensor:
        """Room for new tokens. Raises BackendError: the cache of another backend."""
        ours = isinstance(past, CacheTensor) and past.packed.dtype == torch.uint8
        if past.shape[2] and not ours:
            raise BackendError(
                f"backend cpu: layer {index // 2} got a {past.dtype} cache of {past.shape[2]} tokens; "
                "continue a cache with the backend that made it, or start from an empty one"
            )
        if isinstance(past, CacheTensor) and ours:
            return past.appended(new)
        shape = (*past.shape[:2], 0)
        return CacheTensor.of(self.bound.buffer(index, len(past), new + ROOM), shape, CPU.cache).appended(new)
