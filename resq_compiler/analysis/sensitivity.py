"""How far an error at a site moves what the model predicts: the curvature of the KL divergence, by one backward pass for each window.

A small error e in a value x moves the predicted distributions by

    KL ~ 1/2 e F eᵀ        F = E[gᵀ g]        g = d log p(y) / dx,   y drawn from the model's own predictions

and one whose energy is a share h of |x|², in all directions alike, by  h · 1/2 E[|x|² |g|² / width].  Draws at different positions are
independent and their gradients have mean zero, so that one backward pass of their sum stands for all positions.

Source: the Fisher matrix as second derivative of the KL divergence (Amari, Natural Gradient Works Efficiently in Learning, 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import executor
from resq_compiler.errors import DataError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.args import source
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import memory

TOKENS = 1024  # two sets of so many agree on SmolLM2's sites within a third
LENGTH = 256  # of a window: bounds what is kept for the backward pass


@dataclass(frozen=True)
class Place:
    """A value whose rows are quantized in groups: [B, S, groups * width], or [B, groups, S, width] as keys and values are."""

    node: Node
    groups: int = 1
    channels: bool = False  # of the moment, the diagonal is all that is wanted

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
        x = source(a.q)
        found.setdefault(Site("attention", i if x in alone else None), []).append(Place(x))
        for j, f in enumerate(block.feed_forwards):
            x = source((*f.gates, *f.ups)[0])
            found.setdefault(Site("mlp", i, j) if x in alone else Site("mlp"), []).append(Place(x))
        found[Site("o", i)] = [Place(source(a.o), a.num_heads)]
        found[Site("down", i)] = [Place(source(f.down), channels=True) for _, f in block.main_feed_forwards]
        found[Site("key", i)] = [Place(a.new_keys, a.num_kv_heads)]
        found[Site("value", i)] = [Place(a.new_values, a.num_kv_heads)]
    return found


def measure(
    gm: GraphModule, topology: Topology, windows: Tensor, seed: int, progress: Callable[[str, int, int], None]
) -> dict[Site, Tensor]:  # fmt: skip
    """Second moments of every site, a row counting by half the mean square of its gradient: float64 [groups, width, width].

    Of down projections only the diagonal, [groups, width]. Where rows lose a share h of their energy in the directions of an orthogonal
    V [width, n], and the error points anywhere, predictions move by h tr(Vᵀ M V), in nats a token. Places of one site add up.

    Raises: DataError: a gradient is not finite.
    """
    sites = places(topology)
    length = min(LENGTH, windows.shape[1])
    windows = windows[:, :length][: max(1, TOKENS // length)]
    draw = generator(seed, "sensitivity")
    total: dict[Site, Tensor] = {}
    for i, ids in enumerate(windows.split(1)):
        progress("sensitivity", i, len(windows))
        values = backward(gm, topology, ids, [p.node for where in sites.values() for p in where], draw)
        for site, where in sites.items():
            for place in where:
                found = weighted_moment(values[place.node], place).cpu() / windows.numel()
                total[site] = total[site] + found if site in total else found
        memory.trim()
    progress("sensitivity", len(windows), len(windows))
    if bad := [site for site, moment in total.items() if not bool(moment.isfinite().all())]:
        raise DataError(
            f"sensitivity of {bad[0]}: the gradient is not finite on the calibration data; check the model and the text"
        )
    return total


def backward(
    gm: GraphModule, topology: Topology, ids: Tensor, nodes: Iterable[Node], draw: torch.Generator
) -> dict[Node, Tensor]:
    """Values of nodes, with gradients of the log-likelihood of tokens drawn from the model's predictions for ids [B, S]."""
    start, wanted = topology.blocks[0].start, set(nodes)
    env = {**executor.shared_values(gm, ids, start), **executor.first_tokens(gm, ids)}
    executor.Schedule(gm, [start], env).run(env)
    logits = graph_tools.output_args(gm.graph)[0]
    schedule = executor.Schedule(gm, [logits, *wanted], env)
    with torch.enable_grad():
        env[start] = env[start].detach().requires_grad_()
        for node in schedule.order:
            value = executor.run_node(gm, node, env)
            env[node] = value.detach() if node.op == "get_attr" else value
            if node in wanted:
                env[node].retain_grad()
            for dead in schedule.release.get(node, ()):
                env.pop(dead, None)
        log_p = env[logits].float().log_softmax(-1).flatten(0, -2)
        drawn = torch.multinomial(log_p.detach().exp().to(draw.device), 1, generator=draw)
        log_p.gather(-1, drawn.to(log_p.device)).sum().backward()
    return {n: env[n] for n in wanted}


def weighted_moment(x: Tensor, place: Place) -> Tensor:
    """Sum over tokens of xᵀ x |g|² / (2 width), by group; g is x.grad."""
    assert x.grad is not None
    rows, gradient = place.rows(x.detach()), place.rows(x.grad)
    weight = gradient.square().mean(-1, keepdim=True) / 2
    return (rows.square() * weight).sum(0) if place.channels else torch.einsum("tgi,tgj->gij", rows * weight, rows)
