"""Run parts of a graph node by node, releasing values after their last use.

Calibration needs values inside the graph, one stretch of nodes at a time, with weights that change between stretches; a compiled
forward function gives neither.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration import precision
from resq_compiler.ir import graph_tools, promises, values
from resq_compiler.util import devices

TOKENS_PER_BATCH = 1024  # large enough for matrix products to run at full speed, small against the weights
_fewer: int | None = None


class Schedule:
    """The nodes needed to compute `targets` from `given` values, in order, and when each value can be released.

    keep: values that are left at the end (default: the targets).
    """

    def __init__(
        self, gm: GraphModule, targets: Iterable[Node], given: Iterable[Node], keep: Iterable[Node] | None = None
    ):
        self.gm = gm
        self.targets = list(targets)
        self.given = set(given)
        needed = self._needed()
        self.order = with_tensors(n for n in gm.graph.nodes if n in needed)
        self.release = last_uses(self.order, keep=set(self.targets if keep is None else keep))

    def _needed(self) -> set[Node]:
        seen: set[Node] = set()
        pending = [n for n in self.targets if n not in self.given]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(n for n in node.all_input_nodes if n not in self.given)
        return seen

    def run(
        self, env: dict[Node, Any], taps: Mapping[Node, Callable[[Any], None]] | None = None,
        instead: Mapping[object, Callable] | None = None,
    ) -> None:  # fmt: skip
        """Compute the targets into env; taps see values as they are computed. instead: operators to call in the place of others."""
        run_nodes(self.gm, self.order, self.release, env, taps or {}, instead)


def with_tensors(nodes: Iterable[Node]) -> list[Node]:
    """Nodes in their order, but tensors of the model, and sizes of inputs, right before what reads them first: they are made there."""
    order: dict[Node, None] = {}
    for node in nodes:
        if not _waits(node):
            order |= {source: None for source in node.all_input_nodes if _waits(source)}
            order[node] = None
    return list(order)


def _waits(node: Node) -> bool:
    is_size = graph_tools.is_call(node, graph_tools.aten.sym_size.int)
    return node.op == "get_attr" or (is_size and node.all_input_nodes[0].op == "placeholder")


class Stretch:
    """A schedule on the way to `goal`: computes `targets` and knows which values (`alive`) the rest of the way needs.

    beside: values that are wanted at the goal, too.
    """

    def __init__(
        self, gm: GraphModule, targets: Iterable[Node], given: Iterable[Node], goal: Node, also: Iterable[Node] = (),
        beside: Iterable[Node] = (),
    ):  # fmt: skip
        goals = {goal, *beside}
        whole = Schedule(gm, goals, given)
        done = set(Schedule(gm, targets, given).order)
        now = Schedule(gm, [*targets, *also], given)
        self.gm, self.order = gm, now.order
        known = done | set(given)
        needed = {source for node in whole.order if node not in done for source in node.all_input_nodes}
        self.alive = {node for node in needed | goals if node in known and node.op != "get_attr"}
        self.release = last_uses(now.order, keep=set(now.targets) | self.alive)

    def run(self, env: dict[Node, Any]) -> None:
        """Compute the targets into env, keeping what is still needed."""
        run_nodes(self.gm, self.order, self.release, env, {})


def weights_of(gm: GraphModule, order: Iterable[Node]) -> dict[Node, Tensor]:
    """The tensors of the model among some nodes, made and on the device that computes now."""
    with promises.keeping():
        return {node: run_node(gm, node, {}) for node in order if node.op == "get_attr"}


def last_uses(order: Sequence[Node], keep: set[Node]) -> dict[Node, list[Node]]:
    """For each node, the values that nothing later in `order` uses."""
    last: dict[Node, Node] = {}
    for node in order:
        for source in node.all_input_nodes:
            last[source] = node
    release: dict[Node, list[Node]] = {}
    for source, node in last.items():
        if source not in keep and source.op not in ("placeholder",):
            release.setdefault(node, []).append(source)
    return release


@torch.no_grad()
def run_nodes(
    gm: GraphModule, order: Sequence[Node], release: dict[Node, list[Node]], env: dict[Node, Any],
    taps: Mapping[Node, Callable[[Any], None]], instead: Mapping[object, Callable] | None = None,
) -> None:  # fmt: skip
    """Run nodes in order on env, dropping released values. instead: operators to call in the place of others."""
    substitutes = {**precision.substitutes(), **(instead or {})}
    for node in order:
        if node not in env:
            env[node] = run_node(gm, node, env, substitutes)
        if node in taps:
            taps[node](env[node])
        for dead in release.get(node, ()):
            env.pop(dead, None)


def run_node(
    gm: GraphModule, node: Node, env: Mapping[Node, Any], substitutes: Mapping[object, Callable] | None = None
) -> Any:
    """Run one node on the device that computes now: tensors of the model come there, and new ones are made there."""
    return graph_tools.run_node(gm, node, env, substitutes, devices.current())


def evaluate(gm: GraphModule, node: Node, env: dict[Node, Any]) -> Any:
    """Value of a node given values of some of its ancestors, on the device that computes now."""
    return graph_tools.evaluate(gm, node, env, devices.current())


def first_tokens(gm: GraphModule, ids: Tensor) -> dict[Node, Any]:
    """Graph inputs for sequences that start from an empty cache: ids [B, S], no padding. On the device that computes now."""
    inputs = graph_tools.placeholders(gm.graph)
    batch, length = ids.shape
    ids = devices.here(ids)
    given: list[Tensor] = [ids, torch.ones_like(ids), torch.arange(length, device=ids.device).expand(batch, length)]
    for node in inputs[3:]:
        _, heads, _, width = values.shape(node)
        given.append(torch.zeros(batch, heads, 0, width, dtype=values.dtype(node), device=ids.device))
    return dict(zip(inputs, given, strict=True))


def batches(windows: Tensor) -> list[Tensor]:
    """Split windows [n, length] into batches of about TOKENS_PER_BATCH tokens, or of fewer inside `batches_of`."""
    return list(windows.split(max(1, (_fewer or TOKENS_PER_BATCH) // windows.shape[1])))


@contextlib.contextmanager
def batches_of(tokens: int | None) -> Iterator[None]:
    """Inside, batches have so many tokens; None: as many as usual."""
    global _fewer
    before, _fewer = _fewer, tokens
    try:
        yield
    finally:
        _fewer = before


def shared_values(gm: GraphModule, ids: Tensor, start: Node) -> dict[Node, Any]:
    """Inputs, and values that blocks need beside the residual stream (masks, rotary tables), for sequences from an empty cache.

    None that depends on the tokens themselves: these are `carried`.
    """
    env = first_tokens(gm, ids)
    hidden = depends_on(gm, [start, *lookups(gm)])
    inside = depends_on(gm, [start]) - {start}
    wanted = [
        n for n in gm.graph.nodes if n not in hidden and n.op == "call_function" and any(u in inside for u in n.users)
    ]
    Schedule(gm, wanted, env).run(env)
    return {n: v for n, v in env.items() if n.op == "placeholder" or n in wanted}


def lookups(gm: GraphModule) -> list[Node]:
    """The embeddings of token ids."""
    ids = graph_tools.placeholders(gm.graph)[0]
    found = gm.graph.find_nodes(op="call_function", target=graph_tools.aten.embedding.default)
    return [n for n in found if ids in graph_tools.ancestors(list(n.all_input_nodes[1:]))]


def carried(gm: GraphModule, cut: Node) -> list[Node]:
    """Values that lead past a cut of the residual stream: made of the tokens before it or beside it, and read by what depends on it.

    Embeddings of each layer, and keys and values that later blocks read.
    """
    behind = depends_on(gm, [cut])
    made = depends_on(gm, lookups(gm)) - behind
    readers = {n for n in behind if n.op != "output"} - {cut}
    return [n for n in gm.graph.nodes if n in made and not readers.isdisjoint(n.users)]


def numbers_a_token(nodes: Sequence[Node]) -> int:
    """Of values of tokens together, the first of which is [B, S, d]."""
    tokens = math.prod(values.shape(nodes[0])[:2])
    return sum(math.prod(values.shape(node)) for node in nodes) // tokens


def depends_on(gm: GraphModule, sources: Iterable[Node]) -> set[Node]:
    """The sources and every node that depends on one of them."""
    found = set(sources)
    for node in gm.graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found
