"""Sizes of channels over tokens, of each expert of a mixture: sums of squares, and largest magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from resq_compiler.numerics.channels import Energy, Peak
from resq_compiler.numerics.experts import groups, row_numbers


class ExpertSizes:
    """A size of channels for each expert, over the tokens that went through it: `each`; and over all of them: `whole`.

    `route` says which experts the tokens of the next `update` went through. counts: tokens of each expert, int64 [E].
    """

    kind: ClassVar[type[Energy] | type[Peak]]
    part: ClassVar[str]  # what the kind calls its sizes in a file

    def __init__(self, site: str, experts: int) -> None:
        self.each = [self.kind(f"{site}, expert {i}") for i in range(experts)]
        self.whole = self.kind(site)
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self._indices: Tensor | None = None

    def route(self, indices: Tensor) -> None:
        """The experts of the tokens to come: indices [..., k]."""
        self._indices = indices

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [B, S, k, width]. Raises DataError: x is not finite."""
        assert self._indices is not None, "route comes before update"
        found, flat = groups(self._indices, len(self.each)), x.flatten(0, -2)
        self.whole.update(x)
        for i, count in enumerate(found.counts):
            if count:
                self.each[i].update(flat[row_numbers(x, found.rows(i), self._indices.shape[-1])])
        self.counts += torch.tensor(found.counts)

    def sizes(self, least: int) -> Tensor:
        """[E, width]; experts that fewer than `least` tokens went through have those of the whole mixture. Raises DataError: no tokens."""
        return torch.stack(
            [one.sizes if count >= max(least, 1) else self.whole.sizes for one, count in zip(self.each, self.counts.tolist(), strict=True)]
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return {"counts": self.counts, "each": self.sizes(1), "whole": self.whole.sizes}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned."""
        self.counts = state["counts"]
        self.whole.restore({self.part: state["whole"]})
        for one, size, count in zip(self.each, state["each"], self.counts.tolist(), strict=True):
            if count:
                one.restore({self.part: size})

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add what was seen of other tokens."""
        self.counts = self.counts + state["counts"]
        self.whole.merge({self.part: state["whole"]})
        for one, size, count in zip(self.each, state["each"], state["counts"].tolist(), strict=True):
            if count:
                one.merge({self.part: size})


class ExpertEnergy(ExpertSizes):
    """Sums of squares."""

    kind = Energy
    part = "total"


class ExpertPeak(ExpertSizes):
    """Largest magnitudes."""

    kind = Peak
    part = "largest"
