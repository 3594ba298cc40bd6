"""All calibration batches through a graph together, one stretch of nodes at a time, with weights that change between stretches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import aside, precision
from resq_compiler.calibration.executor import (
    Schedule,
    Stretch,
    carried,
    first_tokens,
    numbers_a_token,
    shared_values,
    weights_of,
)
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.numerics.quantized import QuantizedActivation
from resq_compiler.util import devices, memory

CHEAP = {
    ops.rms_norm, ops.columns, ops.merge_heads, ops.quantize, ops.dequantize, aten.layer_norm.default,
}  # computed again rather than kept  # fmt: skip
ROOM = 1.0  # times the residual stream of all batches, so of a size that does not grow with the number of blocks
TRIM_EVERY = 8  # batches: after each one, pages that are needed again cost a third of the time of GPTQ; never, 100 MB


class Lockstep:
    """Advances several batches through a graph together: what a stretch learns about the weights comes from all of them.

    Between two stretches a batch keeps what the way to the goal needs, as long as all that were kept grew by no more than `room` bytes;
    beyond that in files, or, where there are none, not: the next stretch of those starts where this one did. What only linears read
    is kept as these round it. The results are the same to the bit. What leads past the goal to later blocks beside it (`carried`) is kept
    in any case.
    states: for each batch, the values kept so far. shared: values that no stretch changes (masks, rotary tables). directory: where values
    between two stretches lie; None: in memory. files: where those lie that are beyond `room`; None: nowhere.
    """

    def __init__(
        self, gm: GraphModule, states: list[dict[Node, Any]], shared: list[dict[Node, Any]], room: float,
        directory: Path | None = None, files: Path | None = None,
    ):  # fmt: skip
        self.gm, self.states, self.shared, self.room, self.directory = gm, states, shared, room, directory
        self.files, self.filed = files, [set[Node]() for _ in states]

    @classmethod
    def begin(
        cls, gm: GraphModule, batches: Sequence[Tensor], start: Node, work: WorkDirectory | None = None
    ) -> Lockstep:
        """All batches of token ids [b, length], run to the value `start`. work: where values lie that do not fit into memory."""
        tables = {shape: shared_values(gm, ids, start) for shape, ids in {b.shape: b for b in batches}.items()}
        states: list[dict[Node, Any]] = []
        weights: dict[Node, Tensor] = {}
        tokens, border = sum(ids.numel() for ids in batches), [start, *carried(gm, start)]
        directory = aside.directory_for(round((1 + ROOM) * 4 * tokens * numbers_a_token(border)), work)
        for ids in batches:
            given = first_tokens(gm, ids)
            schedule = Schedule(gm, border, given)
            weights = weights or weights_of(gm, schedule.order)
            env = {**given, **weights}
            schedule.run(env)
            states.append({node: aside.put_aside(aside.narrow(env[node]), directory) for node in border})
        del weights, env
        files = None if work is None or devices.current() is not None else work.path
        return cls(gm, states, [tables[b.shape] for b in batches], ROOM * sum(map(_bytes, states)), directory, files)

    def known(self, batch: int = 0) -> dict[Node, Any]:
        """The values at hand for a batch, in a new dict."""
        return {**self.shared[batch], **{node: aside.wide(value) for node, value in self.states[batch].items()}}

    def run(
        self,
        targets: Iterable[Node],
        goal: Node,
        see: Callable[[int, dict[Node, Any]], None],
        also: Sequence[Node] = (),
        last: bool = False,
    ) -> None:
        """Compute targets on the way to goal; `see` gets the number of every batch and its values.

        also: values behind the targets to be seen and not kept: they come from weights that are going to change. last: nothing is run
        behind the goal; else it is a cut.
        """
        targets, spent = list(targets), 0
        beside = [] if last else carried(self.gm, goal)
        plans: dict[frozenset[Node], Stretch] = {}
        weights: dict[Node, Tensor] = {}
        for i in range(len(self.states)):
            env = self.known(i)
            known = frozenset(env)
            if known not in plans:
                plans[known] = Stretch(self.gm, targets, known, goal, also, beside)
                made = weights_of(self.gm, [n for n in plans[known].order if n not in weights])
                weights |= {node: precision.rounded(node, weight) for node, weight in made.items()}
                del made
            plan = plans[known]
            env.update((node, weights[node]) for node in plan.order if node.op == "get_attr")
            plan.run(env)
            see(i, env)
            spent += self._keep(i, env, plan.alive, goal, self.room - spent)
            del env
            if i % TRIM_EVERY == TRIM_EVERY - 1:
                memory.trim()

    def _keep(self, batch: int, env: dict[Node, Any], alive: set[Node], goal: Node, room: float) -> int:
        """Let the state of a batch be what is alive, where there is room for it; the bytes of memory that it grew by."""
        state, shared, filed = self.states[batch], self.shared[batch], self.filed[batch]
        kept = (alive if goal in alive else not_cheap(alive, set(shared))) & env.keys() - shared.keys()
        new = {node: aside.narrow(precision.rounded(node, env[node])) for node in kept - state.keys()}
        gone = state.keys() - kept
        growth = max(_bytes(new) - _bytes({node: state[node] for node in gone - filed}), 0)
        fits = goal in kept or growth <= room
        if not fits and self.files is None:
            return 0
        place = self.directory if fits else self.files
        for node in gone:
            del state[node]
        state.update((node, aside.put_aside(value, place)) for node, value in new.items())
        self.filed[batch] = (filed & kept) | (set() if fits else new.keys())
        if place is not None:
            aside.let_go(state.values())
        return growth if fits else 0

    def advance(self, goal: Node) -> None:
        """Run to a value that all later ones come from, and forget everything before it."""
        self.run([goal], goal, lambda i, env: None)


def not_cheap(found: set[Node], given: set[Node]) -> set[Node]:
    """Without the given values and those that cheap operators make of the others."""
    kept: set[Node] = set()

    def cheap(node: Node) -> bool:
        ready = all(n.op != "call_function" or n in kept or n in given or cheap(n) for n in node.all_input_nodes)
        return ready and is_call(node, *CHEAP)

    for node in sorted(found - given):
        if not cheap(node):
            kept.add(node)
    return kept


def _bytes(found: dict[Node, Any]) -> int:
    """Memory of tensors, of several of them, and of the codes of quantized activations."""
    return sum(map(_size, found.values()))


def _size(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_size, value))
    return value.qdata.nbytes if isinstance(value, QuantizedActivation) else value.nbytes
