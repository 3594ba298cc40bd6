"""allocate-bits: spend a budget of average bits where spectra and sensitivities say it pays. Changes nothing but the fractions.

Each site may give some of its columns the high bits. With b main and h high bits, energies e_1 >= e_2 >= ... of its directions, and r of
them high, the relative error of a quantized value is about

    4^-b sum_{i > r} e_i / sum e   +   4^-h sum_{i <= r} e_i / sum e

and counts by how far it moves the model's predictions (sensitivity.py). Columns go, a few at a time, to the site where they lower the sum
most for what they cost: weights of the linears that read a column, or bits of the cache. Linears and cache have a budget each.
The budget is `average_bits`, or what equal shares of `high_fraction` cost, and then the shares stay equal where the forecast gains less
than a tenth. The result replaces `site_fractions`; the table is in this stage's text in a dump.

Source: reverse water-filling on the eigenvalues (as in rate-distortion theory), restricted to two widths.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler import calibration, graph_tools, sensitivity
from resq_compiler.config import CompileConfig
from resq_compiler.numerics.basis import principal_basis
from resq_compiler.pipeline import Pass, PassContext
from resq_compiler.tables import number, table

STEPS = 32  # of a site's columns: one step gives width / STEPS of them the high bits
WORTH = 0.1  # of the forecast: what it lowers by less may be the forecast's own error (SmolLM2: see README)
DOWN_STEPS = 16  # parts of down projections are Hadamard transforms: multiples of width / 16 have orders of small factors


@dataclass(frozen=True, eq=False)
class Choice:
    """A site whose share of high columns is free.

    energies: of its directions, those that get high bits first; each weighted by how far errors move predictions, in nats a token.
    cost: of a column, the weights that read it, or the cache entries.
    """

    site: str
    energies: Tensor
    cost: float
    main_bits: int
    high_bits: int

    def error(self, high: int) -> float:
        """Movement of the predictions with `high` columns at the high bits, up to a factor that all sites share."""
        return float(self.energies[high:].sum() * 4.0**-self.main_bits + self.energies[:high].sum() * 4.0**-self.high_bits)


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Set `site_fractions`."""

    name: ClassVar[str] = "allocate-bits"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        config = ctx.config
        if not config.allocates:
            return 0
        if min(config.weight_bits, config.activation_bits, config.kv_bits) >= config.high_bits or (
            config.average_bits is None and config.high_fraction == 0
        ):
            ctx.config = dataclasses.replace(config, allocation="equal", average_bits=None)
            ctx.lines.append("nothing to share out: all columns have the same bits")
            return 0
        ctx.moments = ctx.moments or calibration.calibrate(gm, ctx)
        felt = sensitivity.measure(gm, ctx)
        budgets = [linear_choices(gm, ctx, felt), cache_choices(gm, ctx, felt)]
        found = {c: n for choices in budgets if choices for c, n in spend(choices, config).items()}
        fall = forecast_fall(found, config)
        worth = config.average_bits is not None or fall >= WORTH
        shares = ",".join(f"{c.site}={n}/{len(c.energies)}" for c, n in found.items()) if worth else ""
        ctx.config = dataclasses.replace(config, site_fractions=shares, allocation="equal", average_bits=None)
        result = "" if worth else f": below {100 * WORTH:g} %, so the shares stay equal, and the table says what they would have been"
        ctx.lines += [f"forecast of the error: {100 * fall:.1f} % lower than with equal shares{result}"]
        ctx.lines += describe(found, config).splitlines()
        return len(found) if worth else 0


