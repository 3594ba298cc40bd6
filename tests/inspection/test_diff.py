"""resq diff."""

from __future__ import annotations

import json
import shutil

import pytest

from resq_compiler.api import compile
from resq_compiler.cli.main import main
from resq_compiler.errors import DumpError
from resq_compiler.inspection.diff import compare, difference_text
from resq_compiler.tiny import tiny_tokens


@pytest.fixture
def changed(compiled, tmp_path):
    """A copy of the dump with one option, one node's bits, one node name and one noise figure changed."""
    other = tmp_path / "other"
    shutil.copytree(compiled.dump, other)
    manifest = json.loads((other / "dump.json").read_text())
    manifest["options"]["seed"] = 7
    manifest["noise"]["blocks.0.key"]["sqnr_db"] += 3
    (other / "dump.json").write_text(json.dumps(manifest))
    path = other / "15-quantize-kv-cache.json"
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
    stage = next(s for s in found.stages if s.label == "15-quantize-kv-cache")
    assert len(stage.added) == len(stage.removed) == 1 and stage.added[0] == f"{stage.removed[0]}_renamed"
    assert [s.label for s in found.stages if not s.empty] == ["15-quantize-kv-cache"]
    text = difference_text(found)
    assert "seed: 0 -> 7" in text and "blocks.0.key: 4|8 -> 8" in text and "(+3.00)" in text
    json.dumps(found.to_dict())


def test_compiles_with_other_options(compiled, tmp_path):
    compile(
        compiled.original, tiny_tokens(4, 64), recipe="resq", calibration_samples=4, calibration_length=64, weight_method="rtn", kv_bits=8,
        dump_dir=tmp_path,
    )  # fmt: skip
    found = compare(compiled.dump, tmp_path)
    assert found.names == ("resq W4A4KV4 of LlamaForCausalLM instance", "resq W4A4KV8 of LlamaForCausalLM instance")
    assert found.options == {"kv_bits": (4, 8)}
    assert found.summary["average bits, kv"][1] == 8 and "average bits, weights" not in found.summary
    before, after = found.noise_by_kind["blocks.*.key"]
    assert after > before + 15  # four bits more are worth about 24 dB
    last = next(s for s in found.stages if s.label == "15-quantize-kv-cache")
    assert not last.operators and {c["bits"] for c in last.changed.values() if "bits" in c} == {("4|8", "8")}
    text = difference_text(found)
    assert "kv_bits: 4 -> 8" in text and "average bits, kv: 4.5" in text and "blocks.*.key: 4|8 -> 8 (2 blocks)" in text


def test_a_pass_less_shows_in_the_numbers_of_operators(compiled, tmp_path):
    compile(
        compiled.original, tiny_tokens(4, 64), recipe="rtn", calibration_samples=4, calibration_length=64, dump_dir=tmp_path
    )  # fmt: skip
    found = compare(compiled.dump, tmp_path)
    projected = ["08-compute-bases", "09-rotate-bases", "10-insert-projections", "11-fuse-projections"]
    assert found.only_a == ["06-fold-norms", *projected]  # without U_A gains stay with the norms
    last = next(s for s in found.stages if s.label.endswith("quantize-kv-cache"))
    assert last.operators["hadamard"] == (2, None) and last.operators["quantized_linear"] == (26, 14)
    assert "hadamard 2 -> 0" in difference_text(found)


def test_a_change_that_later_stages_keep_is_told_once(compiled, changed):
    for path in changed.glob("1[123]-*.json"):
        stage = json.loads(path.read_text())
        for node in stage["nodes"]:
            if "WeightNoise" in node["facts"]:
                node["facts"]["WeightNoise"]["relative"] *= 2
        path.write_text(json.dumps(stage))
    lines = [line for line in difference_text(compare(compiled.dump, changed)).splitlines() if "WeightNoise" in line]
    assert len(lines) == 1 and "LinearPart" not in lines[0]  # the changed fact alone, of one node for all 26
    assert lines[0].startswith("  ~ %") and lines[0].endswith("(and 25 alike but for the figures)")


def test_sites_of_one_side_are_counted(compiled, changed):
    manifest = json.loads((changed / "dump.json").read_text())
    manifest["noise"] = {k: v for k, v in manifest["noise"].items() if v["kind"] != "kv"}
    (changed / "dump.json").write_text(json.dumps(manifest))
    lines = difference_text(compare(compiled.dump, changed)).splitlines()
    assert lines[-1] == "  only in A: 4 sites"


def test_stages_of_one_side_only(compiled, changed):
    manifest = json.loads((changed / "dump.json").read_text())
    manifest["stages"] = [s for s in manifest["stages"] if s["name"] != "quantize-weights"]
    (changed / "dump.json").write_text(json.dumps(manifest))
    assert compare(compiled.dump, changed).only_a == ["13-quantize-weights"]


def test_not_a_dump(compiled, tmp_path):
    with pytest.raises(DumpError, match="expected a dump"):
        compare(compiled.dump, tmp_path)


def test_diff_command(compiled, capsys):
    assert main(["diff", str(compiled.dump), str(compiled.dump), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_diff_command_on_what_is_not_a_dump(compiled, tmp_path, capsys):
    assert main(["diff", str(compiled.dump), str(tmp_path)]) == 2
    assert "expected a dump" in capsys.readouterr().err
