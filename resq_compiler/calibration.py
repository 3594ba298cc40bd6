"""Second moments of a model's activations, and the bases U = P·R that come from them.

Source: ResQ, arXiv 2412.14363, section 4; eigenvectors of uncentred second moments, ascending; see numerics/basis.py.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler import executor, memory, products, resume
from resq_compiler.config import CompileConfig
from resq_compiler.errors import DataError
from resq_compiler.numerics.basis import SecondMoment, principal_basis
from resq_compiler.numerics.rotation import part_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.partition import SPLIT_DOWN, sizes
from resq_compiler.pipeline import PassContext
from resq_compiler.readers import residual_readers, value_readers, weigh
from resq_compiler.topology import Block, Topology

BASIS_SITES = {"residual": ("attention", "mlp"), "value": ("value", "o"), "key": ("key",)}
"""Sites that share a basis; its rotations stay between the borders of all their parts."""

BLOCK = 64
"""Channels of a down projection's input that share a basis with down_proj="block-pca": their largest common divisor with the width."""
PEAKED, PEAKED_COUNTS = 64, 1000
"""A token whose largest channel is so many times its median one is massive, and counts as so many with basis_token_weighting="massive"."""

log = logging.getLogger("resq_compiler")


@dataclass
class Moments:
    """Statistics of one calibration run.

    residual: all inputs of attention and feed-forward, pooled. value, key, query: per block and key/value head, [G, D, D].
    down_energy: mean square of every input channel of down projections, by node. Peaks are absolute maxima, same sites.
    down_blocks: of blocks of neighbouring channels there, [G, D, D], where a recipe asks for them.
    """

    residual: SecondMoment
    value: list[SecondMoment]
    key: list[SecondMoment]
    query: list[SecondMoment]
    down_energy: dict[Node, Tensor] = field(default_factory=dict)
    residual_peak: Tensor | None = None
    down_peak: dict[Node, Tensor] = field(default_factory=dict)
    down_blocks: dict[Node, SecondMoment] = field(default_factory=dict)


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


def calibrate(gm: GraphModule, ctx: PassContext) -> Moments:
    """Run the calibration windows through the float graph and sum second moments at every site of a basis."""
    topology: Topology = ctx.topology
    assert ctx.calibration is not None
    moments = _empty_moments(topology, ctx.config)
    if resume.load_moments(ctx, moments):
        return moments
    taps = _taps(topology, moments, PEAKED_COUNTS if ctx.config.basis_token_weighting == "massive" else 1)
    schedule = executor.Schedule(gm, [topology.blocks[-1].end], list(gm.graph.find_nodes(op="placeholder")))
    batches = executor.batches(basis_windows(ctx.calibration, ctx.config))
    for i, ids in enumerate(batches):
        ctx.progress("calibrate", i, len(batches))
        schedule.run(executor.first_tokens(gm, ids), taps)
        memory.trim()
    ctx.progress("calibrate", len(batches), len(batches))
    resume.keep_moments(ctx, moments)
    return moments


