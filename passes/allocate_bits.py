"""allocate-bits: spend a budget of bits where spectra and sensitivities say it pays. Changes nothing but the shares of sites.

Each site may give some of its columns more bits than the main ones, or fewer. With energies e_1 >= e_2 >= ... of its directions, and
b_i bits for direction i, the relative error of a quantized value is about

    sum_i 4^-b_i e_i / sum e

and counts by how far it moves the model's predictions (sensitivity.py). Sites go from split to split, each time the one that lowers the
sum most for what it costs: bits of the weights that read the columns, or bits of the cache. Linears and cache have a budget each.
`allocation` says what splits there are: "sensitivity", shares of columns at `high_bits`; "widths", also 5 to 8 bits for them, and shares
of columns at `low_bits`, so that the paper's 8/4/2 and 6/4/2 are among them. The budget is `average_bits` or `model_megabytes`, or what
equal shares of `high_fraction` cost, and then the shares stay equal where the forecast gains less than a tenth. The result replaces
`site_fractions`; the table is in this stage's text in a dump.

Source: reverse water-filling on the eigenvalues (as in rate-distortion theory), restricted to widths that kernels have.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis import sensitivity, size_budget
from resq_compiler.analysis.columns import SPLIT_DOWN
from resq_compiler.calibration.bases import block_basis, head_moments, residual_moment
from resq_compiler.calibration.moments import Moments, calibrate
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools
from resq_compiler.numerics.basis import principal_basis
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.util.text import number, table

STEPS = 32  # of a site's columns: one step gives width / STEPS of them other bits
WORTH = (
    0.1  # of the forecast: what it lowers by less may be the forecast's own error (SmolLM2: docs/results/ablation.md)
)
DOWN_STEPS = (
    16  # parts of down projections are Hadamard transforms: multiples of width / 16 have orders of small factors
)
WIDTHS = (5, 6, 7, 8)  # of the high part, with allocation="widths"
MOST_LOW = (
    4  # at most 1 / MOST_LOW of a site's columns are below the main bits, as CompileConfig.least_average counts on
)


@dataclass(frozen=True)
class Split:
    """Columns above the main bits and below them, and the bits of each."""

    high: int
    high_bits: int
    low: int = 0
    low_bits: int = 2

    def said(self, width: int, config: CompileConfig) -> str:
        """In the words of `site_fractions`, after the equals sign."""
        high = f"{self.high}/{width}" + (
            f"@{self.high_bits}" if self.high and self.high_bits != config.high_bits else ""
        )
        return high + (f":{self.low}/{width}@{self.low_bits}" if self.low else "")


@dataclass(frozen=True, eq=False)
class Choice:
    """A site whose split is free.

    energies: of its directions, those that get high bits first; each weighted by how far errors move predictions, in nats a token.
    cost: of a bit of a column, the weights that read it, or the cache entries. main_bits, high_bits: what equal shares have.
    """

    site: str
    energies: Tensor
    cost: float
    main_bits: int
    high_bits: int

    @property
    def width(self) -> int:
        return len(self.energies)

    @functools.cached_property
    def _sums(self) -> list[float]:
        return [0.0, *self.energies.cumsum(0).tolist()]

    def error(self, split: Split) -> float:
        """Movement of the predictions, up to a factor that all sites share."""
        sums, middle = self._sums, self.width - split.low
        high, main, low = sums[split.high], sums[middle] - sums[split.high], sums[-1] - sums[middle]
        return high * 4.0**-split.high_bits + main * 4.0**-self.main_bits + low * 4.0**-split.low_bits

    def price(self, split: Split) -> float:
        """Bits beyond the main ones, times cost; below zero where low columns save more than high ones take."""
        return self.cost * (
            split.high * (split.high_bits - self.main_bits) - split.low * (self.main_bits - split.low_bits)
        )

    def splits(self, config: CompileConfig) -> list[Split]:
        """All that the site may become."""
        step_, half = step(self, config), self.width // 2
        counts = range(step_, half + 1, step_)
        wide = config.allocation == "widths"
        widths = [w for w in WIDTHS if w > self.main_bits] if wide else [self.high_bits]
        can_sink = wide and config.low_bits < self.main_bits and not self.site.startswith(("key", "value"))
        lows = [0, *(n for n in counts if n <= self.width // MOST_LOW)] if can_sink else [0]
        pairs = [(0, self.high_bits), *itertools.product(counts, widths)]
        return [Split(high, bits, low, config.low_bits) for (high, bits), low in itertools.product(pairs, lows)]


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Set `site_fractions`. Raises PassError: the budget is out of reach."""

    name: ClassVar[str] = "allocate-bits"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        config = ctx.config
        if not config.allocates:
            return 0
        settled = {"allocation": "equal", "average_bits": None, "model_megabytes": None}
        asked = config.average_bits is not None or config.model_megabytes is not None
        if min(config.weight_bits, config.activation_bits, config.kv_bits) >= config.high_bits or (
            not asked and config.high_fraction == 0
        ):
            ctx.config = dataclasses.replace(config, **settled)
            ctx.lines.append("nothing to share out: all columns have the same bits")
            return 0
        ctx.moments = ctx.moments or calibrate(gm, ctx)
        felt = sensitivity.measure(gm, ctx)
        averages = (size_budget.average_bits(gm, ctx), config.average_bits)
        budgets = [(linear_choices(gm, ctx, felt), averages[0]), (cache_choices(gm, ctx, felt), averages[1])]
        found: dict[Choice, Split] = {}
        before = 0.0
        for choices, average in budgets:
            if choices:
                found |= spend(choices, extra_bits(choices[0], config, average), config)
                before += sum(c.error(equal(c, config, average)) for c in choices)
        fall = 1 - sum(c.error(s) for c, s in found.items()) / before if before else 0.0
        worth = asked or fall >= WORTH
        shares = ",".join(f"{c.site}={s.said(c.width, config)}" for c, s in found.items()) if worth else ""
        ctx.config = dataclasses.replace(config, site_fractions=shares, **settled)
        result = (
            ""
            if worth
            else f": below {100 * WORTH:g} %, so the shares stay equal, and the table says what they would have been"
        )
        ctx.lines += [f"forecast of the error: {100 * fall:.1f} % lower than with equal shares{result}"]
        ctx.lines += describe(found, config, averages).splitlines()
        return len(found) if worth else 0