def linear_choices(gm: GraphModule, ctx: PassContext, felt: dict[str, Tensor]) -> list[Choice]:
    """Sites of linears, with energies in the order of their bases."""
    config, blocks, moments = ctx.config, ctx.topology.blocks, ctx.moments
    bits = (min(config.weight_bits, config.activation_bits), config.high_bits)
    if bits[0] >= bits[1]:
        return []
    stream = calibration.residual_moment(gm, moments, ctx.topology, config)[None]
    attention = [n for b in blocks for n in (b.attention.q, b.attention.k, b.attention.v)]
    mlp = [n for b in blocks for f in b.feed_forwards for n in (*f.gates, *f.ups)]
    choices = [
        Choice(site, along(stream, felt[site]), sum(out_features(gm, n) for n in linears), *bits)
        for site, linears in (("attention", attention), ("mlp", mlp))
    ]
    for block in blocks:
        a, i = block.attention, block.index
        values, _ = calibration.head_moments(gm, moments, block, config)
        energies = along(values.repeat_interleave(a.num_heads // a.num_kv_heads, 0), felt[f"o.{i}"])
        choices.append(Choice(f"o.{i}", energies, out_features(gm, a.o) * a.num_heads, *bits))
        if config.down_proj == "energy-split":
            downs = [f.down for f in block.feed_forwards]
            order = torch.stack([moments.down_energy[d] for d in downs]).sum(0).argsort(descending=True, stable=True)
            cost = sum(out_features(gm, d) for d in downs)
            choices.append(Choice(f"down.{i}", felt[f"down.{i}"].sum(0)[order], cost, *bits))
    return choices


def cache_choices(gm: GraphModule, ctx: PassContext, felt: dict[str, Tensor]) -> list[Choice]:
    """Keys and values of every block."""
    config, bits = ctx.config, (ctx.config.kv_bits, ctx.config.high_bits)
    choices = []
    for block in ctx.topology.blocks if bits[0] < bits[1] else ():
        i, heads = block.index, block.attention.num_kv_heads
        values, keys = calibration.head_moments(gm, ctx.moments, block, config)
        choices.append(Choice(f"key.{i}", along(keys, felt[f"key.{i}"]), heads, *bits))
        choices.append(Choice(f"value.{i}", along(values, felt[f"value.{i}"]), heads, *bits))
    return choices


def along(moment: Tensor, weighted: Tensor) -> Tensor:
    """Energies of weighted moments [G, D, D] along the eigenvectors of a moment [G or 1, D, D], largest eigenvalue first; summed over G."""
    basis, _ = principal_basis(moment)
    return torch.einsum("gij,gik,gkj->j", basis.expand(len(weighted), -1, -1), weighted, basis.expand(len(weighted), -1, -1)).flip(0)


def spend(choices: list[Choice], config: CompileConfig) -> dict[Choice, int]:
    """High columns of every site: greedily the largest fall of the error for its cost, which is optimal up to the last step.

    (The fall gets smaller with every step where weighted energies descend as those of the basis do, which they nearly do.)
    """
    left = sum(c.cost * len(c.energies) for c in choices) * share(choices[0], config)
    found = dict.fromkeys(choices, 0)
    order = itertools.count()

    def offer(choice: Choice) -> None:
        columns = found[choice] + step(choice, config)
        if columns <= len(choice.energies) // 2:
            gain = choice.error(found[choice]) - choice.error(columns)
            heapq.heappush(waiting, (-gain / (choice.cost * step(choice, config)), next(order), choice))

    waiting: list[tuple[float, int, Choice]] = []
    for choice in choices:
        offer(choice)
    while waiting:
        _, _, choice = heapq.heappop(waiting)
        price = choice.cost * step(choice, config)
        if price <= left:
            left -= price
            found[choice] += step(choice, config)
            offer(choice)
    return found


def step(choice: Choice, config: CompileConfig) -> int:
    """Columns given at a time."""
    least = len(choice.energies) // (DOWN_STEPS if choice.site.startswith("down") else STEPS)
    return max(config.rank_multiple, least // config.rank_multiple * config.rank_multiple)


def forecast_fall(found: dict[Choice, int], config: CompileConfig) -> float:
    """By how much the sum of all errors is below that of equal shares, relative."""
    before = sum(c.error(equal(c, config)) for c in found)
    return 1 - sum(c.error(n) for c, n in found.items()) / before if before else 0.0


def equal(choice: Choice, config: CompileConfig) -> int:
    """High columns of a site if all have the same share."""
    return round(len(choice.energies) * share(choice, config))


def share(choice: Choice, config: CompileConfig) -> float:
    """High columns that equal shares would give."""
    if config.average_bits is None:
        return config.high_fraction
    return (config.average_bits - choice.main_bits) / (choice.high_bits - choice.main_bits)


def out_features(gm: GraphModule, linear: object) -> int:
    """Rows of a linear's weight."""
    return int(graph_tools.get_tensor(gm, linear.args[1]).shape[0])  # type: ignore[attr-defined]


def describe(found: dict[Choice, int], config: CompileConfig) -> str:
    """The table: what each site got, and its predicted error against that of equal shares."""
    rows = []
    for choice, high in found.items():
        width, span = len(choice.energies), choice.high_bits - choice.main_bits
        bits = choice.main_bits + span * high / width
        change = 100 * (choice.error(high) / choice.error(equal(choice, config)) - 1)
        weight, kept = float(choice.energies.sum()), float(choice.energies[:high].sum())
        part = number(100 * kept / weight, 1)
        rows.append((choice.site, str(width), str(high), number(bits, 2), number(weight, 3), part, f"{change:+.1f}"))
    header = ("site", "columns", "high", "bits", "sensitivity", "of it in high %", "error against equal shares %")
    return table(header, rows)
