"""Second moments of a model's activations, and the bases U = P·R that come from them.

Source: ResQ, arXiv 2412.14363, section 4; eigenvectors of uncentred second moments, ascending; see numerics/basis.py.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler import executor, memory, resume
from resq_compiler.config import CompileConfig
from resq_compiler.errors import DataError
from resq_compiler.numerics.basis import SecondMoment, principal_basis
from resq_compiler.numerics.rotation import part_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.partition import sizes
from resq_compiler.pipeline import PassContext
from resq_compiler.topology import Topology

log = logging.getLogger("resq_compiler")


@dataclass
class Moments:
    """Statistics of one calibration run.

    residual: all inputs of attention and feed-forward, pooled. value: per block, [G, D, D]. key: per block, pooled over heads.
    down_energy: mean square of every input channel of down projections, by node. Peaks are absolute maxima, same sites.
    """

    residual: SecondMoment
    value: list[SecondMoment]
    key: list[SecondMoment]
    down_energy: dict[Node, Tensor] = field(default_factory=dict)
    residual_peak: Tensor | None = None
    down_peak: dict[Node, Tensor] = field(default_factory=dict)


@dataclass
class Bases:
    """Orthogonal bases in float64, columns [low | high]; None where a recipe has none.

    residual U_A [d, d]; value U_B per block [G, D, D]; key U_C per block [D, D]; spectra: ascending eigenvalues by name.
    """

    residual: Tensor | None = None
    value: list[Tensor] | None = None
    key: list[Tensor] | None = None
    spectra: dict[str, Tensor] = field(default_factory=dict)


def calibrate(gm: GraphModule, ctx: PassContext) -> Moments:
    """Run the calibration windows through the float graph and sum second moments at every site of a basis."""
    topology: Topology = ctx.topology
    assert ctx.calibration is not None
    moments = _empty_moments(topology)
    if resume.load_moments(ctx, moments):
        return moments
    taps = _taps(topology, moments)
    schedule = executor.Schedule(gm, [topology.blocks[-1].end], list(gm.graph.find_nodes(op="placeholder")))
    batches = executor.batches(ctx.calibration)
    for i, ids in enumerate(batches):
        ctx.progress("calibrate", i, len(batches))
        schedule.run(executor.first_tokens(gm, ids), taps)
        memory.trim()
    ctx.progress("calibrate", len(batches), len(batches))
    resume.keep_moments(ctx, moments)
    return moments


def _empty_moments(topology: Topology) -> Moments:
    value, key = [], []
    for block in topology.blocks:
        a = block.attention
        value.append(SecondMoment(f"block {block.index} values", a.value_dim, groups=a.num_kv_heads))
        key.append(SecondMoment(f"block {block.index} keys", a.head_dim))
    return Moments(SecondMoment("residual stream", topology.hidden_size), value, key)


def _taps(topology: Topology, moments: Moments) -> dict:
    taps: dict = {}
    for group in topology.residual.readers:
        if topology.head not in group.linears:
            _add(taps, group.value, lambda x: _residual(moments, x))
    for i, block in enumerate(topology.blocks):
        a = block.attention
        _add(taps, a.value_cache.args[1], lambda x, i=i: moments.value[i].update(x.transpose(1, 2)))
        _add(taps, a.key_cache.args[1], lambda x, i=i: moments.key[i].update(x.reshape(-1, x.shape[-1])))
        for feed_forward in block.feed_forwards:
            _add(taps, feed_forward.down.args[0], lambda x, n=feed_forward.down: _channels(moments, n, x))
    return taps


def _add(taps: dict, node: Node, tap: object) -> None:
    before = taps.get(node)
    taps[node] = tap if before is None else (lambda x: (before(x), tap(x)))


def _residual(moments: Moments, x: Tensor) -> None:
    moments.residual.update(x)
    rows = x.flatten(0, -2)
    peak = torch.maximum(rows.amax(0), -rows.amin(0))
    moments.residual_peak = peak if moments.residual_peak is None else torch.maximum(moments.residual_peak, peak)


def _channels(moments: Moments, node: Node, x: Tensor) -> None:
    rows = x.flatten(0, -2)
    energy, peak = rows.square().sum(0).double(), torch.maximum(rows.amax(0), -rows.amin(0))
    if not bool(torch.isfinite(energy).all()):
        raise DataError(f"node {node.name}: the input of this down projection is not finite on the calibration data")
    if node in moments.down_energy:
        energy, peak = energy + moments.down_energy[node], torch.maximum(peak, moments.down_peak[node])
    moments.down_energy[node], moments.down_peak[node] = energy, peak


def make_bases(moments: Moments | None, topology: Topology, config: CompileConfig) -> Bases:
    """The bases that a recipe asks for.

    basis "pca": eigenvectors of the moments, then a random rotation inside each part. "hadamard": a random rotation of the
    whole width (QuaRot). "outliers": a permutation that puts the channels with the largest peaks last (QUIK).
    """
    if config.basis == "none":
        return Bases()
    bases = Bases(value=[], key=[])
    bases.residual = _residual_basis(moments, topology.hidden_size, config, bases.spectra)
    for block in topology.blocks:
        a, i = block.attention, block.index
        if moments:
            u = [
                _basis(m, a.value_dim, config, f"value.{i}.{g}", bases.spectra)
                for g, m in enumerate(moments.value[i].mean())
            ]
            key = _basis(moments.key[i].mean(), a.head_dim, config, f"key.{i}", bases.spectra)
        else:
            shared = _basis(None, a.value_dim, config, "head", bases.spectra)
            u = [shared] * a.num_kv_heads
            key = _basis(None, a.head_dim, config, "key", bases.spectra)
        bases.value.append(torch.stack(u))
        bases.key.append(key)
    return bases


def _residual_basis(moments: Moments | None, width: int, config: CompileConfig, spectra: dict[str, Tensor]) -> Tensor:
    if config.basis == "outliers":
        assert moments is not None and moments.residual_peak is not None
        return permutation(moments.residual_peak)
    return _basis(moments.residual.mean() if moments else None, width, config, "residual", spectra)


def permutation(size: Tensor) -> Tensor:
    """The orthogonal matrix that orders channels by ascending size: x P has the largest last."""
    order = size.argsort(stable=True)
    return torch.eye(len(size), dtype=torch.float64)[:, order]


def _basis(
    moment: Tensor | None, width: int, config: CompileConfig, purpose: str, spectra: dict[str, Tensor]
) -> Tensor:  # fmt: skip
    shared = "residual" if purpose == "residual" else "head"  # one draw for all heads of a width, as in the paper
    if config.basis == "hadamard":
        kind = "hadamard" if config.rotation == "none" else config.rotation
        return part_rotation([width], kind, generator(config.seed, f"rotation.{shared}"))
    assert moment is not None
    if config.basis == "outliers":
        return permutation(moment.diagonal())
    p, spectrum = principal_basis(moment)
    spectra[purpose] = spectrum
    return p @ part_rotation(sizes(width, config), config.rotation, generator(config.seed, f"rotation.{shared}"))


def needs_moments(config: CompileConfig) -> bool:
    """True when a recipe looks at activations before the weights move."""
    return config.basis in ("pca", "outliers") or config.down_proj in ("energy-split", "outliers")
