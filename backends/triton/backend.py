"""backend="triton": run a compiled model's graph on the fused kernels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import torch
from resq_compiler.backends.base import Backend
from resq_compiler.backends.triton.launch import unavailable
from torch import Tensor, nn

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.stages import Stage

if TYPE_CHECKING:
    from resq_compiler.backends.triton.cache import PagedTensor
    from resq_compiler.backends.triton.lower import Lowered
    from resq_compiler.backends.triton.source import QuantizedSource
    from torch.fx import GraphModule

    from resq_compiler.pipeline.result import CompileResult


class TritonBackend(Backend):
    """Fused mixed-precision kernels for NVIDIA and AMD GPUs; integers are those of `reference`, floats to rounding.

    dtype: of what is not integer (residual stream, queries): float32, float16 or bfloat16.
    allow_fallback: leave quantized nodes no kernel takes to torch, instead of raising.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, dtype: torch.dtype = torch.float32, allow_fallback: bool = False):
        self.dtype, self.allow_fallback = dtype, allow_fallback

    def unavailable(self) -> str | None:
        return unavailable()

    def prepare(self, result: CompileResult) -> TritonRunner:
        """Lower a copy of the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
        from resq_compiler.backends.triton.lower import lower
        from resq_compiler.backends.triton.source import QuantizedSource

        begun, gm = time.perf_counter(), result.graph_module
        lowered = lower(graph_tools.snapshot(gm), self.dtype, self.allow_fallback)
        stage = self._stage(lowered, len(result.stages) or 1, time.perf_counter() - begun)
        return TritonRunner(lowered, QuantizedSource(gm, lowered.places), stage)

    def _stage(self, lowered: Lowered, index: int, seconds: float) -> Stage:
        """The lowered graph as a stage of a dump."""
        graph = graph_tools.copy_graph(lowered.graph_module.graph)
        kernels = sum(getattr(node.target, "namespace", "") == "resq_triton" for node in graph.nodes)
        options = f"dtype={self.dtype}".replace("torch.", "")
        return Stage(index, "lower-triton", options, graph, kernels, seconds, None, exact=False)


class TritonRunner(nn.Module):
    """Runs a lowered graph: (input_ids, attention_mask, position_ids, *past) -> (logits, *present).

    past and present are, for a packed layer, `PagedTensor`s (an empty ordinary tensor starts a cache), else float keys and values.
    As a module it moves with `.to("cuda")`: weights are its buffers, and a cache is made where the tokens are. graph_module: the
    lowered FX graph; `graph_module.compile(fullgraph=True)` puts torch.compile between the kernels. min_tokens: room that a fresh
    cache gets. stages: the lowered graph, for dumps.
    """

    def __init__(self, lowered: Lowered, source: QuantizedSource, stage: Stage, min_tokens: int = 256):
        super().__init__()
        self.graph_module, self.caches, self.reasons = lowered.graph_module, lowered.caches, lowered.reasons
        self.source, self.stages, self.min_tokens = source, [stage], min_tokens

    def quantized_graph(self) -> GraphModule:
        """The graph this was lowered from, bit for bit, with codes unpacked from the packed weights for whoever asked."""
        return self.source.restored(self.graph_module)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits float32 and the cache with the new tokens; see the class."""
        (batch, new), length = ids.shape, past[0].shape[2]
        appended = [self._appended(i, x, batch, new, ids.device) for i, x in enumerate(past)]
        capacity = self._equal_capacity(appended)
        from resq_compiler.backends.triton.cache import block_table

        table = block_table(batch, capacity, ids.device)
        start = torch.full((batch,), length, dtype=torch.int32, device=ids.device)
        packed = [getattr(x, "pages", x) for x in appended]
        logits, *floats = self.graph_module(ids, mask, positions, table, start, *packed)
        rest = iter(floats)
        present = (x if self.caches[i // 2] is not None else next(rest) for i, x in enumerate(appended))
        return (logits.float(), *present)

    def _appended(self, i: int, past: Tensor, batch: int, new: int, device: torch.device) -> Tensor:
        from resq_compiler.backends.triton.cache import PagedTensor, fresh

        layouts = self.caches[i // 2]
        if layouts is None:
            return past
        if not isinstance(past, PagedTensor):
            if past.shape[2]:
                raise BackendError(
                    f"backend triton: layer {i // 2} got a float cache of {past.shape[2]} tokens; "
                    "continue a cache with the backend that made it, or start from an empty one"
                )
            past = fresh(batch, past.shape[1], layouts[i % 2].page_bytes, max(new, self.min_tokens), device)
        return past.appended(new)

    @staticmethod
    def _equal_capacity(appended: list[Tensor]) -> int:
        """All layers grow together, so one block table serves them."""
        handles: list[PagedTensor] = [x for x in appended if hasattr(x, "pages")]
        capacities = {handle.capacity for handle in handles}
        if len(capacities) > 1:
            raise BackendError(
                f"backend triton: layers of one cache have room for {sorted(capacities)} pages; use one cache object"
            )
        return capacities.pop() if capacities else 1
