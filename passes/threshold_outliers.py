"""threshold-outliers: keep channels with large values out of quantization, and say so in the column plan. Changes nothing.

Every channel whose values reach the threshold anywhere on the calibration text is one of the high columns, at the plan's high bits; the
others have the main bits. compute-bases{basis=outliers} and reorder-channels{by=peak} put these channels last.

Source: LLM.int8(), arXiv 2208.07339, section 3.2. Differs: it finds the columns of every product anew, this pass once for all text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.site_shares import SiteShare, SiteShares
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.numerics.channels import Peak
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class ThresholdOutliers(Pass):
    """Replace the shares of the ColumnPlan: high columns are those that reach `threshold`, at most half of all."""

    name: ClassVar[str] = "threshold-outliers"
    rewrites: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)
    provides: ClassVar[tuple[type, ...]] = (ColumnPlan,)

    threshold: float = option(6.0, 0)

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        topology = ctx.facts.get(Topology)
        plan = ctx.facts.get(ColumnPlan)
        down = requests.down_sizes(topology, "peak") if plan.split_down else []
        return [
            *requests.reader_peaks(topology),
            *requests.output_peaks(topology),
            *requests.vector_peaks(topology),
            *down,
        ]

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        topology, plan = ctx.facts.get(Topology), ctx.facts.get(ColumnPlan)
        shares = [self._share(ctx, site, counts) for site, counts in self._counts(topology, plan, ctx).items()]
        ctx.facts.put(dataclasses.replace(plan, sites=SiteShares(tuple(shares))))
        return 0

    def _counts(self, topology: Topology, plan: ColumnPlan, ctx: PassContext) -> dict[Site, tuple[int, int]]:
        """Channels that reach the threshold, and all there are, for each site; in heads that are split alike, the most of any."""
        seen = ctx.facts.get(Statistics)
        stream = [seen.get(Peak, requests.reader_site(i)).sizes for i in range(len(topology.readers))]
        most = int(largest_of(stream).ge(self.threshold).sum())
        found = {Site(name): (most, topology.hidden_size) for name in ("attention", "mlp")}
        for block in topology.blocks:
            heads = seen.get(Peak, Site("o", block.index)).sizes.unflatten(0, (-1, block.attention.value_dim))
            found[Site("o", block.index)] = (int(heads.ge(self.threshold).sum(1).max()), block.attention.value_dim)
        for site in (Site(v.site, b.index) for b in topology.blocks for v in b.attention.vectors):
            sizes = seen.get(Peak, site).sizes
            found[site] = (int(sizes.ge(self.threshold).sum()), len(sizes))
        for site, _ in requests.feed_forwards(topology) if plan.split_down else ():
            sizes = seen.get(Peak, site).sizes
            count, width = int(sizes.ge(self.threshold).sum()), len(sizes)
            before = found.get(Site("down", site.block), (0, width))[0]
            found[Site("down", site.block)] = (max(count, before), width)
        return found

    def _share(self, ctx: PassContext, site: Site, counts: tuple[int, int]) -> SiteShare:
        count, width = counts
        ctx.lines.append(f"{site}: {count} of {width} channels reach {self.threshold:g}")
        if 2 * count > width:
            ctx.note(
                f"{site}: {count} of {width} channels reach {self.threshold:g}; the {width // 2} largest stay at the high bits, the rest "
                "is quantized; a higher outlier_threshold leaves out fewer"
            )
            count = width // 2
        return SiteShare(site, share_of(count, width))


def share_of(count: int, width: int) -> float:
    """The share of a width whose whole number of columns, rounded down, is the count."""
    share = count / width
    return share if int(width * share) == count else math.nextafter(share, 1)


def largest_of(sizes: list[Tensor]) -> Tensor:
    """The largest of several, channel by channel."""
    largest = sizes[0]
    for other in sizes[1:]:
        largest = largest.maximum(other)
    return largest
