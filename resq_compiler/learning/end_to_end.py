"""Learning against the predictions of the float model, with the memory of one block whatever the model's depth.

Forward, only the stream between blocks is kept, and what leads past them; backward, every block runs once more and passes the gradient
of its input on. Where there is memory for it, the insides of the blocks are kept too, and run once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools
from resq_compiler.learning.learned import Learned
from resq_compiler.learning.losses import TopPredictions
from resq_compiler.learning.running import Run, shared_values
from resq_compiler.util import devices, machine, memory

TOKENS_ON_GPU = 8192  # at once: fewer leave a GPU waiting for the next operator


Border = dict[Node, Tensor]
"""The stream between two blocks, first, and the values that lead past it (`executor.carried`)."""


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
    _borders: dict[Node, list[Node]] = field(default_factory=dict)

    @property
    def logits(self) -> Node:
        """The graph's first output."""
        return graph_tools.output_args(self.gm.graph)[0]

    def shared(self, run: Run, ids: Tensor) -> dict[Node, Any]:
        """Graph inputs for windows [B, length], and masks and tables, which those of a shape have in common."""
        if ids.shape not in self._shared:
            self._shared[ids.shape] = shared_values(run, ids, self.topology.blocks[0].start)
        return {**self._shared[ids.shape], **executor.first_tokens(self.gm, ids)}

    def to_border(self, run: Run, ids: Tensor, cut: Node, given: Border) -> Border:
        """Values at the cut before or behind a block, from those at the one before it; from the token ids where these are none."""
        if cut not in self._borders:
            self._borders[cut] = [cut, *executor.carried(self.gm, cut)]
        wanted = self._borders[cut]
        found = run.to(wanted, {**self.shared(run, ids), **given})
        return {node: found[node] for node in wanted}

    @torch.no_grad()
    def stream_start(self, run: Run, ids: Tensor) -> Border:
        """Values at the start of the first block."""
        return self.to_border(run, ids, self.topology.blocks[0].start, {})

    @torch.no_grad()
    def each(self, run: Run, windows: Tensor) -> Iterator[Tensor]:
        """Logits [length, vocabulary] of one window after the other; a GPU runs the blocks for several at once."""
        at_once = 1 if devices.current() is None else max(1, TOKENS_ON_GPU // windows.shape[1])
        for ids in windows.split(at_once):
            value = self.stream_start(run, ids)
            for block in self.topology.blocks:
                value = self.to_border(run, ids, block.end, value)
            for one, last in zip(ids.split(1), value[self.topology.blocks[-1].end].split(1), strict=True):
                yield self.predictions(run, one, last)

    def predictions(self, run: Run, ids: Tensor, last: Tensor) -> Tensor:
        """Logits [length, vocabulary] of one window [1, length] from the stream behind the last block."""
        env = {**self.shared(run, ids), self.topology.blocks[-1].end: last}
        logits: Tensor = run.to([self.logits], env)[self.logits]
        return logits[0]

    def backward(self, run: Run, ids: Tensor, losses: Sequence[Callable[[Tensor], Tensor]]) -> float:
        """The mean loss of windows [B, length]; its gradients are added to the leaves that the run reads."""
        blocks, kept = self.topology.blocks, self._forward(run, ids)
        last, total = kept[-1][1][blocks[-1].end].detach().requires_grad_(), 0.0
        for i, loss_of in enumerate(losses):  # one at a time: logits are the largest values of all
            loss = loss_of(self.predictions(run, ids[i : i + 1], last[i : i + 1])) / len(losses)
            loss.backward()
            total += float(loss.detach())
        gradient = gradients_of({blocks[-1].end: last})
        for block in reversed(blocks):
            start, end = kept.pop()
            if not end[block.end].requires_grad:
                end = self.to_border(run, ids, block.end, start)
            propagate(end, gradient)
            gradient = gradients_of(start)
        propagate(self.to_border(run, ids, blocks[0].start, {}), gradient)
        return total

    def _forward(self, run: Run, ids: Tensor) -> list[tuple[Border, Border]]:
        """Values before and behind every block; with what gradients need of its inside, where a quarter of free memory holds it."""
        value, kept, blocks = self.stream_start(run, ids), [], self.topology.blocks
        if ids.shape not in self._fits:
            needed = saved_bytes(lambda: self.to_border(run, ids, blocks[0].end, leaves(value)))
            self._fits[ids.shape] = needed * len(blocks) < (free_memory() or 0) / 4
        for block in blocks:
            start = leaves(value)
            with torch.set_grad_enabled(self._fits[ids.shape]):
                value = self.to_border(run, ids, block.end, start)
            kept.append((start, value))
        return kept


def leaves(border: Border) -> Border:
    """The same values, which gradients end at."""
    return {node: value.detach().requires_grad_() for node, value in border.items()}


def gradients_of(border: Border) -> Border:
    """Of leaves that anything was made of."""
    return {node: value.grad for node, value in border.items() if value.grad is not None}


def propagate(border: Border, gradients: Border) -> None:
    """Add to the gradients of what values at a border are made of."""
    reached = [node for node in gradients if border[node].requires_grad]
    if reached:
        torch.autograd.backward([border[node] for node in reached], [gradients[node] for node in reached])


def free_memory() -> int | None:
    """Bytes that are free where it is computed."""
    device = devices.current()
    return machine.free_memory() if device is None else devices.free_memory(device)


def saved_bytes(compute: Callable[[], Any]) -> int:
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
