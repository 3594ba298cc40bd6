"""A graph that is run block by block on many windows: its weights are in memory one block at a time, and so a model may be larger than it.

What goes from one block to the next is kept for `ROOM` bytes of windows at a time. Operators and batches are those of a run of the whole
graph, and so are the logits, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import executor
from resq_compiler.calibration.cuts import cuts
from resq_compiler.frontend.positions import longest_text
from resq_compiler.ir import graph_tools
from resq_compiler.util import devices, memory

ROOM = 2**30
"""Bytes of hidden states that are kept between two blocks."""


@dataclass(frozen=True)
class Logits:
    """What a call gives, as models of transformers do."""

    logits: Tensor


class ByBlocks:
    """Called with batches of token ids [b, L] as a model is, after `prepare` was called with these batches: it has run all blocks but
    what makes logits of the last one's output.

    gm: any captured graph. model: what it was made of, for what is asked about it (learned positions, sizes). device: what computes.
    """

    def __init__(self, gm: GraphModule, model: Any = None, device: torch.device = devices.CPU):
        self.graph_module, self.model, self.device = gm, model, device
        self._cuts = [[node, *executor.carried(gm, node)] for node in cuts(gm)]
        self._shared: dict[torch.Size, dict[Node, Any]] = {}
        self._waiting: Iterator[dict[Node, Tensor]] = iter(())
        self._last: tuple[executor.Schedule, dict[Node, Tensor]] | None = None

    @property
    def result(self) -> Any:
        """Of a compiled model, what was made of it."""
        return getattr(self.model, "result", None)

    @property
    def longest_text(self) -> int | None:
        """Tokens of the longest text that the model can take; None where there is no end."""
        return longest_text(self.model)

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def parameters(self) -> Iterator[Tensor]:
        """Of the model."""
        yield from self.model.parameters()

    def at_once(self, length: int) -> int:
        """How many windows of a length are run together."""
        return max(1, ROOM // (length * max(map(executor.numbers_a_token, self._cuts)) * 4))

    @torch.no_grad()
    def prepare(self, batches: Sequence[Tensor]) -> None:
        """Run all of these batches through one block after the other."""
        with devices.computing_on(self.device):
            shapes = {ids.shape: ids for ids in batches}
            self._shared = {
                s: executor.shared_values(self.graph_module, ids, self._cuts[0][0]) for s, ids in shapes.items()
            }
            states: list[dict[Node, Tensor]] = [{} for _ in batches]
            for start, stop in zip([[], *self._cuts[:-1]], self._cuts, strict=True):
                schedule, weights = self._stretch(start, stop)
                for i, ids in enumerate(batches):
                    env = self._given(ids, weights) | states[i]
                    schedule.run(env)
                    states[i] = {node: env[node] for node in stop}
                del schedule, weights, env
                memory.trim()
            self._last = self._stretch(self._cuts[-1], graph_tools.output_args(self.graph_module.graph)[:1])
        self._waiting = iter(states)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Logits:
        """Logits of the next of the batches [b, L, V]."""
        assert self._last is not None, "prepare comes before"
        schedule, weights = self._last
        with devices.computing_on(self.device):
            env = self._given(ids, weights) | next(self._waiting)
            schedule.run(env)
        return Logits(env[schedule.targets[0]])

    def _given(self, ids: Tensor, weights: dict[Node, Tensor]) -> dict[Node, Any]:
        return {**self._shared[ids.shape], **executor.first_tokens(self.graph_module, ids), **weights}

    def _stretch(self, start: Sequence[Node], stop: Sequence[Node]) -> tuple[executor.Schedule, dict[Node, Tensor]]:
        """The way from one cut to the next, and its weights, on the device that computes."""
        given = [*next(iter(self._shared.values())), *start]
        schedule = executor.Schedule(self.graph_module, stop, given)
        return schedule, executor.weights_of(self.graph_module, schedule.order)
