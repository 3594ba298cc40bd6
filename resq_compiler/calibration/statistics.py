"""What passes want to see of the calibration run: sums over tokens, kept by kind and site. One run serves all who ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Block
from resq_compiler.calibration import executor, workdir
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.expert_channels import ExpertSizes
from resq_compiler.util import devices, memory, processes

FILE = "statistics"


class Statistic(Protocol):
    """A sum over tokens."""

    def update(self, x: Tensor) -> None:
        """Add the tokens of a value."""

    def state(self) -> dict[str, Tensor]:
        """All there is to it, for a file."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned."""

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what was seen of other tokens, as its `state` says."""


Kind = TypeVar("Kind", bound=Statistic)


def unchanged(x: Tensor) -> Tensor:
    """The value itself."""
    return x


@dataclass(frozen=True, eq=False)
class Request:
    """A statistic, still empty, of the values at some nodes, pooled. rows: from a value to what the statistic takes.

    routed_by: of a statistic of experts (`route`), the node that says which experts the tokens of the values went through.
    """

    site: Site
    statistic: Statistic
    nodes: tuple[Node, ...]
    rows: Callable[[Tensor], Tensor] = unchanged
    routed_by: Node | None = None

    @property
    def key(self) -> tuple[type, Site]:
        """Requests of one key are the same request."""
        return type(self.statistic), self.site

    @property
    def name(self) -> str:
        """In files."""
        return f"{type(self.statistic).__name__}.{self.site}"

    def taps(self) -> Iterator[tuple[Node, Callable[[Tensor], None]]]:
        """What it wants to see, and who sees it: the experts of tokens come before their values."""
        if self.routed_by is not None:
            assert isinstance(self.statistic, ExpertSizes), "only statistics of experts are routed"
            yield self.routed_by, self.statistic.route
        for node in self.nodes:
            yield node, self.see

    def see(self, x: Tensor) -> None:
        """Add the tokens of a value at one of the nodes."""
        self.statistic.update(self.rows(x))


class Statistics:
    """A fact: what was seen of the graph as it is. A pass that rewrites the graph ends it."""

    def __init__(self, requests: Iterable[Request] = ()):
        self._found = {request.key: request.statistic for request in requests}

    def get(self, kind: type[Kind], site: Site) -> Kind:
        """The statistic of a kind at a site. Raises PassError: nobody asked for it."""
        found = self._found.get((kind, site))
        if not isinstance(found, kind):
            raise PassError(f"{kind.__name__} of {site} was not asked for; expected it in `statistics` of this pass")
        return found

    def covers(self, requests: Iterable[Request]) -> bool:
        """Whether all of these were seen."""
        return all(request.key in self._found for request in requests)


def distinct(requests: Iterable[Request]) -> list[Request]:
    """Of requests for the same, the first."""
    found: dict[tuple[type, Site], Request] = {}
    for request in requests:
        found.setdefault(request.key, request)
    return list(found.values())


def take(
    gm: GraphModule, requests: Sequence[Request], windows: Tensor, work: WorkDirectory | None,
    progress: Callable[[str, int, int], None], blocks: Sequence[Block] = (),
) -> Statistics:  # fmt: skip
    """Run windows of token ids [n, length] through the graph for what is asked; a work directory keeps it, and gives it back.

    Processes that share the work run a part of the windows each, and all have the sums over all of them.
    blocks: of the model; all windows go through one after the other, and only its weights are made. Without, the graph is one block.
    """
    if not restored(requests, work):
        taps: dict[Node, Callable[[Tensor], None]] = {}
        for request in requests:
            for node, see in request.taps():
                taps[node] = both(taps[node], see) if node in taps else see
        part = processes.current().part(windows)
        if blocks:
            observe_blocks(gm, taps, part, blocks, work, lambda done, total: progress("calibrate", done, total))
        else:
            observe(gm, taps, part, lambda done, total: progress("calibrate", done, total))
        for request in requests:
            pool(request.statistic)
        for request in requests if devices.current() is not None else ():
            request.statistic.restore({name: t.cpu() for name, t in request.statistic.state().items()})
        keep(requests, work)
    return Statistics(requests)


def pool(statistic: Statistic) -> None:
    """Let a statistic be that over the tokens of all processes that share the work. Second moments are added in float64."""
    shared = processes.current()
    if shared.size == 1:
        return
    state = statistic.state()
    if isinstance(statistic, SecondMoment):
        statistic.restore({name: shared.sum(part) for name, part in state.items()})
        return
    first, *others = shared.every({name: part.cpu() for name, part in state.items()})
    statistic.restore({name: devices.here(part) for name, part in first.items()})
    for other in others:
        statistic.merge({name: devices.here(part) for name, part in other.items()})


def both(first: Callable[[Tensor], None], second: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Calls one after the other."""

    def call(x: Tensor) -> None:
        first(x)
        second(x)

    return call


def observe(
    gm: GraphModule, taps: Mapping[Node, Callable[[Tensor], None]], windows: Tensor, progress: Callable[[int, int], None]
) -> None:  # fmt: skip
    """Run windows of token ids [n, length] through the graph, batch by batch; taps see the values at their nodes."""
    schedule = executor.Schedule(gm, taps, graph_tools.placeholders(gm.graph), keep=())
    batches = executor.batches(windows)
    for i, ids in enumerate(batches):
        progress(i, len(batches))
        schedule.run(executor.first_tokens(gm, ids), taps)
        memory.trim()
    progress(len(batches), len(batches))


def observe_blocks(
    gm: GraphModule, taps: Mapping[Node, Callable[[Tensor], None]], windows: Tensor, blocks: Sequence[Block],
    work: WorkDirectory | None, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Run windows of token ids [n, length] through the graph, block by block; taps see the values at their nodes, in graph order.

    work: where hidden states lie that do not fit into memory.
    """
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    left = sorted(taps, key=place.__getitem__)
    runner = Lockstep.begin(gm, executor.batches(windows), blocks[0].start, work)

    def see_all(nodes: list[Node], goal: Node, last: bool = False) -> None:
        def see(batch: int, env: dict[Node, Any]) -> None:
            for node in nodes:
                taps[node](env[node])

        runner.run([*nodes, goal], goal, see, last=last)
        memory.trim()

    for i, block in enumerate(blocks):
        progress(i, len(blocks))
        here = [node for node in left if place[node] <= place[block.end]]
        left = left[len(here) :]
        if not here and not left:
            break
        see_all(here, block.end)
    if left:
        see_all(left, left[-1], last=True)
    progress(len(blocks), len(blocks))


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, spread evenly over them; all of them where there are no more."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def restored(requests: Sequence[Request], work: WorkDirectory | None) -> bool:
    """Fill in what a work directory has; False where it lacks any of it."""
    saved = workdir.shared_load(work, FILE)
    if saved is None:
        return False
    states = by_name(saved[0])
    if any(request.name not in states for request in requests):
        return False
    for request in requests:
        request.statistic.restore(states[request.name])
    return True


def keep(requests: Sequence[Request], work: WorkDirectory | None) -> None:
    """Write finished statistics into a work directory, if there is one."""
    if work is not None:
        work.save(FILE, states_of(requests))


def states_of(requests: Iterable[Request]) -> dict[str, Tensor]:
    """All there is to statistics, for a file."""
    return {f"{r.name}.{part}": t for r in requests for part, t in r.statistic.state().items()}


def by_name(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The state of each statistic, from what `states_of` gave."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        states.setdefault(owner, {})[part] = tensor
    return states
