"""Second moments of a model's activations, taken in one calibration run.

Source: ResQ, arXiv 2412.14363, section 4; eigenvectors of uncentred second moments, ascending; see numerics/basis.py.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import executor, precision, workdir
from resq_compiler.errors import DataError
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.util import memory

BLOCK = 64
"""Channels of a down projection's input that share a basis with down_proj="block-pca": their largest common divisor with the width."""
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


def calibrate(gm: GraphModule, ctx: PassContext) -> Moments:
    """Run the calibration windows through the float graph and sum second moments at every site of a basis."""
    topology: Topology = ctx.topology
    assert ctx.calibration is not None
    moments = _empty_moments(topology, ctx.config)
    if workdir.load_moments(ctx, moments):
        return moments
    taps = _taps(topology, moments)
    schedule = executor.Schedule(gm, [topology.blocks[-1].end], list(gm.graph.find_nodes(op="placeholder")))
    batches = executor.batches(basis_windows(ctx.calibration, ctx.config))
    for i, ids in enumerate(batches):
        ctx.progress("calibrate", i, len(batches))
        schedule.run(executor.first_tokens(gm, ids), taps)
        memory.trim()
    ctx.progress("calibrate", len(batches), len(batches))
    workdir.keep_moments(ctx, moments)
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
    moments = Moments(SecondMoment("residual stream", topology.hidden_size, dtype=precision.dtype()), value, key, query)
    if config.down_proj == "block-pca":
        for down in (f.down for block in topology.blocks for f in block.feed_forwards):
            width = input_width(down)
            size = math.gcd(width, BLOCK)
            moments.down_blocks[down] = SecondMoment(f"input of {down.name}", size, groups=width // size)
    return moments


def input_width(linear: Node) -> int:
    """in_features of a linear of the graph."""
    return int(linear.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]


def _taps(topology: Topology, moments: Moments) -> dict:
    taps: dict = {}
    for group in topology.residual.readers:
        if topology.head not in group.linears:
            _add(taps, group.value, lambda x: _residual(moments, x))
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


def _residual(moments: Moments, x: Tensor) -> None:
    moments.residual.update(x)
    rows = x.flatten(0, -2)
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
