"""The bases U = P·R that come from second moments of activations.

Source: ResQ, arXiv 2412.14363, section 4; eigenvectors of uncentred second moments, ascending; see numerics/basis.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.amplification import residual_readers, value_readers, weigh
from resq_compiler.analysis.columns import SPLIT_DOWN, sizes
from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.calibration.moments import Moments
from resq_compiler.numerics.basis import principal_basis
from resq_compiler.numerics.rotation import part_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.recipes.settings import CompileConfig

BASIS_SITES = {"residual": ("attention", "mlp"), "value": ("value", "o"), "key": ("key",)}
"""Sites that share a basis; its rotations stay between the borders of all their parts."""


@dataclass
class Bases:
    """Orthogonal bases in float64, columns [low | high]; None where a recipe has none.

    residual U_A [d, d]; value U_B per block [G, D, D]; key U_C per block [D, D], or [G, D, D]; down: what stands before U_D's Hadamard
    transform, blocks [G, D, D] and the order of their columns by ascending energy, by down projection; spectra: ascending eigenvalues.
    """

    residual: Tensor | None = None
    value: list[Tensor] | None = None
    key: list[Tensor] | None = None
    down: dict[Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)


def make_bases(gm: GraphModule | None, moments: Moments | None, topology: Topology, config: CompileConfig) -> Bases:
    """The bases that a recipe asks for. gm: the float graph, needed where `basis_weighting` looks at weights.

    basis "pca": eigenvectors of the moments, then a random rotation inside each part. "hadamard": a random rotation of the
    whole width (QuaRot). "outliers": a permutation that puts the channels with the largest peaks last (QUIK).
    """
    down = {n: block_basis(m.mean()) for n, m in moments.down_blocks.items()} if moments else {}
    if config.basis == "none":
        return Bases(down=down)
    bases = Bases(value=[], key=[], down=down)
    bases.residual = _residual_basis(gm, moments, topology, config, bases.spectra)
    for block in topology.blocks:
        a, i = block.attention, block.index
        if moments:
            values, keys = head_moments(gm, moments, block, config)
            u = torch.stack(
                [_basis(m, a.value_dim, config, f"value.{i}.{g}", bases.spectra) for g, m in enumerate(values)]
            )
            names = [f"key.{i}"] if len(keys) == 1 else [f"key.{i}.{g}" for g in range(len(keys))]
            each = [_basis(m, a.head_dim, config, n, bases.spectra) for m, n in zip(keys, names, strict=True)]
            key = torch.stack(each) if config.key_basis == "head" else each[0]
        else:
            shared = _basis(None, a.value_dim, config, "head", bases.spectra)
            u = torch.stack([shared] * a.num_kv_heads)
            key = _basis(None, a.head_dim, config, "key", bases.spectra)
        bases.value.append(u)
        bases.key.append(key)
    return bases


def head_moments(
    gm: GraphModule | None, moments: Moments, block: Block, config: CompileConfig
) -> tuple[Tensor, Tensor]:
    """Moments whose eigenvectors are the bases of values [G, D, D] and of keys, [G, D, D] or pooled [1, D, D]."""
    value, key, query = (m[block.index].mean() for m in (moments.value, moments.key, moments.query))
    if config.key_basis == "shared":
        key, query = key.mean(0, keepdim=True), query.mean(0, keepdim=True)
    if config.basis_weighting == "readers" and config.basis == "pca":
        assert gm is not None
        value, key = weigh(value, value_readers(gm, block.attention)), weigh(key, query)
    return value, key


def _residual_basis(
    gm: GraphModule | None,
    moments: Moments | None,
    topology: Topology,
    config: CompileConfig,
    spectra: dict[str, Tensor],
) -> Tensor:
    if config.basis == "outliers":
        assert moments is not None and moments.residual_peak is not None
        return permutation(moments.residual_peak)
    moment = residual_moment(gm, moments, topology, config) if moments else None
    return _basis(moment, topology.hidden_size, config, "residual", spectra)


def residual_moment(gm: GraphModule | None, moments: Moments, topology: Topology, config: CompileConfig) -> Tensor:
    """The moment whose eigenvectors are the basis of the residual stream [d, d]."""
    if config.basis_weighting != "readers":
        return moments.residual.mean()
    assert gm is not None
    return weigh(moments.residual.mean(), residual_readers(gm, topology))


def block_basis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of each block of a moment [G, D, D], and the order that puts all their directions by ascending energy [G·D]."""
    basis, energies = principal_basis(moment)
    return basis, energies.flatten().argsort(stable=True)


def permutation(size: Tensor) -> Tensor:
    """The orthogonal matrix that orders channels by ascending size: x P has the largest last."""
    order = size.argsort(stable=True)
    return torch.eye(len(size), dtype=torch.float64)[:, order]


def _basis(
    moment: Tensor | None, width: int, config: CompileConfig, purpose: str, spectra: dict[str, Tensor]
) -> Tensor:  # fmt: skip
    draw = generator(
        config.seed, f"rotation.{purpose}"
    )  # one for every basis: a poor draw for all heads costs accuracy
    if config.basis == "hadamard":
        kind = "hadamard" if config.rotation == "none" else config.rotation
        return part_rotation([width], kind, draw)
    assert moment is not None
    if config.basis == "outliers":
        return permutation(moment.diagonal())
    p, spectrum = principal_basis(moment)
    spectra[purpose] = spectrum
    kind, *where = purpose.split(".")  # residual, value.BLOCK.HEAD, key.BLOCK or key.BLOCK.HEAD
    columns = sizes(width, config, *BASIS_SITES[kind], block=int(where[0]) if where else None)
    return p @ part_rotation(columns, config.rotation, draw)


def needs_moments(config: CompileConfig) -> bool:
    """True when a recipe looks at activations before the weights move."""
    return config.basis in ("pca", "outliers") or config.down_proj in SPLIT_DOWN