def basis_windows(windows: Tensor, config: CompileConfig) -> Tensor:
    """`basis_samples` of the calibration windows, spread evenly over them; all of them where there are no more."""
    count = min(config.basis_samples, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def _empty_moments(topology: Topology, config: CompileConfig) -> Moments:
    value, key, query = [], [], []
    for block in topology.blocks:
        a = block.attention
        value.append(SecondMoment(f"block {block.index} values", a.value_dim, groups=a.num_kv_heads))
        key.append(SecondMoment(f"block {block.index} keys", a.head_dim, groups=a.num_kv_heads))
        query.append(SecondMoment(f"block {block.index} queries", a.head_dim, groups=a.num_kv_heads))
    moments = Moments(SecondMoment("residual stream", topology.hidden_size, dtype=products.dtype()), value, key, query)
    if config.down_proj == "block-pca":
        for down in (f.down for block in topology.blocks for f in block.feed_forwards):
            width = input_width(down)
            size = math.gcd(width, BLOCK)
            moments.down_blocks[down] = SecondMoment(f"input of {down.name}", size, groups=width // size)
    return moments


def input_width(linear: Node) -> int:
    """in_features of a linear of the graph."""
    return int(linear.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]


def _taps(topology: Topology, moments: Moments, massive_counts: int) -> dict:
    taps: dict = {}
    for group in topology.residual.readers:
        if topology.head not in group.linears:
            _add(taps, group.value, lambda x: _residual(moments, x, massive_counts))
    for i, block in enumerate(topology.blocks):
        a = block.attention
        _add(taps, a.value_cache.args[1], lambda x, i=i: moments.value[i].update(x.transpose(1, 2)))
        _add(taps, a.key_cache.args[1], lambda x, i=i: moments.key[i].update(x.transpose(1, 2)))
        _add(taps, a.core.args[0], lambda x, i=i: _queries(moments.query[i], x))
        for feed_forward in block.feed_forwards:
            _add(taps, feed_forward.down.args[0], lambda x, n=feed_forward.down: _channels(moments, n, x))
    return taps


def _add(taps: dict, node: Node, tap: object) -> None:
    before = taps.get(node)
    taps[node] = tap if before is None else (lambda x: (before(x), tap(x)))


def _residual(moments: Moments, x: Tensor, massive_counts: int) -> None:
    moments.residual.update(x)
    rows = x.flatten(0, -2)
    if massive_counts > 1:
        size = rows.abs()
        massive = rows[size.amax(1) > PEAKED * size.median(1).values]
        moments.residual.update(massive * math.sqrt(massive_counts - 1))
    peak = torch.maximum(rows.amax(0), -rows.amin(0))
    moments.residual_peak = peak if moments.residual_peak is None else torch.maximum(moments.residual_peak, peak)


def _queries(moment: SecondMoment, x: Tensor) -> None:
    """x [B, H, S, D]: the queries that meet a key head count together."""
    moment.update(x.unflatten(1, (moment.groups, -1)).permute(0, 2, 3, 1, 4))


def _channels(moments: Moments, node: Node, x: Tensor) -> None:
    rows = x.flatten(0, -2)
    energy, peak = rows.square().sum(0).double(), torch.maximum(rows.amax(0), -rows.amin(0))
    if not bool(torch.isfinite(energy).all()):
        raise DataError(f"node {node.name}: the input of this down projection is not finite on the calibration data")
    if node in moments.down_energy:
        energy, peak = energy + moments.down_energy[node], torch.maximum(peak, moments.down_peak[node])
    moments.down_energy[node], moments.down_peak[node] = energy, peak
    if node in moments.down_blocks:
        moment = moments.down_blocks[node]
        moment.update(rows.unflatten(-1, (moment.groups, moment.dim)))


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
            u = torch.stack([_basis(m, a.value_dim, config, f"value.{i}.{g}", bases.spectra) for g, m in enumerate(values)])
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


def head_moments(gm: GraphModule | None, moments: Moments, block: Block, config: CompileConfig) -> tuple[Tensor, Tensor]:
    """Moments whose eigenvectors are the bases of values [G, D, D] and of keys, [G, D, D] or pooled [1, D, D]."""
    value, key, query = (m[block.index].mean() for m in (moments.value, moments.key, moments.query))
    if config.key_basis == "shared":
        key, query = key.mean(0, keepdim=True), query.mean(0, keepdim=True)
    if config.basis_weighting == "readers" and config.basis == "pca":
        assert gm is not None
        value, key = weigh(value, value_readers(gm, block.attention)), weigh(key, query)
    return value, key


def _residual_basis(
    gm: GraphModule | None, moments: Moments | None, topology: Topology, config: CompileConfig, spectra: dict[str, Tensor]
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
    draw = generator(config.seed, f"rotation.{purpose}")  # one for every basis: a poor draw for all heads costs accuracy
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