def linear_choices(gm: GraphModule, ctx: PassContext, felt: dict[str, Tensor]) -> list[Choice]:
    """Sites of linears, with energies in the order of their bases."""
    config, blocks, moments = ctx.config, ctx.topology.blocks, ctx.moments
    bits = (min(config.weight_bits, config.activation_bits), config.high_bits)
    if bits[0] >= bits[1]:
        return []
    stream = residual_moment(gm, moments, ctx.topology, config)[None]
    attention = [n for b in blocks for n in (b.attention.q, b.attention.k, b.attention.v)]
    mlp = [n for b in blocks for f in b.feed_forwards for n in (*f.gates, *f.ups)]
    choices = [
        Choice(site, along(stream, felt[site]), sum(out_features(gm, n) for n in linears), *bits)
        for site, linears in (("attention", attention), ("mlp", mlp))
    ]
    for block in blocks:
        a, i = block.attention, block.index
        values, _ = head_moments(gm, moments, block, config)
        energies = along(values.repeat_interleave(a.num_heads // a.num_kv_heads, 0), felt[f"o.{i}"])
        choices.append(Choice(f"o.{i}", energies, out_features(gm, a.o) * a.num_heads, *bits))
        if config.down_proj in SPLIT_DOWN:
            downs = [f.down for f in block.feed_forwards]
            energies = down_energies(moments, downs, felt[f"down.{i}"].sum(0), config.down_proj)
            choices.append(Choice(f"down.{i}", energies, sum(out_features(gm, d) for d in downs), *bits))
    return choices


def down_energies(moments: Moments, downs: list[Node], weighted: Tensor, kind: str) -> Tensor:
    """Weighted energies [width] of a down projection's channels in the order in which they get high bits.

    With block-pca of its directions, as if errors of channels did not add up: sensitivities have no more than a diagonal there.
    """
    if kind == "block-pca":
        basis, order = block_basis(torch.stack([moments.down_blocks[d].mean() for d in downs]).sum(0))
        along_blocks = torch.einsum("gcd,gc->gd", basis.square(), weighted.unflatten(0, basis.shape[:2]))
        return along_blocks.flatten()[order].flip(0)
    size = moments.down_energy if kind == "energy-split" else moments.down_peak
    return weighted[torch.stack([size[d] for d in downs]).sum(0).argsort(descending=True, stable=True)]


def cache_choices(gm: GraphModule, ctx: PassContext, felt: dict[str, Tensor]) -> list[Choice]:
    """Keys and values of every block."""
    config, bits = ctx.config, (ctx.config.kv_bits, ctx.config.high_bits)
    choices = []
    for block in ctx.topology.blocks if bits[0] < bits[1] else ():
        i, heads = block.index, block.attention.num_kv_heads
        values, keys = head_moments(gm, ctx.moments, block, config)
        choices.append(Choice(f"key.{i}", along(keys, felt[f"key.{i}"]), heads, *bits))
        choices.append(Choice(f"value.{i}", along(values, felt[f"value.{i}"]), heads, *bits))
    return choices


def along(moment: Tensor, weighted: Tensor) -> Tensor:
    """Energies of weighted moments [G, D, D] along the eigenvectors of a moment [G or 1, D, D], largest eigenvalue first; summed over G."""
    basis, _ = principal_basis(moment)
    return torch.einsum(
        "gij,gik,gkj->j", basis.expand(len(weighted), -1, -1), weighted, basis.expand(len(weighted), -1, -1)
    ).flip(0)


def spend(choices: list[Choice], extra: float, config: CompileConfig) -> dict[Choice, Split]:
    """The split of every site: from the cheapest on, always the change that lowers the error most for its price.

    extra: bits a column beyond the main ones, on average. Among a site's splits that walks the lower convex hull of error over price, so
    that the result is optimal up to the last change that fits.
    """
    options = {c: sorted((c.price(s), c.error(s), i, s) for i, s in enumerate(c.splits(config))) for c in choices}
    found = {c: rows[0] for c, rows in options.items()}
    left = sum(c.cost * c.width for c in choices) * extra - sum(row[0] for row in found.values())
    if left < 0:
        raise PassError(
            f"a budget of {choices[0].main_bits + extra:.2f} average bits is less than the {choices[0].main_bits} main bits take; raise "
            "it, lower weight_bits, or say allocation=widths, which may also take bits away"
        )
    order = itertools.count()
    waiting: list[tuple[float, int, Choice, tuple]] = []

    def offer(choice: Choice) -> None:
        price, error, *_ = found[choice]
        better = [row for row in options[choice] if row[1] < error and price < row[0] <= price + left]
        if better:
            row = min(better, key=lambda row: (row[1] - error) / (row[0] - price))
            heapq.heappush(waiting, ((row[1] - error) / (row[0] - price), next(order), choice, row))

    for choice in choices:
        offer(choice)
    while waiting:
        _, _, choice, row = heapq.heappop(waiting)
        if row[0] - found[choice][0] <= left:
            left -= row[0] - found[choice][0]
            found[choice] = row
        offer(choice)
    return {choice: row[3] for choice, row in found.items()}


def step(choice: Choice, config: CompileConfig) -> int:
    """Columns given at a time."""
    least = choice.width // (DOWN_STEPS if choice.site.startswith("down") else STEPS)
    return max(config.rank_multiple, least // config.rank_multiple * config.rank_multiple)


def extra_bits(choice: Choice, config: CompileConfig, average: float | None) -> float:
    """The budget of a column beyond the main bits: of an average, or of equal shares."""
    return (
        config.high_fraction * (choice.high_bits - choice.main_bits) if average is None else average - choice.main_bits
    )


def equal(choice: Choice, config: CompileConfig, average: float | None) -> Split:
    """The split of a site if all have the same share of high columns."""
    share = extra_bits(choice, config, average) / (choice.high_bits - choice.main_bits)
    return Split(max(0, round(choice.width * share)), choice.high_bits)


def out_features(gm: GraphModule, linear: object) -> int:
    """Rows of a linear's weight."""
    return int(graph_tools.get_tensor(gm, linear.args[1]).shape[0])  # type: ignore[attr-defined]


def describe(found: dict[Choice, Split], config: CompileConfig, averages: tuple[float | None, float | None]) -> str:
    """The table: what each site got, and its predicted error against that of equal shares; averages: of linears and of the cache."""
    rows = []
    for choice, split in found.items():
        bits = choice.main_bits + choice.price(split) / choice.cost / choice.width
        plain = equal(choice, config, averages[choice.site.startswith(("key", "value"))])
        change = 100 * (choice.error(split) / choice.error(plain) - 1)
        weight, kept = float(choice.energies.sum()), float(choice.energies[: split.high].sum())
        high, low = (
            f"{n} at {b}" if n else "0" for n, b in ((split.high, split.high_bits), (split.low, split.low_bits))
        )
        part = number(100 * kept / weight, 1)
        rows.append(
            (choice.site, str(choice.width), high, low, number(bits, 2), number(weight, 3), part, f"{change:+.1f}")
        )
    header = (
        "site",
        "columns",
        "high",
        "low",
        "bits",
        "sensitivity",
        "of it in high %",
        "error against equal shares %",
    )
    return table(header, rows)
