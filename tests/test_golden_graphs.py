"""What each pass does to the graph of a two-layer model, as text in tests/golden: the captured graph whole, then a difference for
each pass. To accept a change of a pass: RESQ_ACCEPT_GOLDEN=1 python -m pytest tests/test_golden_graphs.py, and read the difference.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from resq_compiler.inspection.records import graph_records
from resq_compiler.inspection.text import node_line

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "llama-resq": ("llama", {"recipe": "resq", "weight_method": "rtn", "down_proj": "energy-split"}),
    "opt-quarot": ("opt", {"recipe": "quarot", "weight_method": "rtn"}),
}


def stage_texts(stages) -> dict[str, str]:
    """Stage -> its graph, or what differs from the graph before: text, by file name."""
    found, before = {}, []
    for stage in stages:
        lines = [stable_line(record) for record in graph_records(stage.graph)]
        if before:
            changes = difflib.unified_diff(before, lines, "before", stage.name, lineterm="", n=1)
            found[f"{stage.label}.diff"] = "\n".join(changes) + "\n"
        else:
            found[f"{stage.label}.txt"] = "\n".join(lines) + "\n"
        before = lines
    return found


def stable_line(record: dict) -> str:
    """Without the noise of rounding, a number that another processor computes otherwise in the last digit."""
    facts = {kind: fields for kind, fields in record["facts"].items() if kind != "WeightNoise"}
    return node_line(record | {"facts": facts})


@pytest.mark.parametrize("case", CASES)
def test_every_pass_does_what_the_golden_text_says(compiled, case):
    family, options = CASES[case]
    found, folder = stage_texts(compiled(family, **options).stages), GOLDEN / case
    if os.environ.get("RESQ_ACCEPT_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, text in found.items():
            (folder / name).write_text(text)
    expected = {file.name: file.read_text() for file in folder.iterdir()}
    assert list(found) == sorted(expected)
    for name, text in found.items():
        assert text == expected[name], name
