"""Options of a pass: the fields of its dataclass, checked against their annotations, and written as text.

    gptq, 0.03, true, none, "mlp=1/4,o=0"       the text of a value; quotes where it holds other characters than those of a word

An annotation is bool, int, float, str, a Literal of words or whole numbers, a class with `parse` and `__str__`, or a union of these
with or without None.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from fractions import Fraction
from typing import Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from resq_compiler.errors import ConfigError

WORD = re.compile(r"[A-Za-z0-9_.+-]+")


class Named(Protocol):
    """A pass, or its class."""

    name: Any


def option(default: Any, least: float | None = None, most: float | None = None) -> Any:
    """A field with a default and, for numbers, the least and the largest value."""
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def option_types(kind: type) -> dict[str, Any]:
    """The types of the options of a dataclass, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_options(item: Any) -> None:
    """Raise ConfigError for an option whose value its annotation, or its range, does not allow."""
    for field in dataclasses.fields(item):
        value, allowed = getattr(item, field.name), alternatives(option_types(type(item))[field.name])
        if not any(fits(value, kind) for kind in allowed) or not in_range(value, field):
            raise ConfigError(
                f"pass {item.name}, option {shown_name(field.name)}: expected {expected(allowed, field)}; got {value!r}"
            )


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the annotation itself where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type, or one of a Literal's; true and false are no numbers, and 4.0 is no whole number."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def in_range(value: object, field: dataclasses.Field[Any]) -> bool:
    """Whether a number is in the range of its field; NaN never is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    least, most = field.metadata.get("least"), field.metadata.get("most")
    return value == value and (least is None or value >= least) and (most is None or value <= most)


def expected(allowed: tuple[Any, ...], field: dataclasses.Field[Any]) -> str:
    """What a field takes, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    least, most = field.metadata.get("least"), field.metadata.get("most")
    found = []
    for kind in allowed:
        text = ", ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else words.get(kind, kind.__name__)
        if kind in (int, float) and least is not None:
            text += f" from {least:g} to {most:g}" if most is not None else f" of at least {least:g}"
        found.append(text)
    return " or ".join(found)


def options_text(item: Any) -> str:
    """The options that differ from their defaults: `method=rtn,act-order=true`."""
    values = ((field, getattr(item, field.name)) for field in dataclasses.fields(item))
    return ",".join(f"{shown_name(f.name)}={value_text(v)}" for f, v in values if v != f.default)


def shown_name(name: str) -> str:
    """The name of a field as users write it."""
    return name.replace("_", "-")


def value_text(value: object) -> str:
    """The text of a value, that `parse_value` reads."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, float) else str(value)
    return text if WORD.fullmatch(text) else f'"{text}"'


def parse_options(kind: type, texts: dict[str, str], where: str) -> dict[str, Any]:
    """Values of fields by name, from their texts. Raises ConfigError: no such option, or a text that is no value of it."""
    known = {shown_name(name): name for name in option_types(kind)}
    for text in texts:
        if text not in known:
            near = difflib.get_close_matches(text, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"its options: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: no option {text!r}; {hint}")
    return {known[n]: parse_value(option_types(kind)[known[n]], t, f"{where}, option {n}") for n, t in texts.items()}


def parse_value(annotation: Any, text: str, where: str) -> Any:
    """The value of a text, as the first of the annotation's alternatives that takes it."""
    allowed = alternatives(annotation)
    for kind in allowed:
        value = parsed_as(kind, text)
        if value is not UNFIT:
            return value
    words = " or ".join(", ".join(map(str, get_args(k))) or getattr(k, "__name__", str(k)) for k in allowed)
    raise ConfigError(f"{where}: expected {words.replace('NoneType', 'none')}; got {text!r}")


UNFIT = object()
"""Stands for: the text is no value of that type."""


def parsed_as(kind: Any, text: str) -> Any:
    """The value of a text as one type, or UNFIT. Raises ConfigError as the `parse` of a class does."""
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}.get(text, UNFIT)
    if kind is type(None):
        return None if text == "none" else UNFIT
    if kind is bool:
        return {"true": True, "false": False}.get(text, UNFIT)
    if kind is str:
        return text
    if hasattr(kind, "parse"):
        return kind.parse(text)
    try:
        return float(Fraction(text)) if kind is float else int(text)
    except (ValueError, ZeroDivisionError):
        return UNFIT
