"""smooth-channels: divide what linears read by scales of its channels, and multiply their columns by them (SmoothQuant).

    linear(norm(x, g), W)  ->  linear(norm(x, g / s), W diag(s))        s = max|x|^alpha / max|W|^(1 - alpha)

Inserted as a transform of every value behind a norm; fuse-projections multiplies it into gains and weights. Values that no norm with a
gain makes are left as they are, with a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from resq_compiler.analysis.topology import ReadGroup, Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.ir import meta
from resq_compiler.ir.views import Linear, Norm
from resq_compiler.numerics.channels import Peak
from resq_compiler.numerics.scaling import smooth_scales
from resq_compiler.numerics.transforms import Scaling
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.placing import place


@dataclass(frozen=True)
class SmoothChannels(Pass):
    """Insert scales of channels. alpha: how much of the size goes into the weights."""

    name: ClassVar[str] = "smooth-channels"
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    alpha: float = option(0.5, 0, 1)

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        return requests.reader_peaks(ctx.facts.get(Topology))

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        seen, done = ctx.facts.get(Statistics), 0
        for i, group in enumerate(ctx.facts.get(Topology).readers):
            norm = Norm.of(group.norm)
            if norm is None or norm.gain is None:
                ctx.note(f"node {group.value.name}: no norm with a gain makes it, so its channels are not smoothed")
                continue
            peaks = seen.get(Peak, requests.reader_site(i)).sizes
            scales = smooth_scales(peaks, column_peaks(gm, group), self.alpha)
            smooth = place(gm, ctx, Scaling(1 / scales), f"S.{i}", group.linears[0], SmoothChannels)
            divided = smooth.forward(group.value, group.linears, meta.Projection("S"))
            smooth.inverse(divided, group.linears, meta.Projection("S", inverse=True))
            done += 1
        return done


def column_peaks(gm: GraphModule, group: ReadGroup) -> torch.Tensor:
    """The largest weight of every input channel, over all linears of a group: [width]."""
    peaks = [Linear.require(linear).weight_tensor(gm).abs().flatten(0, -2).amax(0) for linear in group.linears]
    return torch.stack(peaks).amax(0)
