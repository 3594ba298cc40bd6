"""Graphs are read and changed through resq_compiler.ir alone: arguments by name, values and replacements in one place each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IR = ROOT / "resq_compiler" / "ir"
SOURCES = [
    p
    for folder in ("resq_compiler", "passes", "backends")
    for p in sorted((ROOT / folder).rglob("*.py"))
    if IR not in p.parents
]
INSTEAD = {
    r"(?<!self)\.args\[": "an argument by its position; ir/args.py and ir/views.py read it by name",
    r"\.meta\[": "a key of node.meta; ir/meta.py has the facts, ir/values.py the values",
    r"\.replace_all_uses_with\(": "a replacement by hand; ir/graph_tools.py has replace and rewrite",
}


@pytest.mark.parametrize("pattern", INSTEAD, ids=["arguments", "values", "replacements"])
def test_graphs_are_read_through_ir(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {INSTEAD[pattern]}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert len(SOURCES) > 100 and found == []
