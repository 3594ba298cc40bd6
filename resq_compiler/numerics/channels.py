"""Sizes of channels over tokens: sums of squares, and largest magnitudes; and the tokens that have these."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resq_compiler.errors import DataError


class Energy:
    """Sum of squares of every channel over tokens: `total`, float64 [width], None before the first token.

    site: name used in messages.
    """

    def __init__(self, site: str) -> None:
        self.site = site
        self.total: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., width]. Raises DataError: x is not finite."""
        energy = x.flatten(0, -2).square().sum(0).double()
        if not bool(torch.isfinite(energy).all()):
            raise DataError(f"energy of {self.site}: not finite on the calibration data; check the model and the text")
        self.total = energy if self.total is None else energy + self.total

    @property
    def sizes(self) -> Tensor:
        """`total`. Raises DataError: no token was seen."""
        return seen(self.total, f"energy of {self.site}")

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return {"total": self.sizes}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned."""
        self.total = state["total"]

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what was seen of other tokens."""
        self.total = state["total"] if self.total is None else self.total + state["total"]


class Peak:
    """Largest magnitude of every channel over tokens: `largest` [width], None before the first token."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., width]. Raises DataError: x is not finite."""
        rows = x.flatten(0, -2)
        peak = torch.maximum(rows.amax(0), -rows.amin(0))
        if not bool(torch.isfinite(peak).all()):
            raise DataError(f"peaks of {self.site}: not finite on the calibration data; check the model and the text")
        self.largest = peak if self.largest is None else torch.maximum(peak, self.largest)

    @property
    def sizes(self) -> Tensor:
        """`largest`. Raises DataError: no token was seen."""
        return seen(self.largest, f"peaks of {self.site}")

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return {"largest": self.sizes}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned."""
        self.largest = state["largest"]

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what was seen of other tokens."""
        largest = state["largest"]
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)


class LoudTokens:
    """The `count` tokens with the largest values, as they are: `rows` [count or fewer, width], loudest first.

    site: name used in messages.
    """

    def __init__(self, site: str, count: int = 64) -> None:
        self.site, self.count = site, count
        self.found: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., width]. Raises DataError: x is not finite."""
        rows = x.flatten(0, -2)
        if self.found is not None:
            rows = torch.cat((self.found, rows))
        peaks = rows.abs().amax(1)
        if not bool(torch.isfinite(peaks).all()):
            raise DataError(f"tokens of {self.site}: not finite on the calibration data; check the model and the text")
        self.found = rows[peaks.topk(min(self.count, len(rows))).indices].clone()

    @property
    def rows(self) -> Tensor:
        """The tokens. Raises DataError: no token was seen."""
        return seen(self.found, f"tokens of {self.site}")

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return {"rows": self.rows}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned."""
        self.found = state["rows"]

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what was seen of other tokens."""
        self.update(state["rows"])


def seen(value: Tensor | None, what: str) -> Tensor:
    """The value. Raises DataError: it is None, no token was seen."""
    if value is None:
        raise DataError(f"{what}: no tokens were seen; give calibration data that reaches it")
    return value
