"""resq diff."""

from __future__ import annotations

import json
import shutil

import pytest

from resq_compiler.errors import DumpError
from resq_compiler.inspection.diff import compare, difference_text


@pytest.fixture
def changed(compiled, tmp_path):
    """A copy of the dump with one option, one node's bits, one node name and one noise figure changed."""
    other = tmp_path / "other"
    shutil.copytree(compiled.dump, other)
    manifest = json.loads((other / "dump.json").read_text())
    manifest["options"]["seed"] = 7
    manifest["noise"]["blocks.0.key"]["sqnr_db"] += 3
    (other / "dump.json").write_text(json.dumps(manifest))
    path = other / "13-quantize-kv-cache.json"
    stage = json.loads(path.read_text())
    key = next(n for n in stage["nodes"] if n["facts"].get("QuantizerSite", {}).get("name") == "blocks.0.key")
    key["bits"] = "8"
    stage["nodes"][-2]["name"] += "_renamed"
    path.write_text(json.dumps(stage))
    return other


def test_a_dump_equals_itself(compiled):
    found = compare(compiled.dump, compiled.dump)
    assert found.empty and difference_text(found) == "equal: options, graphs, bits and noise"


def test_finds_what_changed(compiled, changed):
    found = compare(compiled.dump, changed)
    assert found.options == {"seed": (0, 7)}
    assert found.bits == {"blocks.0.key": ("4|8", "8")}
    ((before, after),) = found.noise.values()
    assert after - before == pytest.approx(3)
    stage = next(s for s in found.stages if s.label == "13-quantize-kv-cache")
    assert len(stage.added) == len(stage.removed) == 1 and stage.added[0] == f"{stage.removed[0]}_renamed"
    assert [s.label for s in found.stages if not s.empty] == ["13-quantize-kv-cache"]
    text = difference_text(found)
    assert "seed: 0 -> 7" in text and "blocks.0.key: 4|8 -> 8" in text and "(+3.00)" in text
    json.dumps(found.to_dict())


def test_stages_of_one_side_only(compiled, changed):
    manifest = json.loads((changed / "dump.json").read_text())
    manifest["stages"] = [s for s in manifest["stages"] if s["name"] != "quantize-weights"]
    (changed / "dump.json").write_text(json.dumps(manifest))
    assert compare(compiled.dump, changed).only_a == ["11-quantize-weights"]


def test_not_a_dump(compiled, tmp_path):
    with pytest.raises(DumpError, match="expected a dump"):
        compare(compiled.dump, tmp_path)
