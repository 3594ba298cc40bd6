"""The statistics that passes ask for, by site of a topology."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.fx import Node

from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import FeedForward, ReadGroup, Topology
from resq_compiler.calibration import precision
from resq_compiler.calibration.experts import on_every_expert
from resq_compiler.calibration.statistics import Request
from resq_compiler.ir import values
from resq_compiler.ir.args import source
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.channels import Energy, LoudTokens, Peak
from resq_compiler.numerics.expert_channels import ExpertEnergy, ExpertPeak

BLOCK = 64
"""Channels of a down projection's input that share a basis with block PCA: their largest common divisor with the width."""

RESIDUAL = Site("residual")
READER = "reader"
"""Name of the sites of values before which U_A stays online."""


def residual_moments(topology: Topology, own: bool = True) -> list[Request]:
    """SecondMoment of the inputs of attention and feed-forward, for each basis that they have: [d, d]."""
    return [
        Request(site, SecondMoment(stream_name(site), topology.hidden_size, dtype=precision.dtype()), values_of(groups))
        for site, groups in residual_groups(topology, own).items()
    ]


def residual_peaks(topology: Topology, own: bool = True) -> list[Request]:
    """Peak of the channels of the same values: [d]."""
    return [
        Request(site, Peak(stream_name(site)), values_of(groups))
        for site, groups in residual_groups(topology, own).items()
    ]  # fmt: skip


def residual_groups(topology: Topology, own: bool = True) -> dict[Site, list[ReadGroup]]:
    """The readers of the residual stream that share a basis: all that U_A fuses into; where it stays online each alone, or all of
    these (own False).
    """
    online = topology.online
    fused = [group for group in topology.readers if group not in online]
    alone = {Site(READER, index=i): [group] for i, group in enumerate(topology.readers) if group in online}
    if online and not own:
        alone = {Site(READER): online}
    return {RESIDUAL: fused, **alone} if fused else alone


def values_of(groups: list[ReadGroup]) -> tuple[Node, ...]:
    """What they read."""
    return tuple(group.value for group in groups)


def stream_name(site: Site) -> str:
    """In messages."""
    return "residual stream" if site == RESIDUAL else f"residual stream, reader {site.index}"


def head_moments(topology: Topology) -> list[Request]:
    """SecondMoment of values, keys and queries of every block, for each key/value head: [G, D, D].

    Of blocks that read the same keys and values all queries together, at the block that keeps these.
    """
    found = []
    for a in topology.keepers:
        i = a.block
        value, key, query = (
            SecondMoment(f"block {i} {what}", width, groups=groups)
            for what, width, groups in (
                ("values", a.value_dim, a.value_heads),
                ("keys", a.key_dim, a.num_kv_heads),
                ("queries", a.key_dim, a.num_kv_heads),
            )
        )
        found += [
            Request(Site("value", i), value, (a.values[0],), heads_last),
            Request(Site("key", i), key, (a.new_keys,), heads_last),
            Request(
                Site("query", i), query, tuple(r.queries[0] for r in topology.sharing(a)), by_key_head(a.num_kv_heads)
            ),
        ]
    return [*found, *vector_moments(topology)]


def vector_moments(topology: Topology) -> list[Request]:
    """SecondMoment of the compressed vectors of latent attention, as they are written: [r, r]."""
    return [
        Request(
            Site(vector.site, b.index), SecondMoment(f"block {b.index} {vector.site}", vector.width), (vector.written,)
        )
        for b in topology.blocks
        for vector in b.attention.vectors
    ]


def vector_peaks(topology: Topology) -> list[Request]:
    """Peak of the channels of compressed vectors: [r]."""
    return [
        Request(Site(vector.site, b.index), Peak(f"block {b.index} {vector.site}"), (vector.written,))
        for b in topology.blocks
        for vector in b.attention.vectors
    ]


