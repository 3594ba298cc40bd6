"""Errors about a node carry its name, which dumps mark."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("resq_compiler", "passes", "backends") for p in (ROOT / folder).rglob("*.py"))


def raised(tree):
    """The calls behind `raise`."""
    return [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]


def named_node(call):
    """The expression that a message has behind its first word `node`; None where it names none."""
    if not call.args or not isinstance(call.args[0], ast.JoinedStr):
        return None
    parts = call.args[0].values
    for text, value in zip(parts, parts[1:], strict=False):
        said = text.value if isinstance(text, ast.Constant) else ""
        if isinstance(value, ast.FormattedValue) and (said == "node " or said.endswith((": node ", "> node "))):
            return value.value
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_messages_about_a_node_come_with_it(path):
    for call in raised(ast.parse(path.read_text(encoding="utf-8"))):
        expected = named_node(call)
        given = next((k.value for k in call.keywords if k.arg == "node"), None)
        assert expected is None or (given is not None and ast.dump(given) == ast.dump(expected)), ast.unparse(call)
