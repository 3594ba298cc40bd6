"""Spend a budget of bits on columns where it lowers the error of predictions most.

With energies e_1 >= e_2 >= ... of a site's directions, and b_i bits for direction i, the relative error of a quantized value is about

    sum_i 4^-b_i e_i / sum e

and counts by how far it moves the model's predictions (sensitivity.py). Sites go from split to split, each time the one that lowers the
sum most for what it costs: bits of the weights that read the columns, or bits of the cache.

Source: reverse water-filling on the eigenvalues (as in rate-distortion theory), restricted to widths that kernels have.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.site_shares import MOST_LOW, SiteShare
from resq_compiler.analysis.sites import Site
from resq_compiler.errors import PassError

Option = TypeVar("Option")
Chooser = TypeVar("Chooser")

WIDTHS = (5, 6, 7, 8)  # of the high part, where its bits are free


@dataclass(frozen=True)
class Split:
    """Columns above the main bits and below them, and the bits of each."""

    high: int
    high_bits: int
    low: int = 0
    low_bits: int = 2

    def share(self, site: Site, width: int, common_bits: int) -> SiteShare:
        """As shares of a width; bits of the high part are said where they are not those of all sites."""
        high_bits = self.high_bits if self.high and self.high_bits != common_bits else None
        low, low_bits = (self.low / width, self.low_bits) if self.low else (None, None)
        return SiteShare(site, self.high / width, high_bits, low, low_bits)


@dataclass(frozen=True)
class Menu:
    """What splits there are.

    widths: the high part may have 5 to 8 bits, and columns may go down to low_bits. rank_multiple: of every step. steps: of a site's
    columns, one step is width / steps of them; down_steps: at down projections, whose parts are Hadamard transforms: multiples of
    width / 16 have orders of small factors.
    """

    widths: bool = False
    low_bits: int = 2
    rank_multiple: int = 1
    steps: int = 32
    down_steps: int = 16

    def step(self, choice: Choice) -> int:
        """Columns given at a time."""
        least = choice.width // (self.down_steps if choice.site.name == "down" else self.steps)
        return max(self.rank_multiple, least // self.rank_multiple * self.rank_multiple)

    def splits(self, choice: Choice) -> list[Split]:
        """All that a site may become."""
        step, half = self.step(choice), choice.width // 2
        counts = range(step, half + 1, step)
        widths = [w for w in WIDTHS if w > choice.main_bits] if self.widths else [choice.high_bits]
        can_sink = self.widths and self.low_bits < choice.main_bits and choice.site.name not in ("key", "value")
        lows = [0, *(n for n in counts if n <= choice.width // MOST_LOW)] if can_sink else [0]
        pairs = [(0, choice.high_bits), *itertools.product(counts, widths)]
        return [Split(high, bits, low, self.low_bits) for (high, bits), low in itertools.product(pairs, lows)]


@dataclass(frozen=True, eq=False)
class Choice:
    """A site whose split is free.

    energies: of its directions, those that get high bits first; each weighted by how far errors move predictions, in nats a token.
    cost: of a bit of a column, the weights that read it, or the cache entries. main_bits, high_bits: what equal shares have.
    """

    site: Site
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

    def extra_bits(self, plan: ColumnPlan, average: float | None) -> float:
        """The budget of a column beyond the main bits: of an average, or of equal shares."""
        if average is None:
            return plan.common.high * (self.high_bits - self.main_bits)
        return average - self.main_bits

    def equal(self, plan: ColumnPlan, average: float | None) -> Split:
        """The split if all sites have the same share of high columns."""
        share = self.extra_bits(plan, average) / (self.high_bits - self.main_bits)
        return Split(max(0, round(self.width * share)), self.high_bits)


@dataclass(frozen=True)
class Row(Generic[Option]):
    """What a choice may become, with its price and error."""

    price: float
    error: float
    index: int
    split: Option


def spend(choices: list[Choice], extra: float, menu: Menu) -> dict[Choice, Split]:
    """The split of every site, from the cheapest on (`climb`). extra: bits a column beyond the main ones, on average.

    Raises PassError: not even the cheapest splits fit.
    """
    rows = {c: [Row(c.price(s), c.error(s), i, s) for i, s in enumerate(menu.splits(c))] for c in choices}
    options = {c: sorted(found, key=lambda row: (row.price, row.error, row.index)) for c, found in rows.items()}
    left = sum(c.cost * c.width for c in choices) * extra - sum(each[0].price for each in options.values())
    if left < 0:
        raise PassError(
            f"a budget of {choices[0].main_bits + extra:.2f} average bits is less than the {choices[0].main_bits} main bits take; raise "
            "it, lower weight_bits, or say allocation=widths, which may also take bits away"
        )
    return {choice: row.split for choice, row in climb(options, left).items()}


def climb(options: Mapping[Chooser, Sequence[Row[Option]]], left: float) -> dict[Chooser, Row[Option]]:
    """The row of every choice: from the first ones on, always the change that lowers the error most for its price, while `left` lasts.

    Among the rows of a choice that walks the lower convex hull of error over price, so that the result is optimal up to the last change
    that fits. Rows are sorted by price.
    """
    found = {c: each[0] for c, each in options.items()}
    order = itertools.count()
    waiting: list[tuple[float, int, Chooser, Row[Option]]] = []

    def offer(choice: Chooser) -> None:
        now = found[choice]
        better = [r for r in options[choice] if r.error < now.error and now.price < r.price <= now.price + left]
        if better:
            row = min(better, key=lambda r: (r.error - now.error) / (r.price - now.price))
            heapq.heappush(waiting, ((row.error - now.error) / (row.price - now.price), next(order), choice, row))

    for choice in options:
        offer(choice)
    while waiting:
        _, _, choice, row = heapq.heappop(waiting)
        if row.price - found[choice].price <= left:
            left -= row.price - found[choice].price
            found[choice] = row
        offer(choice)
    return found
