"""allocate-bits: spend a budget of bits where spectra and sensitivities say it pays. Changes nothing but the column plan.

Each site may give some of its columns more bits than the main ones, or fewer; analysis/splits.py says which. Linears and cache have a
budget each. `kind` says what splits there are: "sensitivity", shares of columns at the plan's high bits; "widths", also 5 to 8 bits for
them, and shares of columns at the plan's low bits, so that the paper's 8/4/2 and 6/4/2 are among them. The budget is `average_bits` or
`megabytes`, or what the plan's equal shares cost, and then the shares stay equal where the forecast gains less than `worth`. The table
is in this stage's text in a dump.

Experts of a mixture read the same codes, so shares of columns are theirs together; what their weights take is then shared out among all
experts of the model (analysis/expert_choices.py), so that those that predictions do not feel, or that few tokens reach, may have fewer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis import expert_places, sensitivity, size_budget
from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.expert_choices import as_bits, spend_on_experts
from resq_compiler.analysis.expert_choices import describe as describe_experts
from resq_compiler.analysis.site_shares import SiteShares, least_average
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.splits import Choice, Menu, Split, spend
from resq_compiler.analysis.topology import Block, Topology
from resq_compiler.calibration import requests
from resq_compiler.calibration.bases import Bases
from resq_compiler.calibration.statistics import Request, Statistics
from resq_compiler.errors import PassError
from resq_compiler.ir import values
from resq_compiler.ir.views import Linear
from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.numerics.expert_channels import ExpertEnergy, ExpertPeak
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import processes
from resq_compiler.util.text import number, table

Felt = Mapping[Site, Tensor]
HEADER = ("site", "columns", "high", "low", "bits", "sensitivity", "of it in high %", "error against equal shares %")


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Replace the shares of the ColumnPlan. Raises PassError: the budget is out of reach.

    average_bits: of linears, and of the cache. megabytes: of the whole model, which says what linears may have. channels: how
    reorder-channels finds the strongest ones; none, where down projections have bases or no parts. prefix_tokens: as many as a size must
    have room for. worth: of the forecast; what it lowers by less may be the forecast's own error. steps, down_steps: see Menu.
    all_experts: as of reorder-channels.
    """

    name: ClassVar[str] = "allocate-bits"
    rewrites: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, Bases, ColumnPlan)
    provides: ClassVar[tuple[type, ...]] = (ColumnPlan,)

    kind: Literal["sensitivity", "widths"] = "sensitivity"
    average_bits: float | None = option(None, 2, 8)
    megabytes: float | None = option(None, 0)
    channels: Literal["energy", "peak", "none"] = "energy"
    prefix_tokens: int = option(0, 0)
    worth: float = option(0.1, 0, 1)
    steps: int = option(32, 1)
    down_steps: int = option(16, 1)
    all_experts: bool = False

    @property
    def needs_calibration(self) -> bool:
        return True

    def statistics(self, gm: GraphModule, ctx: PassContext) -> Sequence[Request]:
        return (
            ()
            if self.channels == "none"
            else requests.down_sizes(ctx.facts.get(Topology), self.channels, self.all_experts)
        )

    @property
    def asked(self) -> bool:
        """Whether a budget was stated, which is spent however little it gains."""
        return self.average_bits is not None or self.megabytes is not None

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        plan = ctx.facts.get(ColumnPlan)
        if nothing_to_share(plan, self.asked):
            ctx.lines.append("nothing to share out: all columns have the same bits")
            return 0
        measured = sensitivity.measure(gm, ctx.facts.get(Topology), ctx.windows, ctx.seed, ctx.progress, ctx.work)
        felt = {site: processes.current().from_first(moment) for site, moment in measured.moments.items()}
        found, averages = self._spend_budgets(gm, ctx, plan, felt)
        errors = [
            (c.error(split), c.error(c.equal(plan, averages[is_cache(c)]))) for c, split in found.items()
        ]  # fmt: skip
        before = sum(error for _, error in errors)
        fall = 1 - sum(error for error, _ in errors) / before if before else 0.0
        worth = self.asked or fall >= self.worth
        if worth:
            shares = (s.share(c.site, c.width, plan.common.high_bits) for c, s in found.items())
            ctx.facts.put(dataclasses.replace(plan, sites=SiteShares(tuple(shares))))
        ctx.lines += [self._result(fall, worth), *describe(found, plan, averages).splitlines()]
        return (len(found) if worth else 0) + self._share_among_experts(gm, ctx, found, measured)

    def _share_among_experts(
        self, gm: GraphModule, ctx: PassContext, found: dict[Choice, Split], measured: sensitivity.Felt
    ) -> int:
        """Give experts the bits of weights that pay, no more of them together than their columns have; the number of these experts."""
        plan, energies = ctx.facts.get(ColumnPlan), {choice.site: choice.energies for choice in found}
        main, high = plan.weight_bits, plan.common.high_bits
        choices = [] if main >= high else expert_places.choices(gm, ctx.facts.get(Topology), plan, energies, measured)
        if not choices:
            return 0
        least = min(main, plan.common.low_bits) if self.kind == "widths" else main
        bits = spend_on_experts(choices, (main, high), least)
        fall = 1 - sum(c.error(pair) for c, pair in bits.items()) / sum(c.error((main, high)) for c in choices)
        worth = self.asked or fall >= self.worth
        if worth:
            ctx.facts.put(dataclasses.replace(plan, experts=as_bits(bits)))
        ctx.lines += [self._result(fall, worth, "experts"), *describe_experts(bits, (main, high))]
        return len(choices) if worth else 0

    def _spend_budgets(
        self, gm: GraphModule, ctx: PassContext, plan: ColumnPlan, felt: Felt
    ) -> tuple[dict[Choice, Split], tuple[float | None, float | None]]:
        """The split of every site, and the average bits of linears and of the cache."""
        averages = (self._linear_average(gm, ctx, plan), self.average_bits)
        menu = Menu(
            self.kind == "widths", plan.common.low_bits, plan.rank_multiple, self.steps, self.down_steps
        )  # fmt: skip
        found: dict[Choice, Split] = {}
        for choices, average in zip((self._linears(gm, ctx, felt), caches(ctx, felt)), averages, strict=True):
            if choices:
                found |= spend(choices, choices[0].extra_bits(plan, average), menu)
        return found, averages

    def _linear_average(self, gm: GraphModule, ctx: PassContext, plan: ColumnPlan) -> float | None:
        if self.megabytes is None:
            return self.average_bits
        least = least_average(plan.weight_bits, plan.common.low_bits, self.kind == "widths")
        budget = size_budget.SizeBudget(self.megabytes, least, 3 if self.kind == "widths" else 2, self.prefix_tokens)
        return size_budget.average_bits(gm, ctx.facts.get(Topology), plan, ctx.facts.get(Bases), budget, ctx.note)

    def _linears(self, gm: GraphModule, ctx: PassContext, felt: Felt) -> list[Choice]:
        """Sites of linears, with energies in the order of their bases."""
        topology, plan, bases = ctx.facts.get(Topology), ctx.facts.get(ColumnPlan), ctx.facts.get(Bases)
        bits = (min(plan.weight_bits, plan.activation_bits), plan.common.high_bits)
        if bits[0] >= bits[1]:
            return []
        attention = [n for b in topology.blocks for n in b.attention.readers]
        mlp = [n for b in topology.blocks for f in b.feed_forwards for n in (*f.gates, *f.ups)]
        choices = [
            Choice(Site(name), self._stream_energies(ctx, felt, name), rows(gm, linears), *bits)
            for name, linears in (("attention", attention), ("mlp", mlp))
        ]
        for block in topology.blocks:
            a, site = block.attention, Site("o", block.index)
            values = bases.value[block.index].repeat_interleave(a.num_heads // a.value_heads, 0)
            choices.append(Choice(site, along(values, felt[site]), rows(gm, [a.o]) * a.num_heads, *bits))
            for vector in a.vectors:
                site = Site(vector.site, block.index)
                choices.append(
                    Choice(site, along(bases.latent[site][None], felt[site]), rows(gm, vector.linears), *bits)
                )
            if plan.split_down:
                site = Site("down", block.index)
                energies = self._down_energies(ctx, block, felt[site].sum(0))
                choices.append(Choice(site, energies, rows(gm, [f.down for _, f in block.main_feed_forwards]), *bits))
        return choices

    def _stream_energies(self, ctx: PassContext, felt: Felt, name: str) -> Tensor:
        """Weighted energies [d] of what attention or feed-forward of all blocks read, along the directions of their bases."""
        topology, bases = ctx.facts.get(Topology), ctx.facts.get(Bases)
        if bases.residual is None and not bases.reading:
            raise PassError("columns are shared out along a basis of the residual stream; give compute-bases a basis")
        sites = {site: found[0].node for site, found in sensitivity.places(topology).items() if site.name == name}
        energies = []
        for site, node in sites.items():
            basis = bases.reading.get(node, bases.residual)
            assert basis is not None
            energies.append(along(basis[None], felt[site]))
        return torch.stack(energies).sum(0)

    def _down_energies(self, ctx: PassContext, block: Block, weighted: Tensor) -> Tensor:
        """Weighted energies [width] of the inputs of a block's down projections, in the order in which they get high bits.

        With block PCA of its directions, as if errors of channels did not add up: sensitivities have no more than a diagonal there.
        """
        bases = ctx.facts.get(Bases)
        if bases.down:
            return torch.stack(
                [along_blocks(bases.down[f.down].vectors, weighted)[bases.down[f.down].order] for _, f in block.main_feed_forwards]
            ).mean(0).flip(0)  # fmt: skip
        if self.channels == "none":
            raise PassError(
                "down projections have parts, and no order of channels: say channels=energy or channels=peak"
            )
        seen, main = ctx.facts.get(Statistics), block.main_feed_forwards
        if any(f.experts is not None for _, f in main):
            return self._expert_energies(seen, block, weighted)
        kind: type[Energy] | type[Peak] = Energy if self.channels == "energy" else Peak
        sizes = [seen.get(kind, Site("down", block.index, j)).sizes for j, _ in main]
        return weighted[torch.stack(sizes).sum(0).argsort(descending=True, stable=True)]

    def _expert_energies(self, seen: Statistics, block: Block, weighted: Tensor) -> Tensor:
        """Of experts, each with an order of its own: their energies in these orders, as if all channels were equally sensitive."""
        total = torch.zeros_like(weighted)
        for j, f in block.main_feed_forwards:
            site = Site("down", block.index, j)
            if f.experts is None:
                sizes = (seen.get(Energy, site) if self.channels == "energy" else seen.get(Peak, site)).sizes[None]
            else:
                found = seen.get(ExpertEnergy, site) if self.channels == "energy" else seen.get(ExpertPeak, site)
                sizes = found.sizes(1)
            energy = sizes.double() if self.channels == "energy" else sizes.double().square()
            total += energy.sort(-1, descending=True).values.sum(0)
        return total * (weighted.sum() / total.sum().clamp_min(torch.finfo(total.dtype).tiny))

    def _result(self, fall: float, worth: bool, whose: str = "") -> str:
        """The line before a table."""
        what, equal = ("error of experts' weights", "bits") if whose else ("error", "shares")
        stays = (
            f": below {100 * self.worth:g} %, so the {equal} stay equal, and the table says what they would have been"
        )
        return f"forecast of the {what}: {100 * fall:.1f} % lower than with equal {equal}{'' if worth else stays}"


def nothing_to_share(plan: ColumnPlan, asked: bool) -> bool:
    """Whether the main bits reach the high ones everywhere, or no column is to have high bits."""
    main = min(plan.weight_bits, plan.activation_bits, plan.kv_bits)
    return main >= plan.common.high_bits or (not asked and plan.common.high == 0)


def caches(ctx: PassContext, felt: Felt) -> list[Choice]:
    """Keys and values of every block."""
    plan, bases = ctx.facts.get(ColumnPlan), ctx.facts.get(Bases)
    bits = (plan.kv_bits, plan.common.high_bits)
    choices = []
    for attention in ctx.facts.get(Topology).keepers if bits[0] < bits[1] else ():
        i, heads = attention.block, attention.num_kv_heads
        keys = bases.key[i] if bases.key[i].dim() == 3 else bases.key[i][None]
        values = ((Site("value", i), bases.value[i]),) if attention.latent is None else ()
        for site, basis in ((Site("key", i), keys), *values):
            choices.append(Choice(site, along(basis, felt[site]), heads, *bits))
    return choices


def is_cache(choice: Choice) -> bool:
    """Whether a site is one of keys or values, which have a budget of their own."""
    return choice.site.name in ("key", "value")


def along(basis: Tensor, weighted: Tensor) -> Tensor:
    """Energies of weighted moments [G, D, D] along the directions of a basis [G or 1, D, D], last direction first; summed over G."""
    each = basis.expand(len(weighted), -1, -1)
    return torch.einsum("gij,gik,gkj->j", each, weighted, each).flip(0)


def along_blocks(basis: Tensor, weighted: Tensor) -> Tensor:
    """Weighted energies [G·D] of channels along the directions of blocks of them [G, D, D]."""
    return torch.einsum("gcd,gc->gd", basis.square(), weighted.unflatten(0, basis.shape[:2])).flatten()


def rows(gm: GraphModule, linears: Iterable[Node]) -> int:
    """Rows of the weights of linears, together, those of all experts."""
    return sum(math.prod(values.shape(Linear.require(n).weight)[:-1]) for n in linears)


def describe(found: dict[Choice, Split], plan: ColumnPlan, averages: tuple[float | None, float | None]) -> str:
    """The table: what each site got, and its predicted error against that of equal shares; averages: of linears and of the cache."""
    lines = []
    for choice, split in found.items():
        bits = choice.main_bits + choice.price(split) / choice.cost / choice.width
        change = 100 * (choice.error(split) / choice.error(choice.equal(plan, averages[is_cache(choice)])) - 1)
        weight, kept = float(choice.energies.sum()), float(choice.energies[: split.high].sum())
        high, low = (
            f"{n} at {b}" if n else "0" for n, b in ((split.high, split.high_bits), (split.low, split.low_bits))
        )  # fmt: skip
        part = number(100 * kept / weight, 1)
        lines.append(
            (str(choice.site), str(choice.width), high, low, number(bits, 2), number(weight, 3), part, f"{change:+.1f}")
        )  # fmt: skip
    return table(HEADER, lines)
