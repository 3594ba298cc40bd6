"""Sites: the places of a model that have statistics, shares of columns and sensitivities of their own."""

from __future__ import annotations

from dataclasses import dataclass

SITES = ("attention", "mlp", "o", "down", "key", "value", "latent", "qlatent")
"""Where shares may differ: inputs of q/k/v, gate/up, o and down, and cached keys and values; of latent attention the compressed vectors,
that of keys and values (latent), which is cached, and that of queries (qlatent)."""

SITES_OF_BLOCKS = SITES[2:]
"""Those that may differ between blocks too, as in down.3; the others share U_A."""


@dataclass(frozen=True)
class Site:
    """A place of the model: of all blocks together, or of one; index: which of several of the kind in a block."""

    name: str
    block: int | None = None
    index: int = 0

    def __str__(self) -> str:
        block = "" if self.block is None else f".{self.block}"
        return f"{self.name}{block}" + (f".{self.index}" if self.index else "")
