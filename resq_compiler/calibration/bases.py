"""The bases U = P·R: directions P that come from second moments of activations, and random rotations R inside each part.

Source: ResQ, arXiv 2412.14363, section 4; eigenvectors of uncentred second moments, ascending; see numerics/basis.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.sites import Site
from resq_compiler.numerics.basis import principal_basis
from resq_compiler.numerics.rotation import part_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.util import devices


@dataclass(frozen=True)
class BlockBasis:
    """Of blocks of neighbouring channels: bases [G, D, D] float64, and the order of their G·D directions by ascending energy."""

    vectors: Tensor
    order: Tensor


@dataclass(frozen=True)
class Bases:
    """A fact: orthogonal bases in float64, columns [low | high]; None, or empty, where a recipe has none.

    residual U_A [d, d] of the whole stream; reading: where U_A stays online, U_A [d, d] of every value that linears read;
    value U_B per block [G, D, D]; key U_C per block [D, D], or [G, D, D]; where blocks read the same keys and values they have the same
    tensors; down: what stands before U_D's Hadamard transform, by down projection; latent: of every compressed vector of latent
    attention [r, r], by site.
    """

    residual: Tensor | None = None
    reading: Mapping[Node, Tensor] = field(default_factory=dict)
    value: tuple[Tensor, ...] = ()
    key: tuple[Tensor, ...] = ()
    down: Mapping[Node, BlockBasis] = field(default_factory=dict)
    latent: Mapping[Site, Tensor] = field(default_factory=dict)


def online_matrices(bases: Bases) -> int:
    """Matrices [d, d] that U_A has in the graph where it stays online: in a stream that changes basis each holds a norm's gain too."""
    return len(bases.reading) if bases.residual is not None else len({id(u) for u in bases.reading.values()})


def block_basis(moment: Tensor) -> BlockBasis:
    """Eigenvectors of each block of a moment [G, D, D]."""
    vectors, energies = (t.cpu() for t in principal_basis(devices.here(moment)))
    return BlockBasis(vectors, energies.flatten().argsort(stable=True))


def permutation(size: Tensor) -> Tensor:
    """The orthogonal matrix that orders channels by ascending size: x P has the largest last."""
    order = size.argsort(stable=True)
    return torch.eye(len(size), dtype=torch.float64)[:, order]


def order_of(basis: Tensor) -> Tensor | None:
    """The order of columns that a basis stands for, if it is a permutation: x P = x[order]. Else None."""
    if not bool(((basis == 0) | (basis == 1)).all()):
        return None
    return basis.argmax(0)


def random_basis(width: int, kind: str, seed: int, purpose: str) -> Tensor:
    """A random rotation of the whole width [width, width]; kind: see `random_rotation`."""
    return part_rotation([width], kind, generator(seed, f"rotation.{purpose}"))


def rotated(bases: Bases, plan: ColumnPlan, kind: str, seed: int) -> Bases:
    """The bases with a random rotation of their own inside each part: one poor draw for all heads would cost accuracy."""

    def turn(basis: Tensor, purpose: str, *sites: Site) -> Tensor:
        columns = plan.sizes_of(basis.shape[-1], sites)
        rotation = part_rotation(columns, kind, generator(seed, f"rotation.{purpose}"))
        return (devices.here(basis) @ devices.here(rotation)).cpu()

    stream = (Site("attention"), Site("mlp"))
    residual = None if bases.residual is None else turn(bases.residual, "residual", *stream)
    different = {id(u): u for u in bases.reading.values()}
    turned = {key: turn(u, f"residual.{i}", *stream) for i, (key, u) in enumerate(different.items())}
    reading = {node: turned[id(u)] for node, u in bases.reading.items()}

    def turn_values(i: int, blocks: list[int]) -> Tensor:
        sites = (Site("value", i), *(Site("o", block) for block in blocks))
        return torch.stack([turn(u, f"value.{i}.{g}", *sites) for g, u in enumerate(bases.value[i])])

    def turn_keys(i: int, blocks: list[int]) -> Tensor:
        u, site = bases.key[i], Site("key", i)
        if u.dim() == 2:
            return turn(u, f"key.{i}", site)
        return torch.stack([turn(each, f"key.{i}.{g}", site) for g, each in enumerate(u)])

    value, key = each_once(bases.value, turn_values), each_once(bases.key, turn_keys)
    latent = {site: turn(u, str(site), site) for site, u in bases.latent.items()}
    return dataclasses.replace(bases, residual=residual, reading=reading, value=value, key=key, latent=latent)


def each_once(per_block: Sequence[Tensor], change: Callable[[int, list[int]], Tensor]) -> tuple[Tensor, ...]:
    """What `change` makes of every tensor, from the first block that has it and all that have it; these have the result in common again."""
    blocks: dict[int, list[int]] = {}
    for i, tensor in enumerate(per_block):
        blocks.setdefault(id(tensor), []).append(i)
    changed = {key: change(found[0], found) for key, found in blocks.items()}
    return tuple(changed[id(tensor)] for tensor in per_block)
