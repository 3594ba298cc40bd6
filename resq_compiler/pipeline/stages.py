"""A record of what a pass did: the graph after it, without weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph


@dataclass(frozen=True)
class Stage:
    """The graph after a pass, without weights, and what the pass did. `max_error` is relative; None where not compared."""

    index: int
    name: str
    options: str
    graph: Graph
    rewrites: int
    seconds: float
    max_error: float | None
    exact: bool = True
    failed: str | None = None  # the message of the error
    failed_node: str | None = None  # the node it names
    lines: tuple[str, ...] = ()  # what the pass has to say, such as the table of a search

    @property
    def label(self) -> str:
        """File-name form, such as 03-fold-norms."""
        return f"{self.index:02d}-{self.name}"
