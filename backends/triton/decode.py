"""Decoding with every shape fixed, so that one CUDA graph serves all tokens.

In `generate` the mask grows by a token a step. Here it is as long as the cache has room, the number of cached tokens is a tensor on
the device, and everything a step changes is changed in place by the step itself: two steps launch the same kernels on the same
addresses. A replayed graph then costs one launch a token instead of some nine a block.

    decoder = StaticDecoder(model, ids, attention_mask, new_tokens=200)     # the prompt, in one ordinary forward
    decoder.capture()                                                       # on a GPU; without it, steps run one by one
    tokens = decoder.generate()                                             # greedy; or decoder.step(token) -> logits
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from resq_compiler.backends.fused.cache import CacheTensor
from resq_compiler.backends.fused.runner import FusedRunner
from torch import Tensor

from resq_compiler.errors import BackendError

if TYPE_CHECKING:
    from resq_compiler.model.compiled_model import CompiledModel

WARM_UP = 2  # kernels are compiled and workspaces made before a capture


class StaticDecoder:
    """A model on the triton backend, after its prompt, ready to decode one token a step.

    logits: [B, vocabulary] float32 of the last token, overwritten by every step.    room: tokens that can still follow.
    """

    @torch.no_grad()
    def __init__(self, model: CompiledModel, ids: Tensor, attention_mask: Tensor | None = None, new_tokens: int = 256):
        """Run the prompt ids [B, S] (attention_mask [B, S], 0 = padding) and make room for `new_tokens` more.

        Raises: BackendError: the model is not on the triton backend, or has layers whose cache is not packed.
        """
        runner = model.runner
        if not isinstance(runner, FusedRunner) or None in runner.caches:
            raise BackendError(
                "StaticDecoder: every layer needs a packed cache; compile with kv_bits=4 or 8, then model.use_backend('triton')"
            )
        self.runner, (batch, length), device = runner, ids.shape, ids.device
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        output = model(ids, attention_mask=mask, logits_to_keep=1)
        past = [t for layer in output.past_key_values.layers for t in (layer.keys, layer.values)]
        self._caches, capacity = _with_room(past, new_tokens)
        self.room = new_tokens
        self.logits = output.logits[:, -1].clone()
        self._ids, self._positions = ids.new_zeros(batch, 1), mask.sum(-1, keepdim=True)
        self._mask = ids.new_zeros(batch, capacity)
        self._mask[:, :length] = mask
        self._start = torch.full((batch,), length, dtype=torch.int32, device=device)
        self._tables = runner.tables(batch, capacity, device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every sequence, tokens [B]; returns `logits`. Raises BackendError when the room is used up."""
        if self.room == 0:
            raise BackendError("StaticDecoder: no room left; make one with more new_tokens")
        self.room -= 1
        self._ids.copy_(tokens.view(-1, 1))
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self.logits

    def generate(self, count: int | None = None) -> Tensor:
        """The `count` (default: as many as there is room for) likeliest tokens one after the other, [B, count]."""
        tokens = []
        for _ in range(self.room if count is None else count):
            tokens.append(self.logits.argmax(-1))
            self.step(tokens[-1])
        return torch.stack(tokens, 1)

    def _advance(self) -> None:
        """One step on the buffers; nothing here depends on a value that the host would have to read."""
        self._mask.scatter_(1, self._start[:, None].long(), 1)
        inputs = (self._ids, self._mask, self._positions, *self._tables, self._start, *self._caches)
        logits = self.runner.graph_module(*inputs)[0]
        self.logits.copy_(logits[:, -1])
        self._positions.add_(1)
        self._start.add_(1)

    @torch.no_grad()
    def capture(self) -> None:
        """Record a step as a CUDA graph. Raises BackendError: the model is not on a GPU."""
        if not self.logits.is_cuda:
            raise BackendError(
                "StaticDecoder: CUDA graphs need a GPU; move model and ids with .to('cuda'), or step without capture()"
            )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        before = [t.clone() for t in self._state()]
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):  # writes slot `start`, which the first real step writes again
                self._advance()
                self._restore(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = graph

    def _state(self) -> tuple[Tensor, ...]:
        return self._mask, self._positions, self._start, self.logits

    def _restore(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self._state(), values, strict=True):
            buffer.copy_(value)


def _with_room(past: list[Tensor], new_tokens: int) -> tuple[list[Tensor], int]:
    """Packed caches that hold `past` and `new_tokens` more, and the tokens that each has room for."""
    handles = [handle.appended(new_tokens) for handle in past if isinstance(handle, CacheTensor)]
    return [handle.packed for handle in handles], handles[0].capacity
