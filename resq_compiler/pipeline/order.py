"""Whether passes may run in an order: what each needs must be there before it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from resq_compiler.errors import ConfigError
from resq_compiler.pipeline.passes import Pass


def check_order(passes: Sequence[Pass], known: Collection[type] = ()) -> None:
    """Raise ConfigError for a pass that needs a fact which is not known and which no pass before it provides."""
    provided = set(known)
    for i, item in enumerate(passes):
        for kind in item.requires:
            if kind not in provided:
                sources = " or ".join(sorted(providers(kind) - {item.name}))
                raise ConfigError(
                    f"pass {i} {item.name}: needs {kind.__name__}, which no pass before it provides; expected before it: {sources}"
                )
        provided |= set(item.provides)


def check_comparable(passes: Sequence[Pass]) -> None:
    """Raise ConfigError where codes cannot be compared with the float weights of the last exact pass: they are learned behind it."""
    for i, item in enumerate(passes):
        if item.learns:
            raise ConfigError(
                f"pass {i} {item.name}: it changes float weights behind the exact passes, so what quantizing costs cannot be attributed to "
                "linears; compile without it (learn_rotations=none, learn_blocks=false) to see that"
            )


def providers(fact: type) -> set[str]:
    """Names of the passes, of all that were imported, that provide a kind of fact."""
    kinds, found = Pass.__subclasses__(), set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if fact in kind.provides:
            found.add(kind.name)
    return found
