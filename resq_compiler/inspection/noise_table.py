"""Noise of quantizers as a table: of each, or of equal places in all blocks together."""

from __future__ import annotations

from dataclasses import dataclass

from resq_compiler.inspection.noise import QuantizerNoise
from resq_compiler.util.text import number, table


@dataclass(frozen=True)
class Place:
    """Quantizers of the same place in every block: how many, mean and lowest SQNR, and where it is lowest."""

    name: str
    bits: int
    sites: int
    mean_db: float
    lowest_db: float
    lowest_at: str


def places(sites: list[QuantizerNoise]) -> list[Place]:
    """Quantizers by place and bits, in the order in which they run first."""
    groups: dict[tuple[str, int], list[QuantizerNoise]] = {}
    for site in sites:
        name = site.name.split(".", 2)[2] if site.name.startswith("blocks.") else site.name
        groups.setdefault((name, site.bits), []).append(site)
    found = []
    for (name, bits), members in groups.items():
        worst = min(members, key=lambda s: s.sqnr_db)
        mean = sum(s.sqnr_db for s in members) / len(members)
        found.append(Place(name, bits, len(members), mean, worst.sqnr_db, worst.name))
    return found


def noise_table(sites: list[QuantizerNoise], every: bool = False) -> str:
    """Signal to quantization noise by place, or of every quantizer."""
    if every:
        return table(("quantizer", "bits", "SQNR dB"), [(s.name, str(s.bits), number(s.sqnr_db, 1)) for s in sites])
    rows = [
        (p.name, str(p.bits), str(p.sites), number(p.mean_db, 1), number(p.lowest_db, 1), p.lowest_at)
        for p in places(sites)
    ]
    return table(("quantizers", "bits", "sites", "mean dB", "lowest dB", "at"), rows)
