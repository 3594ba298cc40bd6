"""allocate-bits: spend a budget of average bits where the measured spectra say it pays. Changes nothing but the fractions.

Each site may give some of its columns the high bits. With b main and h high bits, energies e_1 >= e_2 >= ... of its directions, and r of
them high, the relative error of a quantized value is about

    4^-b sum_{i > r} e_i / sum e   +   4^-h sum_{i <= r} e_i / sum e

and counts as many times as there are weights (or cache entries) that meet it. Columns go, a few at a time, to the site where they lower
the sum most for what they cost: weights of the linears that read a column, or bits of the cache. Linears and cache have a budget each.
The result replaces `site_fractions`; the table is in this stage's text in a dump. Needs `average_bits`.

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

from resq_compiler import calibration, graph_tools
from resq_compiler.config import CompileConfig
from resq_compiler.pipeline import Pass, PassContext
from resq_compiler.tables import number, table
from resq_compiler.topology import Block

STEPS = 32  # of a site's columns: one step gives width / STEPS of them the high bits


@dataclass(frozen=True, eq=False)
class Choice:
    """A site whose share of high columns is free: energies descending, summing to 1; cost: of a column, the weights that read it."""

    site: str
    energies: Tensor
    cost: float
    main_bits: int
    high_bits: int

    def error(self, high: int) -> float:
        """Relative error with `high` columns at the high bits, times the weights of the site."""
        kept = float(self.energies[:high].sum())
        return self.cost * len(self.energies) * ((1 - kept) * 4.0**-self.main_bits + kept * 4.0**-self.high_bits)


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Set `site_fractions` from `average_bits`."""

    name: ClassVar[str] = "allocate-bits"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        config = ctx.config
        if config.average_bits is None:
            return 0
        ctx.moments = ctx.moments or calibration.calibrate(gm, ctx)
        budgets = [linear_choices(gm, ctx), cache_choices(ctx)]
        found = {c: n for choices in budgets if choices for c, n in spend(choices, config).items()}
        shares = ",".join(f"{c.site}={n}/{len(c.energies)}" for c, n in found.items())
        ctx.config = dataclasses.replace(config, site_fractions=shares, average_bits=None)
        ctx.lines += describe(found, config).splitlines()
        return len(found)


def linear_choices(gm: GraphModule, ctx: PassContext) -> list[Choice]:
    """Sites of linears: U_A is shared, so attention and feed-forward inputs have one share each for all blocks."""
    config, blocks, moments = ctx.config, ctx.topology.blocks, ctx.moments
    stream = spectrum(moments.residual.mean())
    bits = (min(config.weight_bits, config.activation_bits), config.high_bits)
    if bits[0] >= bits[1]:
        return []
    attention = [n for b in blocks for n in (b.attention.q, b.attention.k, b.attention.v)]
    mlp = [n for b in blocks for f in b.feed_forwards for n in (*f.gates, *f.ups)]
    choices = [
        Choice(site, stream, sum(out_features(gm, n) for n in linears), *bits)
        for site, linears in (("attention", attention), ("mlp", mlp))
    ]
    for block in blocks:
        a = block.attention
        energies = value_spectrum(ctx, block)
        choices.append(Choice(f"o.{block.index}", energies, out_features(gm, a.o) * a.num_heads, *bits))
        if config.down_proj == "energy-split":
            downs = [f.down for f in block.feed_forwards]
            energy = torch.stack([normalized(moments.down_energy[d]) for d in downs]).mean(0)
            cost = sum(out_features(gm, d) for d in downs)
            choices.append(Choice(f"down.{block.index}", energy, cost, *bits))
    return choices


def cache_choices(ctx: PassContext) -> list[Choice]:
    """Keys and values of every block."""
    config, bits = ctx.config, (ctx.config.kv_bits, ctx.config.high_bits)
    choices = []
    for block in ctx.topology.blocks if bits[0] < bits[1] else ():
        heads = block.attention.num_kv_heads
        keys = ctx.moments.key[block.index].mean()
        keys = keys if config.key_basis == "head" else keys.mean(0, keepdim=True)
        energies = torch.stack([spectrum(m) for m in keys]).mean(0)
        choices.append(Choice(f"key.{block.index}", energies, heads, *bits))
        choices.append(Choice(f"value.{block.index}", value_spectrum(ctx, block), heads, *bits))
    return choices


def spend(choices: list[Choice], config: CompileConfig) -> dict[Choice, int]:
    """High columns of every site: greedily the largest fall of the error for its cost, which is optimal up to the last step.

    (The fall gets smaller with every column, since energies are sorted.)
    """
    assert config.average_bits is not None
    whole = sum(c.cost * len(c.energies) for c in choices)
    main, high = choices[0].main_bits, choices[0].high_bits
    left = whole * (config.average_bits - main) / (high - main)
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
    return max(config.rank_multiple, len(choice.energies) // STEPS // config.rank_multiple * config.rank_multiple)


def out_features(gm: GraphModule, linear: object) -> int:
    """Rows of a linear's weight."""
    return int(graph_tools.get_tensor(gm, linear.args[1]).shape[0])  # type: ignore[attr-defined]


def value_spectrum(ctx: PassContext, block: Block) -> Tensor:
    """Spectra of the value heads, averaged."""
    return torch.stack([spectrum(m) for m in ctx.moments.value[block.index].mean()]).mean(0)


def spectrum(moment: Tensor) -> Tensor:
    """Eigenvalues of a second moment as shares, descending."""
    return normalized(torch.linalg.eigvalsh(moment))


def normalized(energy: Tensor) -> Tensor:
    """Energies as shares, descending."""
    energy = energy.double().clamp_min(0).sort(descending=True).values
    return energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)


def describe(found: dict[Choice, int], config: CompileConfig) -> str:
    """The table: what each site got, and its predicted error against that of equal shares."""
    assert config.average_bits is not None
    rows = []
    for choice, high in found.items():
        width, span = len(choice.energies), choice.high_bits - choice.main_bits
        equal = round(width * (config.average_bits - choice.main_bits) / span)
        bits = choice.main_bits + span * high / width
        change = 100 * (choice.error(high) / choice.error(equal) - 1)
        energy = 100 * float(choice.energies[:high].sum())
        rows.append((choice.site, str(width), str(high), number(bits, 2), number(energy, 1), f"{change:+.1f}"))
    header = ("site", "columns", "high", "bits", "energy in them %", "error against equal shares %")
    return table(header, rows)
