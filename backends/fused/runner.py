"""Run a model's lowered graph: what backends on fused operators share."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.cache import CacheTensor, fresh
from resq_compiler.backends.fused.lower import Lowered, lower
from resq_compiler.backends.fused.source import QuantizedSource
from resq_compiler.backends.fused.target import Target
from torch import Tensor, nn
from torch.fx import GraphModule

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.stages import Stage


class FusedRunner(nn.Module):
    """Runs a lowered graph: (input_ids, attention_mask, position_ids, *past) -> (logits, *present).

    past and present are, for a packed layer, `CacheTensor`s (an empty ordinary tensor starts a cache), else float keys and values.
    As a module it moves with `.to("cuda")`: weights are its buffers, and a cache is made where the tokens are. graph_module: the
    lowered FX graph; `graph_module.compile(fullgraph=True)` puts torch.compile between the kernels. min_tokens: room that a fresh
    cache gets. stages: the lowered graph, for dumps.
    """

    def __init__(self, lowered: Lowered, source: QuantizedSource, stage: Stage, min_tokens: int = 256):
        super().__init__()
        self.graph_module, self.caches, self.target = lowered.graph_module, lowered.caches, lowered.target
        self.reasons, self.left = lowered.reasons, lowered.left
        self.source, self.stages, self.min_tokens = source, [stage], min_tokens

    def quantized_graph(self) -> GraphModule:
        """The graph this was lowered from, bit for bit, with codes unpacked from the packed weights for whoever asked."""
        return self.source.restored(self.graph_module)

    @torch.no_grad()
    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits float32 and the cache with the new tokens; see the class."""
        (batch, new), length = ids.shape, past[0].shape[2]
        appended = [self._appended(i, x, batch, new, ids.device) for i, x in enumerate(past)]
        start = torch.full((batch,), length, dtype=torch.int32, device=ids.device)
        packed = [x.packed if isinstance(x, CacheTensor) else x for x in appended]
        tables = self.tables(batch, self._equal_capacity(appended), ids.device)
        logits, *floats = self.graph_module(ids, mask, positions, *tables, start, *packed)
        rest = iter(floats)
        present = (x if self.caches[i // 2] is not None else next(rest) for i, x in enumerate(appended))
        return (logits.float(), *present)

    def tables(self, batch: int, capacity: int, device: torch.device) -> list[Tensor]:
        """The graph's input `cache_table` where the target has one."""
        table = self.target.cache.table(batch, capacity, device)
        return [] if table is None else [table]

    def _appended(self, i: int, past: Tensor, batch: int, new: int, device: torch.device) -> Tensor:
        parts = self.caches[i // 2]
        if parts is None:
            return past
        if not isinstance(past, CacheTensor):
            if past.shape[2]:
                raise BackendError(
                    f"backend {self.target.name}: layer {i // 2} got a float cache of {past.shape[2]} tokens; "
                    "continue a cache with the backend that made it, or start from an empty one"
                )
            room = max(new, self.min_tokens)
            past = fresh(self.target.cache, batch, past.shape[1], parts[i % 2], room, device)
        return past.appended(new)

    def _equal_capacity(self, appended: Sequence[Tensor]) -> int:
        """All layers grow together, so one table serves them."""
        capacities = {x.capacity for x in appended if isinstance(x, CacheTensor)}
        if len(capacities) > 1:
            raise BackendError(
                f"backend {self.target.name}: layers of one cache have room for {sorted(capacities)} tokens; use one cache object"
            )
        return capacities.pop() if capacities else 0


def prepare(gm: GraphModule, target: Target, dtype: torch.dtype, allow_fallback: bool, index: int) -> FusedRunner:
    """Lower a copy of a quantized graph for a target. index: of the stage in a dump.

    Raises: BackendError: quantized nodes that no operator takes, each with its reason.
    """
    begun = time.perf_counter()
    lowered = lower(graph_tools.snapshot(gm), target, dtype, allow_fallback)
    stage = lowered_stage(lowered, dtype, index, time.perf_counter() - begun)
    return FusedRunner(lowered, QuantizedSource(gm, lowered.places, target.codes), stage)


def lowered_stage(lowered: Lowered, dtype: torch.dtype, index: int, seconds: float) -> Stage:
    """The lowered graph as a stage of a dump; its lines say what was left to PyTorch."""
    graph = graph_tools.copy_graph(lowered.graph_module.graph)
    count = sum(getattr(node.target, "namespace", "") == operators.NAMESPACE for node in graph.nodes)
    options = f"dtype={dtype}".replace("torch.", "")
    lines = tuple(f"left to PyTorch: {name}: {reason}" for name, reason in (lowered.reasons | lowered.left).items())
    name = f"lower-{lowered.target.name}"
    return Stage(index, name, options, graph, count, seconds, None, exact=False, lines=lines)
