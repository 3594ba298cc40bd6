from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from resq_compiler.errors import ConfigError
from resq_compiler.pipeline.options import check_options, option, options_text, parse_options


@dataclass(frozen=True)
class Example:
    name: ClassVar[str] = "example"
    kind: Literal["a", "b"] = "a"
    bits: Literal[4, 8] | None = None
    share: float | Literal["auto"] = option(0.5, 0, 1)
    count: int = option(1, 1)
    on: bool = False
    text: str = ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "c"}, "pass example, option kind: expected a, b; got 'c'"),
        ({"bits": 4.0}, "option bits: expected 4, 8 or none; got 4.0"),
        ({"share": 1.5}, "option share: expected a number from 0 to 1 or auto; got 1.5"),
        ({"share": float("nan")}, "option share: .*got nan"),
        ({"share": True}, "option share: .*got True"),
        ({"count": 0}, "option count: expected a whole number of at least 1; got 0"),
        ({"count": 2.0}, "option count"),
        ({"on": 1}, "option on: expected true or false; got 1"),
    ],
)
def test_values_that_a_field_does_not_take(values, message):
    with pytest.raises(ConfigError, match=message):
        check_options(Example(**values))


ALLOWED: list[tuple[dict[str, Any], str]] = [
    ({}, ""),
    ({"kind": "b", "bits": 8}, "kind=b,bits=8"),
    ({"share": 1}, "share=1"),
    ({"share": 0.125, "on": True}, "share=0.125,on=true"),
    ({"share": "auto", "count": 7}, "share=auto,count=7"),
    ({"text": "a b,c"}, 'text="a b,c"'),
]


@pytest.mark.parametrize(("values", "text"), ALLOWED)
def test_text_says_what_differs_from_the_defaults(values, text):
    item = Example(**values)
    check_options(item)
    assert options_text(item) == text


def test_texts_become_values():
    texts = {"kind": "b", "bits": "none", "share": "1/8", "count": "3", "on": "true", "text": "x y"}
    expected = {"kind": "b", "bits": None, "share": 0.125, "count": 3, "on": True, "text": "x y"}
    assert parse_options(Example, texts, "pass 0 example") == expected
    with pytest.raises(ConfigError, match="pass 0 example: no option 'counts'; did you mean count?"):
        parse_options(Example, {"counts": "1"}, "pass 0 example")
