"""backend="triton": run a compiled model's graph on the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from resq_compiler.backends.base import Backend
from resq_compiler.backends.triton.launch import unavailable
from torch import Tensor, nn

from resq_compiler import graph_tools
from resq_compiler.errors import BackendError

if TYPE_CHECKING:
    from resq_compiler.backends.triton.cache import PagedTensor
    from resq_compiler.backends.triton.lower import Lowered

    from resq_compiler.compiled_model import CompiledModel


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

    def prepare(self, model: CompiledModel) -> TritonRunner:
        """Lower a copy of the model's graph. Raises BackendError that lists every node it cannot take, with the reason."""
        from resq_compiler.backends.triton.lower import lower

        return TritonRunner(lower(graph_tools.snapshot(model.graph_module), self.dtype, self.allow_fallback))


class TritonRunner(nn.Module):
    """Runs a lowered graph: (input_ids, attention_mask, position_ids, *past) -> (logits, *present).

    past and present are, for a packed layer, `PagedTensor`s (an empty ordinary tensor starts a cache), else float keys and values.
    As a module it moves with `.to("cuda")`. min_tokens: room that a fresh cache gets.
    """

    def __init__(self, lowered: Lowered, min_tokens: int = 256):
        super().__init__()
        self.graph_module, self.caches, self.reasons = lowered.graph_module, lowered.caches, lowered.reasons
        self.min_tokens = min_tokens

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
