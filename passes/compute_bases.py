"""compute-bases: find the orthogonal bases in which a part of the directions carries most of the energy. Changes nothing.

pca          eigenvectors of second moments of the calibration run, by ascending eigenvalue (ResQ)
weights      eigenvectors of the second moments of the weights that read the stream, and the values (OSTQuant's start)
outliers     a permutation that puts the channels with the largest peaks last (QUIK)
hadamard     a random rotation of the whole width: a randomized Hadamard matrix (QuaRot)
orthogonal   the same, any random orthogonal matrix
none         no bases, but those of down projections
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.amplification import residual_readers, value_readers, weigh
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Attention, Compressed, ReadGroup, Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.bases import (
    Bases,
    BlockBasis,
    block_basis,
    online_matrices,
    permutation,
    random_basis,
)
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.numerics.basis import SecondMoment, principal_basis
from resq_compiler.numerics.channels import Peak
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import devices, processes

MEASURED = ("pca", "outliers")


@dataclass(frozen=True)
class ComputeBases(Pass):
    """Provide Bases.

    weighting "readers": directions also count by how much the weights (for U_C the queries) that read them amplify errors.
    key_basis: U_C, one for all heads of a layer, or one for each key/value head. down "block-pca": principal directions of blocks of 64
    channels at the inputs of down projections. online: where U_A stays an operator, every input of linears has its own, or one serves all:
    own ones cost an eigenproblem and a matrix of hidden size squared each.
    """

    name: ClassVar[str] = "compute-bases"
    rewrites: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology,)
    provides: ClassVar[tuple[type, ...]] = (Bases,)

    basis: Literal["pca", "weights", "outliers", "hadamard", "orthogonal", "none"] = "pca"
    weighting: Literal["none", "readers"] = "none"
    key_basis: Literal["shared", "head"] = "shared"
    down: Literal["none", "block-pca"] = "none"
    online: Literal["own", "shared"] = "own"

    @property
    def needs_calibration(self) -> bool:
        return self.basis in MEASURED or self.down == "block-pca"

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        topology = ctx.facts.get(Topology)
        found: list[Request] = []
        if self.basis in MEASURED:
            at_residual = requests.residual_moments if self.basis == "pca" else requests.residual_peaks
            found += [*at_residual(topology, self.online == "own"), *requests.head_moments(topology)]
        if self.down == "block-pca":
            found += requests.down_moments(topology)
        return found

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, seen = ctx.facts.get(Topology), ctx.facts.find(Statistics) or Statistics()
        down = self._down(topology, seen)
        if self.basis == "pca":
            bases = self._principal(gm, topology, seen, down)
        elif self.basis == "weights":
            bases = of_weights(gm, topology, ctx.seed, self.online == "own", down)
        elif self.basis == "outliers":
            bases = ordered(topology, seen, self.key_basis == "shared", self.online == "own", down)
        elif self.basis == "none":
            bases = Bases(down=down)
        else:
            bases = drawn(topology, self.basis, ctx.seed, down)
        if bases.reading:
            ctx.lines.append(online_line(topology, bases))
        ctx.facts.put(bases)
        return 0

    def _down(self, topology: Topology, seen: Statistics) -> dict[Node, BlockBasis]:
        if self.down == "none":
            return {}
        sites = requests.feed_forwards(topology)
        return {f.down: block_basis(seen.get(SecondMoment, site).mean()) for site, f in sites}

    def _principal(
        self, gm: GraphModule, topology: Topology, seen: Statistics, down: dict[Node, BlockBasis]
    ) -> Bases:  # fmt: skip
        def of_stream(site: Site, groups: list[ReadGroup]) -> Tensor:
            moment = devices.here(seen.get(SecondMoment, site).mean())
            if self.weighting == "readers":
                moment = weigh(moment, residual_readers(gm, groups))
            return agreed(principal_basis(moment)[0].cpu())

        def of_heads(attention: Attention) -> tuple[Tensor, Tensor]:
            value, key = map(each_basis, self._head_moments(gm, seen, topology.sharing(attention)))
            return value, key[0] if self.key_basis == "shared" else key

        heads = by_block(topology, of_heads)
        stream = stream_bases(topology, of_stream, self.online == "own")
        return Bases(*stream, *heads, down, self._of_vectors(gm, topology, seen))

    def _of_vectors(self, gm: GraphModule, topology: Topology, seen: Statistics) -> dict[Site, Tensor]:
        """Bases of the compressed vectors of latent attention."""
        found: dict[Site, Tensor] = {}
        for site, _, vector in vectors_of(topology):
            moment = devices.here(seen.get(SecondMoment, site).mean())
            if self.weighting == "readers":
                moment = weigh(moment, residual_readers(gm, [vector]))
            found[site] = agreed(principal_basis(moment)[0].cpu())
        return found

    def _head_moments(self, gm: GraphModule, seen: Statistics, sharing: Sequence[Attention]) -> tuple[Tensor, Tensor]:
        """Moments whose eigenvectors are the bases of values [G, D, D] and of keys, [G, D, D] or pooled [1, D, D].

        sharing: the attentions that read them, the first of which keeps them.
        """
        sites = (Site(name, sharing[0].block) for name in ("value", "key", "query"))
        value, key, query = (devices.here(seen.get(SecondMoment, site).mean()) for site in sites)
        if self.key_basis == "shared":
            key, query = key.mean(0, keepdim=True), query.mean(0, keepdim=True)
        if self.weighting == "readers":
            value, key = weigh(value, value_readers(gm, sharing)), weigh(key, query)
        return value, key


def by_block(
    topology: Topology, of: Callable[[Attention], tuple[Tensor, Tensor]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Bases of values and of keys of every block, made once for all blocks that read the same ones."""
    found = {attention.block: of(attention) for attention in topology.keepers}
    pairs = [found[block.attention.keeper] for block in topology.blocks]
    return tuple(value for value, _ in pairs), tuple(key for _, key in pairs)


