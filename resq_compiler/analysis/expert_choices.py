"""A budget of bits of experts' weights, spent where predictions feel it.

With the bits b of its two parts, and the shares e of what its linears read in these, an expert moves predictions by about

    felt · Σ over its linears (e_main 4^-b_main + e_high 4^-b_high)

felt: half the mean square of gradients times the energy of what its down projection reads, summed over its own tokens (sensitivity.py). An
error of gate or up is one of what down reads, of the same relative size, so all three count by that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from resq_compiler.analysis.expert_bits import BlockBits, ExpertBits
from resq_compiler.analysis.splits import Row, climb
from resq_compiler.util.text import number, table

WIDEST = 8
HEADER = (
    "experts of block",
    "experts",
    "felt: least",
    "median",
    "most",
    "main bits",
    "high bits",
    "average",
    "error against equal bits %",
)

Pair = tuple[int, int]
"""Bits of the weights in main columns and in high ones."""


@dataclass(frozen=True, eq=False)
class ExpertChoice:
    """An expert whose bits are free.

    felt: by how much an error as large as what it reads moves predictions. shares: of what its linears read, in main and in high columns.
    sizes: weights that read these.
    """

    block: int
    felt: float
    shares: tuple[float, float]
    sizes: tuple[int, int]

    def error(self, bits: Pair) -> float:
        """Movement of the predictions, up to a factor that all experts share."""
        return self.felt * sum(share * 4.0**-b for share, b in zip(self.shares, bits, strict=True))

    def price(self, bits: Pair) -> float:
        """Bits of its weights."""
        return sum(size * b for size, b in zip(self.sizes, bits, strict=True))


@functools.cache
def pairs(least: int, high: int | None) -> list[Pair]:
    """All bits that an expert may have; high: those of high columns where there are none."""
    if high is not None:
        return [(main, high) for main in range(least, WIDEST + 1)]
    return [(main, b) for main in range(least, WIDEST + 1) for b in range(main, WIDEST + 1)]


def spend_on_experts(choices: list[ExpertChoice], equal: Pair, least: int) -> dict[ExpertChoice, Pair]:
    """The bits of every expert, which together take no more than `equal` bits for all of them; least: of any."""
    options: dict[ExpertChoice, list[Row[Pair]]] = {}
    for c in choices:
        menu = pairs(least, None if c.sizes[1] else equal[1])
        options[c] = sorted(
            (Row(c.price(p), c.error(p), i, p) for i, p in enumerate(menu)), key=lambda row: (row.price, row.error, row.index)
        )  # fmt: skip
    left = sum(c.price(equal) for c in choices) - sum(rows[0].price for rows in options.values())
    return {c: row.split for c, row in climb(options, left).items()}


def describe(found: dict[ExpertChoice, Pair], equal: Pair) -> list[str]:
    """A table of blocks, and the bits of every expert below it."""
    blocks: dict[int, list[ExpertChoice]] = {}
    for choice in found:
        blocks.setdefault(choice.block, []).append(choice)
    lines = []
    for block, choices in blocks.items():
        felt, bits = sorted(c.felt for c in choices), [found[c] for c in choices]
        average = sum(c.price(found[c]) for c in choices) / sum(sum(c.sizes) for c in choices)
        change = 100 * (sum(c.error(found[c]) for c in choices) / sum(c.error(equal) for c in choices) - 1)
        high = _range([b for _, b in bits]) if choices[0].sizes[1] else "none"
        lines.append(
            (str(block), str(len(choices)), *(number(felt[i], 3) for i in (0, len(felt) // 2, -1)), _range([b for b, _ in bits]), high,
             number(average, 2), f"{change:+.1f}")
        )  # fmt: skip
    return [
        *table(HEADER, lines).splitlines(),
        *(f"bits of the experts of block {item}" for item in as_bits(found).items),
    ]


def _range(bits: list[int]) -> str:
    return f"{min(bits)} to {max(bits)}" if min(bits) < max(bits) else str(bits[0])


def as_bits(found: dict[ExpertChoice, Pair]) -> ExpertBits:
    """What was found, to be said."""
    blocks: dict[int, list[tuple[Pair, bool]]] = {}
    for choice, pair in found.items():
        blocks.setdefault(choice.block, []).append((pair, choice.sizes[1] > 0))
    return ExpertBits(
        tuple(
            BlockBits(block, tuple(main for (main, _), _ in each), tuple(high for (_, high), split in each if split))
            for block, each in blocks.items()
        )
    )
