"""plan-columns: say how many bits the columns of every site get. Changes nothing; passes after it follow the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.fx import GraphModule

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.expert_bits import ExpertBits
from resq_compiler.analysis.site_shares import Shares, SiteShares
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext

MainBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]
PartBits = Literal[2, 3, 4, 5, 6, 7, 8]
HighBits = Literal[2, 3, 4, 5, 6, 7, 8, 16]


@dataclass(frozen=True)
class PlanColumns(Pass):
    """Provide a ColumnPlan. Main and high bits of 16 mean: stays in float.

    The main bits hold for the columns outside the high part (`high_fraction` of them, at `high_bits`) and the low part (`low_fraction`,
    at `low_bits`). sites: shares of single sites. rank_multiple: columns of these parts are a multiple of it. split_down: inputs of
    down projections have parts too. lm_head_bits: none leaves lm_head in float. weight_group_size: columns of a part whose weights
    share a scale (the last group of a part may be smaller; lm_head has a scale a row); none: a row has one. experts: bits of the weights
    of single experts.
    """

    name: ClassVar[str] = "plan-columns"
    rewrites: ClassVar[bool] = False
    provides: ClassVar[tuple[type, ...]] = (ColumnPlan,)

    weight_bits: MainBits = 4
    activation_bits: MainBits = 4
    kv_bits: MainBits = 4
    high_bits: HighBits = 8
    high_fraction: float = option(1 / 8, 0, 0.5)
    low_bits: PartBits = 2
    low_fraction: float = option(0.0, 0, 0.5)
    sites: SiteShares = SiteShares()
    rank_multiple: int = option(1, 1)
    split_down: bool = False
    lm_head_bits: Literal[8] | None = None
    weight_group_size: Literal[32, 64, 128] | None = None
    experts: ExpertBits = ExpertBits()

    @property
    def plan(self) -> ColumnPlan:
        """What the pass provides."""
        return ColumnPlan(
            self.weight_bits, self.activation_bits, self.kv_bits,
            Shares(self.high_fraction, self.high_bits, self.low_fraction, self.low_bits),
            self.sites, self.rank_multiple, self.split_down, self.lm_head_bits, self.weight_group_size, self.experts,
        )  # fmt: skip

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        ctx.facts.put(self.plan)
        return 0
