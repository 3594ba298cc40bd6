"""Bits of the weights of single experts of a mixture, and their text form.

    BLOCK=MAIN[/HIGH]        0=44352224/88786668        of experts 0, 1, 2, ... in main columns, and in high ones

What experts read has the same bits for all of them, because the codes of a value are made once; weights of an expert are its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from resq_compiler.errors import ConfigError

_ITEM = re.compile(r"(?P<block>\d+)=(?P<main>[2-8]+)(/(?P<high>[2-8]+))?")


@dataclass(frozen=True)
class BlockBits:
    """Of the experts of a block: bits of each in main columns, and in high ones; high is empty where there are none."""

    block: int
    main: tuple[int, ...]
    high: tuple[int, ...] = ()

    def __str__(self) -> str:
        main, high = ("".join(map(str, bits)) for bits in (self.main, self.high))
        return f"{self.block}={main}" + (f"/{high}" if high else "")


@dataclass(frozen=True)
class ExpertBits:
    """What is said about experts, by block; the experts of other blocks have the bits of their columns."""

    items: tuple[BlockBits, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ExpertBits:
        """Read the text form. Raises ConfigError naming the item."""
        found: dict[int, BlockBits] = {}
        for item in filter(None, text.replace(" ", "").split(",")):
            match = _ITEM.fullmatch(item)
            bits = match and BlockBits(int(match["block"]), _digits(match["main"]), _digits(match["high"] or ""))
            if not bits or len(bits.high) not in (0, len(bits.main)) or bits.block in found:
                raise ConfigError(
                    "option expert_bits: expected BLOCK=MAIN or BLOCK=MAIN/HIGH, once for each block, with a digit from 2 to 8 for every "
                    f"expert, such as 0=4432/8866, separated by commas; got {item!r}"
                )
            found[bits.block] = bits
        return cls(tuple(found.values()))

    def find(self, block: int | None) -> BlockBits | None:
        """What is said about the experts of a block."""
        return next((item for item in self.items if item.block == block), None)

    def __str__(self) -> str:
        return ",".join(map(str, self.items))


def _digits(text: str) -> tuple[int, ...]:
    return tuple(map(int, text))
