"""Second moments of what each expert of a mixture reads, for GPTQ: of its own tokens, of those of its layer, or of every token.

Hessians of many experts do not fit into memory together: they are taken for as many experts at a time as `ROOM` holds, and the stretch of
the graph before them, a norm and a gather, runs again for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from resq_compiler.analysis.topology import Experts
from resq_compiler.calibration import precision
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.calibration.statistics import pool
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.experts import Groups, groups, row_numbers
from resq_compiler.util import processes
from resq_compiler.util.text import table

ROOM = 2**29
"""Bytes of second moments that are summed up together."""

HEADER = ("experts", "tokens: least", "median", "most", "own moment", "of their layer", "of every token")


@dataclass(frozen=True)
class ExpertInputs:
    """What the experts of a mixture read: values side by side, and who reads which row.

    factor: of rows, by their numbers, in a batch; it also reads the values `also`. alike: all experts read the same.
    """

    name: str
    nodes: tuple[Node, ...]
    columns: int
    indices: Node
    experts: Experts
    read: Callable[[dict[Node, Any], Node], Tensor]
    factor: Callable[[dict[Node, Any], Tensor], Tensor] | None = None
    also: tuple[Node, ...] = ()
    alike: bool = False

    def rows(self, env: dict[Node, Any], found: Groups, expert: int) -> Tensor:
        """What one expert reads in a batch: [tokens of the expert, columns]."""
        mine, choices = found.rows(expert), env[self.indices].shape[-1]
        pieces = []
        for node in self.nodes:
            x = self.read(env, node)
            pieces.append(x.flatten(0, -2)[row_numbers(x, mine, choices)])
        rows = torch.cat(pieces, -1)
        return rows if self.factor is None else rows * self.factor(env, mine)[:, None]


@dataclass
class ExpertReport:
    """What each expert's weights were rounded with: tokens of each; own: whether it had enough for a moment of its own."""

    counts: list[int]
    own: list[bool]
    everywhere: bool = False

    def row(self) -> tuple[str, ...]:
        """Of the table."""
        ordered = sorted(self.counts)
        own = sum(self.own)
        split = (0, 0, len(ordered)) if self.everywhere else (own, len(ordered) - own, 0)
        return tuple(map(str, (len(ordered), ordered[0], ordered[len(ordered) // 2], ordered[-1], *split)))

    def tokens(self) -> str:
        """Of every expert; a star where it took the moment of its layer."""
        return " ".join(
            f"{n}{'' if own or self.everywhere else '*'}" for n, own in zip(self.counts, self.own, strict=True)
        )


@dataclass
class ExpertMoments:
    """The moments [K, K] of the experts of a mixture, one after the other. least: tokens that an expert needs for its own."""

    inputs: ExpertInputs
    runner: Lockstep
    goal: Node
    least: int
    counts: list[int] = field(default_factory=list)

    def count(self) -> list[int]:
        """Tokens that go through each expert."""
        total = torch.zeros(self.inputs.experts.count, dtype=torch.int64)

        def see(batch: int, env: dict[Node, Any]) -> None:
            total.add_(torch.tensor(self._groups(env).counts))

        self.runner.run([self.inputs.indices], self.goal, see)
        self.counts = processes.current().sum(total).tolist()
        return self.counts

    def own(self) -> list[bool]:
        """Which experts have enough tokens."""
        return [count >= max(self.least, 1) for count in self.counts]

    def each(self) -> Iterator[Tensor]:
        """The mean moment of every expert, float64, in order; of its own tokens, or of all of the layer."""
        own = self.own()
        if self.inputs.alike:
            (found, _), count = self._take([0], False), len(own)
            yield from [found[0].mean()] * count
            return
        at_once = max(1, ROOM // (8 * self.inputs.columns**2))
        whole: Tensor | None = None
        for start in range(0, len(own), at_once):
            chunk = list(range(start, min(start + at_once, len(own))))
            wanted = [i for i in chunk if own[i]]
            found, total = self._take(wanted, whole is None and not all(own))
            whole = total if whole is None else whole
            for i in chunk:
                yield found[i].mean() if i in found else _required(whole)

    def _take(self, wanted: list[int], whole: bool) -> tuple[dict[int, SecondMoment], Tensor | None]:
        """The moments of some experts, and of all rows where that is asked."""
        dtype, name = precision.dtype(), self.inputs.name
        found = {i: SecondMoment(f"{name}, expert {i}", self.inputs.columns, dtype=dtype) for i in wanted}
        total = SecondMoment(name, self.inputs.columns, dtype=dtype)

        def see(batch: int, env: dict[Node, Any]) -> None:
            rows = self._groups(env)
            for i in range(self.inputs.experts.count) if whole else wanted:
                if rows.counts[i]:
                    x = self.inputs.rows(env, rows, i)
                    if i in found:
                        found[i].update(x)
                    if whole:
                        total.update(x)

        if wanted or whole:
            self.runner.run([*self.inputs.nodes, self.inputs.indices, *self.inputs.also], self.goal, see)
        for moment in (*found.values(), *([total] if whole else [])):
            pool(moment)
        return found, total.mean() if whole else None

    def _groups(self, env: dict[Node, Any]) -> Groups:
        return groups(env[self.inputs.indices], self.inputs.experts.count)


def _required(moment: Tensor | None) -> Tensor:
    assert moment is not None, "an expert without a moment of its own has that of its layer"
    return moment


def describe(reports: dict[str, ExpertReport]) -> list[str]:
    """The lines of a stage: a table of all mixtures, and below it the tokens of every expert."""
    if not reports:
        return []
    lines = table(("layer", *HEADER), [(name, *report.row()) for name, report in reports.items()]).splitlines()
    return lines + [f"tokens of the experts of {name}: {report.tokens()}" for name, report in reports.items()]
