"""How far an error at a site moves what the model predicts: the curvature of the KL divergence, by one backward pass for each window.

A small error e in a value x moves the predicted distributions by

    KL ~ 1/2 e F eᵀ        F = E[gᵀ g]        g = d log p(y) / dx,   y drawn from the model's own predictions

and one whose energy is a share h of |x|², in all directions alike, by  h · 1/2 E[|x|² |g|² / width].  Draws at different positions are
independent and their gradients have mean zero, so that one backward pass of their sum stands for all positions.

Source: the Fisher matrix as second derivative of the KL divergence (Amari, Natural Gradient Works Efficiently in Learning, 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Experts, Topology
from resq_compiler.calibration import executor, precision
from resq_compiler.calibration.aside import put_aside, wide
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import DataError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.args import source
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import memory

TOKENS = 1024  # two sets of so many agree on SmolLM2's sites within a third
LENGTH = 256  # of a window: bounds what is kept for the backward pass


@dataclass(frozen=True)
class Place:
    """A value whose rows are quantized in groups: [B, S, groups * width], or [B, groups, S, width] as keys and values are.

    Of experts, [B, S, k, width] with `indices`, which says whose rows are whose.
    """

    node: Node
    groups: int = 1
    channels: bool = False  # of the moment, the diagonal is all that is wanted
    experts: Experts | None = None

    def rows(self, x: Tensor) -> Tensor:
        """[tokens, groups, width], float64."""
        of_heads = x.dim() == 4 and not self.channels
        return (x.transpose(1, 2) if of_heads else x.unflatten(-1, (self.groups, -1))).flatten(0, -3).double()


def places(topology: Topology) -> dict[Site, list[Place]]:
    """Where the values of each site are. Attention inputs that share U_A are one site, and feed-forward inputs too."""
    found: dict[Site, list[Place]] = {}
    alone = {group.value for group in topology.online}
    for block in topology.blocks:
        a, i = block.attention, block.index
        x = source(a.readers[0])
        found.setdefault(Site("attention", i if x in alone else None), []).append(Place(x))
        for j, f in enumerate(block.feed_forwards):
            x = source((*f.gates, *f.ups)[0])
            found.setdefault(Site("mlp", i, j) if x in alone else Site("mlp"), []).append(Place(x))
        found[Site("o", i)] = [Place(source(a.o), a.num_heads)]
        found[Site("down", i)] = [
            Place(source(f.down), channels=True, experts=f.experts) for _, f in block.main_feed_forwards
        ]
        if a.keeps:
            found[Site("key", i)] = [Place(a.new_keys, a.num_kv_heads)]
            found[Site("value", i)] = [Place(a.values[0], a.value_heads)]
        for vector in a.vectors:
            found[Site(vector.site, i)] = [Place(vector.written)]
    return found


@dataclass(frozen=True)
class Felt:
    """What `measure` finds: moments of sites, and how far predictions are moved by an error as large as what an expert's down projection
    reads, [experts] by the node of that projection's input: of what every expert's own tokens add to it, in nats a token. tokens: seen."""

    moments: dict[Site, Tensor]
    experts: dict[Node, Tensor]
    tokens: int


def measure(
    gm: GraphModule, topology: Topology, windows: Tensor, seed: int, progress: Callable[[str, int, int], None],
    work: WorkDirectory | None = None,
) -> Felt:  # fmt: skip
    """Second moments of every site, a row counting by half the mean square of its gradient: float64 [groups, width, width].

    Of down projections only the diagonal, [groups, width]. Where rows lose a share h of their energy in the directions of an orthogonal
    V [width, n], and the error points anywhere, predictions move by h tr(Vᵀ M V), in nats a token. Places of one site add up.
    work: where the stream at the starts of blocks lies, which is the larger the more blocks there are.

    Raises: DataError: a gradient is not finite.
    """
    sites = places(topology)
    length = min(LENGTH, windows.shape[1])
    windows = windows[:, :length][: max(1, TOKENS // length)]
    all_places = [p for where in sites.values() for p in where]
    wanted = {p.node for p in all_places} | {p.experts.indices for p in all_places if p.experts is not None}
    total: dict[Site, Tensor] = {}
    experts: dict[Node, Tensor] = {}
    for values in backward(gm, topology, windows.split(1), wanted, generator(seed, "sensitivity"), progress, work):
        for site, where in sites.items():
            for place in where:
                if place.node in values:
                    found = weighted_moment(values[place.node], place).cpu() / windows.numel()
                    total[site] = total[site].add_(found) if site in total else found
                    if place.experts is not None:
                        shares = expert_shares(values[place.node], values[place.experts.indices], place.experts.count)
                        before = experts.setdefault(place.node, torch.zeros(place.experts.count, dtype=torch.float64))
                        before += shares.cpu() / windows.numel()
        del values
        memory.trim()
    if bad := [site for site, moment in total.items() if not bool(moment.isfinite().all())]:
        raise DataError(
            f"sensitivity of {bad[0]}: the gradient is not finite on the calibration data; check the model and the text"
        )
    return Felt(total, experts, windows.numel())


def backward(
    gm: GraphModule, topology: Topology, batches: Sequence[Tensor], wanted: set[Node], draw: torch.Generator,
    progress: Callable[[str, int, int], None], work: WorkDirectory | None = None,
) -> Iterator[dict[Node, Tensor]]:  # fmt: skip
    """Values of nodes, with gradients of the log-likelihood of tokens drawn from the model's predictions for each batch of ids [B, S].

    Block by block from the last to the first, batch by batch, those in the block: between two blocks only the stream and its gradients
    are kept, and of the stream what every block starts from; with it what leads past the block, as shared keys and values do.
    """
    blocks = topology.blocks
    runner = Lockstep.begin(gm, batches, blocks[0].start)
    starts: list[list[dict[Node, Any]]] = []
    directory = None if work is None else work.path
    with precision.linears_in("float32"):
        for block in blocks:
            progress("sensitivity", block.index, 2 * len(blocks))
            starts.append([{n: put_aside(x, directory) for n, x in state.items()} for state in runner.states])
            runner.advance(block.end)
    gradients = last_gradients(gm, runner, blocks[-1].end, draw)
    for block in reversed(blocks):
        progress("sensitivity", 2 * len(blocks) - block.index - 1, 2 * len(blocks))
        states = starts.pop()
        way = Way(gm, list(states[0]), list(gradients[0]), wanted, runner.shared[0])
        for i, state in enumerate(states):
            leaves, values = way.values({n: wide(x) for n, x in state.items()}, runner.shared[i])
            reached = [n for n in gradients[i] if values[n].requires_grad]
            torch.autograd.backward([values[n] for n in reached], [gradients[i][n] for n in reached])
            gradients[i] = {n: x.grad for n, x in leaves.items() if x.grad is not None}
            yield {node: values[node] for node in way.seen}
            del values, leaves
    progress("sensitivity", 2 * len(blocks), 2 * len(blocks))


class Way:
    """The way from values at one cut to those at another, its weights, and which of the wanted nodes are on it, but for its ends."""

    def __init__(self, gm: GraphModule, starts: list[Node], ends: list[Node], wanted: set[Node], known: Iterable[Node]):
        self.gm, given = gm, [*starts, *known]
        on_it = {*starts, *executor.Schedule(gm, ends, given).order} - set(ends)
        self.seen = [node for node in gm.graph.nodes if node in wanted and node in on_it]
        self.schedule = executor.Schedule(gm, [*ends, *self.seen], given)
        self.weights = executor.weights_of(gm, self.schedule.order)

    def values(
        self, starts: Mapping[Node, Tensor], known: Mapping[Node, Any]
    ) -> tuple[dict[Node, Tensor], dict[Node, Tensor]]:
        """Those at its start as leaves, and those of the ends and of the nodes on the way, which gradients will be kept of."""
        leaves = {node: x.detach().requires_grad_() for node, x in starts.items()}
        env: dict[Node, Any] = {**known, **self.weights, **leaves}
        with torch.enable_grad():
            for node in self.schedule.order:
                if node not in env:
                    env[node] = executor.run_node(self.gm, node, env)
                if node in self.seen and env[node].is_floating_point():
                    env[node].retain_grad()
                for dead in self.schedule.release.get(node, ()):
                    if dead not in leaves:
                        env.pop(dead, None)
        return leaves, env


def last_gradients(
    gm: GraphModule, runner: Lockstep, end: Node, draw: torch.Generator
) -> list[dict[Node, Tensor]]:  # fmt: skip
    """Gradients, at the end of the last block, of the log-likelihood of tokens drawn from the predictions for each batch."""
    logits = graph_tools.output_args(gm.graph)[0]
    way = Way(gm, [end], [logits], set(), runner.shared[0])
    gradients = []
    for state, shared in zip(runner.states, runner.shared, strict=True):
        _, values = way.values({end: wide(state[end])}, shared)
        with torch.enable_grad():
            log_p = values[logits].float().log_softmax(-1).flatten(0, -2)
            drawn = torch.multinomial(log_p.detach().exp().to(draw.device), 1, generator=draw)
            log_p.gather(-1, drawn.to(log_p.device)).sum().backward()
        gradients.append({end: found_gradient(values[end])})
        del values, log_p
    return gradients


def found_gradient(x: Tensor) -> Tensor:
    """Of a value that everything behind it depends on."""
    assert x.grad is not None
    return x.grad


def weighted_moment(x: Tensor, place: Place) -> Tensor:
    """Sum over tokens of xᵀ x |g|² / (2 width), by group; g is x.grad."""
    assert x.grad is not None
    rows, gradient = place.rows(x.detach()), place.rows(x.grad)
    weight = gradient.square().mean(-1, keepdim=True) / 2
    return (rows.square() * weight).sum(0) if place.channels else torch.einsum("tgi,tgj->gij", rows * weight, rows)


def expert_shares(x: Tensor, indices: Tensor, experts: int) -> Tensor:
    """Sum over the rows of each expert of |x|² |g|² / (2 width): float64 [experts]; x [B, S, k, width], g is x.grad, indices [..., k]."""
    assert x.grad is not None
    rows, gradient = x.detach().flatten(0, -2).double(), x.grad.flatten(0, -2).double()
    felt = rows.square().sum(-1) * gradient.square().mean(-1) / 2
    return felt.new_zeros(experts).index_add_(0, indices.flatten(), felt)
