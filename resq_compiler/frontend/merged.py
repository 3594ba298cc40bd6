"""Which tensors of a checkpoint a parameter is made of, where transformers renames them or stacks the experts of a mixture.

Its own rules say so. Taken are names, and matrices that are stacked [E, N, K], the rows of several one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sources:
    """The tensors of a parameter: one for each expert, or of each several whose rows are joined; of other parameters the only one."""

    keys: tuple[tuple[str, ...], ...]
    stacked: bool = False


def sources_of(keys: Sequence[str], skeleton: PreTrainedModel) -> dict[str, Sources] | None:
    """By the name that transformers gives a parameter; None where it does anything else on the way in."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    alone: dict[str, Sources] = {}
    merged: dict[str, dict[int, list[str]]] = {}
    for key in sorted(keys, key=natural):
        name = key
        for rule in renamings:
            if rule.rename_source_key(name) != (name, None) and type(rule) is not WeightRenaming:
                return None
            name = rule.rename_source_key(name)[0]
        matches = ((c, *c.rename_source_key(name)) for c in converters)
        found = next(((c, target, pattern) for c, target, pattern in matches if pattern is not None), None)
        if found is None:
            alone[name] = Sources(((key,),))
            continue
        converter, target, pattern = found
        if not stacks(converter):
            return None
        merged.setdefault(target, {}).setdefault(converter.source_patterns.index(pattern), []).append(key)
    stacked = {name: side_by_side(columns) for name, columns in merged.items()}
    return None if None in stacked.values() else alone | {name: s for name, s in stacked.items() if s is not None}


def side_by_side(columns: dict[int, list[str]]) -> Sources | None:
    """What each expert is joined from, in the order of the patterns; None where experts lack some of it."""
    lists = [columns[i] for i in sorted(columns)]
    return Sources(tuple(zip(*lists, strict=True)), True) if len({len(names) for names in lists}) == 1 else None


def stacks(rule: Any) -> bool:
    """Whether a rule stacks along a new first dimension and, of several tensors, joins their rows, and no more."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    wanted = [(MergeModulelist, 0), (Concatenate, 1)][: 1 if len(rule.source_patterns) == 1 else 2]
    return [(type(step), getattr(step, "dim", None)) for step in rule.operations] == wanted


def natural(key: str) -> list[tuple[int, int | str]]:
    """Sorts numbers in names by value."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"\.", key)]
