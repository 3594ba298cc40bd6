"""The text form of a tuple of passes: what dumps and saved models show, and what `--passes` takes.

    fold-norms,insert-projections{down=none},quantize-weights{method=gptq,act-order=true}

Options that are not said have their defaults. Texts with other characters than those of a word stand in double quotes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from resq_compiler.errors import ConfigError
from resq_compiler.passes import PASSES
from resq_compiler.pipeline.options import parse_options
from resq_compiler.pipeline.passes import Pass

_PASS = re.compile(r'\s*(?P<name>[\w-]+)\s*(\{(?P<options>([^"{}]|"[^"]*")*)\})?\s*(,|$)')
_OPTION = re.compile(r'\s*(?P<name>[\w-]+)\s*=\s*("(?P<quoted>[^"]*)"|(?P<word>[^",\s]+))\s*(,|$)')


def to_text(passes: Sequence[Pass]) -> str:
    """The text of passes; `parse` reads it."""
    return ",".join(map(str, passes))


def parse(text: str) -> tuple[Pass, ...]:
    """The passes of a text. Raises ConfigError naming the pass and the option that is wrong, with the nearest name."""
    return tuple(
        _pass(match, i) for i, match in enumerate(_items(_PASS, text, "passes", "name{option=value,...},name,..."))
    )


def _pass(match: re.Match[str], index: int) -> Pass:
    name = match["name"]
    if name not in PASSES:
        near = difflib.get_close_matches(name, PASSES, 1)
        hint = f"did you mean {near[0]}?" if near else f"passes: {', '.join(PASSES)}"
        raise ConfigError(f"pass {index} {name}: there is no such pass; {hint}")
    where = f"pass {index} {name}"
    found: dict[str, str] = {}
    for item in _items(_OPTION, match["options"] or "", where, "option=value,..."):
        if item["name"] in found:
            raise ConfigError(f"{where}: option {item['name']} is said twice; say it once")
        found[item["name"]] = item["word"] if item["quoted"] is None else item["quoted"]
    return PASSES[name](**parse_options(PASSES[name], found, where))


def _items(pattern: re.Pattern[str], text: str, where: str, form: str) -> Iterator[re.Match[str]]:
    """Matches of a pattern one after the other, up to the end of the text."""
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None or match.end() == position:
            raise ConfigError(f"{where}: expected {form}; got {text[position : position + 60]!r}")
        yield match
        position = match.end()
