"""Learning against the predictions of the float model, with the memory of one block whatever the model's depth.

Forward, only the stream between blocks is kept; backward, every block runs once more and passes the gradient of its input on. Where there
is memory for it, the insides of the blocks are kept too, and run once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.losses import TopPredictions
from resq_compiler.learning.running import Run, shared_values
from resq_compiler.util import devices, machine, memory

TOKENS_ON_GPU = 8192  # at once: fewer leave a GPU waiting for the next operator


class Loss(Protocol):
    """From the logits [length, vocabulary] of a window and its number to what is to fall."""

    def __call__(self, logits: Tensor, index: int) -> Tensor: ...


@dataclass
class Model:
    """A graph cut at its blocks."""

    gm: GraphModule
    topology: Topology
    _shared: dict[torch.Size, dict[Node, Any]] = field(default_factory=dict)
    _fits: dict[torch.Size, bool] = field(default_factory=dict)

    @property
    def logits(self) -> Node:
        """The graph's first output."""
        return graph_tools.output_args(self.gm.graph)[0]

    def shared(self, run: Run, ids: Tensor) -> dict[Node, Any]:
        """Graph inputs for windows [B, length], and masks and tables, which those of a shape have in common."""
        if ids.shape not in self._shared:
            self._shared[ids.shape] = shared_values(run, ids, self.topology.blocks[0].start)
        return {**self._shared[ids.shape], **executor.first_tokens(self.gm, ids)}

    @torch.no_grad()
    def stream_start(self, run: Run, ids: Tensor) -> Tensor:
        """The stream at the start of the first block."""
        start = self.topology.blocks[0].start
        found: Tensor = run.to([start], self.shared(run, ids))[start]
        return found

    @torch.no_grad()
    def each(self, run: Run, windows: Tensor) -> Iterator[Tensor]:
        """Logits [length, vocabulary] of one window after the other; a GPU runs the blocks for several at once."""
        at_once = 1 if devices.current() is None else max(1, TOKENS_ON_GPU // windows.shape[1])
        for ids in windows.split(at_once):
            value = self.stream_start(run, ids)
            for block in self.topology.blocks:
                value = self._behind(run, ids, block, value)
            for one, last in zip(ids.split(1), value.split(1), strict=True):
                yield self.predictions(run, one, last)

    def predictions(self, run: Run, ids: Tensor, last: Tensor) -> Tensor:
        """Logits [length, vocabulary] of one window [1, length] from the stream behind the last block."""
        env = {**self.shared(run, ids), self.topology.blocks[-1].end: last}
        logits: Tensor = run.to([self.logits], env)[self.logits]
        return logits[0]

    def backward(self, run: Run, ids: Tensor, losses: Sequence[Callable[[Tensor], Tensor]]) -> float:
        """The mean loss of windows [B, length]; its gradients are added to the leaves that the run reads."""
        blocks, kept = self.topology.blocks, self._forward(run, ids)
        last, total = kept[-1][1].detach().requires_grad_(), 0.0
        for i, loss_of in enumerate(losses):  # one at a time: logits are the largest values of all
            loss = loss_of(self.predictions(run, ids[i : i + 1], last[i : i + 1])) / len(losses)
            loss.backward()
            total += float(loss.detach())
        gradient = last.grad
        for block in reversed(blocks):
            start, end = kept.pop()
            if not end.requires_grad:
                end = self._behind(run, ids, block, start)
            end.backward(gradient)
            gradient = start.grad
        first = run.to([blocks[0].start], self.shared(run, ids))[blocks[0].start]
        if first.requires_grad:
            first.backward(gradient)
        return total

    def _behind(self, run: Run, ids: Tensor, block: Block, start: Tensor) -> Tensor:
        """The stream behind a block."""
        found: Tensor = run.to([block.end], {**self.shared(run, ids), block.start: start})[block.end]
        return found

    def _forward(self, run: Run, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The stream before and behind every block; with what gradients need of its inside, where a quarter of free memory holds it."""
        value, kept, blocks = self.stream_start(run, ids), [], self.topology.blocks
        if ids.shape not in self._fits:
            needed = saved_bytes(lambda: self._behind(run, ids, blocks[0], value.detach().requires_grad_()))
            self._fits[ids.shape] = needed * len(blocks) < (free_memory() or 0) / 4
        for block in blocks:
            start = value.detach().requires_grad_()
            with torch.set_grad_enabled(self._fits[ids.shape]):
                value = self._behind(run, ids, block, start)
            kept.append((start, value))
        return kept


def free_memory() -> int | None:
    """Bytes that are free where it is computed."""
    device = devices.current()
    return machine.free_memory() if device is None else devices.free_memory(device)


def saved_bytes(compute: Callable[[], Tensor]) -> int:
    """How much memory a computation keeps for its gradients."""
    sizes: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = compute()  # held until the sizes are known: memory that is free again would be counted once
    del result
    return sum(sizes.values())


@dataclass
class EndToEnd:
    """Steps and judgements of what is learned. windows: [n, length], the last `held` of which are for judging alone."""

    model: Model
    learned: Learned
    windows: Tensor
    held: int
    loss: Loss

    def step(self, picked: list[int]) -> float:
        """The mean loss of some windows, with gradients in the parameters."""
        with torch.enable_grad():
            self.learned.begin()
            losses = [functools.partial(self.loss, index=i) for i in picked]
            loss = self.model.backward(self.learned.run(self.model.gm), self.windows[picked], losses)
            self.learned.end()
        memory.trim()
        return loss

    @torch.no_grad()
    def judge(self) -> float:
        """The mean loss of the windows that are held back."""
        self.learned.begin()
        run = self.learned.run(self.model.gm)
        first = len(self.windows) - self.held
        logits = self.model.each(run, self.windows[first:])
        losses = [float(self.loss(one, index=first + i)) for i, one in enumerate(logits)]
        memory.trim()
        return sum(losses) / len(losses)


@torch.no_grad()
def teach(
    gm: GraphModule, topology: Topology, windows: Tensor, k: int, progress: Callable[[int, int], None]
) -> tuple[TopPredictions, ...]:
    """The top k predictions of the float graph for windows [n, length]."""
    model, run, found = Model(gm, topology), Run(gm, quantized=False), []
    for i, logits in enumerate(model.each(run, windows)):
        progress(i, len(windows))
        found.append(TopPredictions.of(logits, k))
        memory.trim()
    progress(len(windows), len(windows))
    return tuple(found)