def each_basis(moments: Tensor) -> Tensor:
    """Eigenvectors of moments [G, D, D], on the CPU."""
    return agreed(torch.stack([principal_basis(moment)[0] for moment in moments]).cpu())


def agreed(basis: Tensor) -> Tensor:
    """Of processes that share the work, the basis of the first: where eigenvalues are close, others may find other vectors."""
    return processes.current().from_first(basis)


def stream_bases(
    topology: Topology, basis_of: Callable[[Site, list[ReadGroup]], Tensor], own: bool
) -> tuple[Tensor | None, dict[Node, Tensor]]:
    """U_A of the whole stream, if it fuses; and one of each value that linears read where it stays online: its own, or one for all."""
    groups = requests.residual_groups(topology, own)
    found = {site: basis_of(site, sharing) for site, sharing in groups.items()}
    residual = found.pop(requests.RESIDUAL, None)
    return residual, {group.value: basis for site, basis in found.items() for group in groups[site]}


def online_line(topology: Topology, bases: Bases) -> str:
    """What U_A costs where it stays an operator."""
    different, each = online_matrices(bases), topology.hidden_size**2
    return (
        f"U_A online before {len(bases.reading)} inputs of linears: {different} matrices of {topology.hidden_size}², "
        f"{4 * different * each / 1e6:.1f} MB in float32, {len(bases.reading) * each:,} multiplications a token"
    )


def ordered(
    topology: Topology, seen: Statistics, shared: bool, own: bool, down: dict[Node, BlockBasis]
) -> Bases:  # fmt: skip
    """Permutations of channels by their size; of keys one for all heads of a block (shared) or one for each."""

    def sizes(name: str, block: int) -> Tensor:
        return seen.get(SecondMoment, Site(name, block)).mean().diagonal(dim1=-2, dim2=-1)

    def of_heads(attention: Attention) -> tuple[Tensor, Tensor]:
        value, key = sizes("value", attention.block), sizes("key", attention.block)
        order = permutation(key.mean(0)) if shared else torch.stack(list(map(permutation, key)))
        return torch.stack(list(map(permutation, value))), order

    heads = by_block(topology, of_heads)
    stream = stream_bases(topology, lambda site, _: permutation(seen.get(Peak, site).sizes), own)
    latent = {site: permutation(sizes(site.name, i)) for site, i, _ in vectors_of(topology)}
    return Bases(*stream, *heads, down, latent)


def vectors_of(topology: Topology) -> list[tuple[Site, int, Compressed]]:
    """The compressed vectors of latent attention, with their sites and blocks."""
    return [(Site(v.site, b.index), b.index, v) for b in topology.blocks for v in b.attention.vectors]


def of_weights(gm: GraphModule, topology: Topology, seed: int, own: bool, down: dict[Node, BlockBasis]) -> Bases:
    """Principal directions of the weights that read the stream, and of those that read values; keys, which no weight reads, at random."""
    stream = stream_bases(topology, lambda _, groups: agreed(principal_basis(residual_readers(gm, groups))[0]), own)

    def of_heads(attention: Attention) -> tuple[Tensor, Tensor]:
        value = each_basis(value_readers(gm, topology.sharing(attention)))
        return value, random_basis(attention.key_dim, "hadamard", seed, "key")

    heads = by_block(topology, of_heads)
    latent = {site: agreed(principal_basis(residual_readers(gm, [v]))[0]) for site, _, v in vectors_of(topology)}
    return Bases(*stream, *heads, down, latent)


def drawn(topology: Topology, kind: str, seed: int, down: dict[Node, BlockBasis]) -> Bases:
    """Random rotations of the whole width: one for the stream, one for the values and one for the keys of all heads."""
    residual = random_basis(topology.hidden_size, kind, seed, "residual")

    def of_heads(attention: Attention) -> tuple[Tensor, Tensor]:
        one = random_basis(attention.value_dim, kind, seed, "head")
        return torch.stack([one] * attention.value_heads), random_basis(attention.key_dim, kind, seed, "key")

    heads = by_block(topology, of_heads)
    latent = {site: random_basis(v.width, kind, seed, v.site) for site, _, v in vectors_of(topology)}
    return Bases(*stream_bases(topology, lambda *_: residual, False), *heads, down, latent)