def down_sizes(topology: Topology, by: str, all_experts: bool = False) -> list[Request]:
    """Energy or Peak (by: "energy" or "peak") of the input channels of every down projection: [width].

    Of a mixture ExpertEnergy or ExpertPeak, [E, width]; all_experts: over every token, not only those routed to an expert.
    """
    return [down_size(site, f, by, all_experts) for site, f in feed_forwards(topology)]


def down_size(site: Site, f: FeedForward, by: str, all_experts: bool) -> Request:
    """The request of one of them."""
    name, x = f"the input of node {f.down.name}", source(f.down)
    if f.experts is None:
        return Request(site, Energy(name) if by == "energy" else Peak(name), (x,))
    sizes = ExpertEnergy(name, f.experts.count) if by == "energy" else ExpertPeak(name, f.experts.count)
    x, indices = on_every_expert(x, f.experts) if all_experts else (x, f.experts.indices)
    return Request(site, sizes, (x,), routed_by=indices)


def down_moments(topology: Topology) -> list[Request]:
    """SecondMoment of blocks of neighbouring input channels of every down projection: [G, D, D]."""
    found = []
    for site, f in feed_forwards(topology):
        x = source(f.down)
        width = values.width(x)
        size = math.gcd(width, BLOCK)
        moment = SecondMoment(f"input of {f.down.name}", size, groups=width // size)
        found.append(Request(site, moment, (x,), in_blocks(size)))
    return found


def reader_site(index: int) -> Site:
    """Of a value that linears read from the stream, by its place in `topology.readers`."""
    return Site("reader", index=index)


def reader_peaks(topology: Topology) -> list[Request]:
    """Peak of the channels of every value that linears read from the stream: [d]."""
    return [
        Request(reader_site(i), Peak(f"residual stream, reader {i}"), (group.value,))
        for i, group in enumerate(topology.readers)
    ]


def output_peaks(topology: Topology) -> list[Request]:
    """Peak of the input channels of every output projection: [heads * D]."""
    found = []
    for block in topology.blocks:
        o = block.attention.o
        found.append(Request(Site("o", block.index), Peak(f"the input of node {o.name}"), (source(o),)))
    return found


def linear_inputs(topology: Topology) -> dict[Site, tuple[Node, list[Node]]]:
    """Every value inside blocks that quantized linears read, and these linears."""
    kept = set(topology.floats)
    found = {reader_site(i): (g.value, [n for n in g.linears if n not in kept]) for i, g in enumerate(topology.readers)}
    for block in topology.blocks:
        o = block.attention.o
        found[Site("o", block.index)] = (source(o), [n for n in (o,) if n not in kept])
        for vector in block.attention.vectors:
            found[Site(vector.site, block.index)] = (vector.value, [n for n in vector.linears if n not in kept])
    for site, f in feed_forwards(topology):
        found[site] = (source(f.down), [n for n in (f.down,) if n not in kept])
    return {site: (value, linears) for site, (value, linears) in found.items() if linears}


def loud_inputs(topology: Topology) -> list[Request]:
    """LoudTokens of these values."""
    return [
        Request(site, LoudTokens(f"the input of node {linears[0].name}"), (value,))
        for site, (value, linears) in linear_inputs(topology).items()
    ]


def feed_forwards(topology: Topology) -> list[tuple[Site, FeedForward]]:
    """The feed-forwards of all blocks, with the sites of their down projections."""
    return [(Site("down", b.index, j), f) for b in topology.blocks for j, f in enumerate(b.feed_forwards)]


def heads_last(x: Tensor) -> Tensor:
    """[B, G, S, D] -> [B, S, G, D]."""
    return x.transpose(1, 2)


def by_key_head(groups: int) -> Callable[[Tensor], Tensor]:
    """Queries [B, H, S, D] -> [B, H / G, S, G, D]: those that meet a key head count together."""
    return lambda x: x.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4)


def in_blocks(size: int) -> Callable[[Tensor], Tensor]:
    """[..., width] -> [tokens, width / size, size]."""
    return lambda x: x.flatten(0, -2).unflatten(-1, (-1, size))
