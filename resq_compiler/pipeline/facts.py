"""What passes find out about a model, kept by type: one topology, one column plan, one set of bases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

from resq_compiler.errors import PassError

Fact = TypeVar("Fact")


class Facts:
    """Values by their type. A pass that finds a better one puts it in place of the former."""

    def __init__(self, values: Iterable[object] = ()):
        self._values: dict[type, object] = {type(value): value for value in values}

    def put(self, value: object) -> None:
        """Keep a value, in place of the one of its type."""
        self._values[type(value)] = value

    def get(self, kind: type[Fact]) -> Fact:
        """The value of a type. Raises PassError: there is none."""
        if kind not in self._values:
            known = ", ".join(sorted(k.__name__ for k in self._values)) or "nothing"
            raise PassError(
                f"{kind.__name__} is not known yet; expected a pass before this one that provides it; known: {known}"
            )
        return cast(Fact, self._values[kind])

    def find(self, kind: type[Fact]) -> Fact | None:
        """The value of a type, or None."""
        return cast("Fact | None", self._values.get(kind))

    def drop(self, kind: type) -> None:
        """Forget the value of a type, if there is one."""
        self._values.pop(kind, None)

    def kinds(self) -> set[type]:
        """The types that there are values of."""
        return set(self._values)

    def __iter__(self) -> Iterator[object]:
        return iter(self._values.values())
