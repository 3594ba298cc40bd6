"""`resq compile --passes`: what a compile shows as its passes can be given back."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import resq_compiler
from resq_compiler.cli import main
from resq_compiler.inspection.dump_files import read_manifest
from resq_compiler.recipes.named import passes_for, resolve
from resq_compiler.recipes.text import to_text
from resq_compiler.tiny import tiny_model, tiny_tokens

TEXT = to_text(passes_for(resolve("rtn", weight_bits=3, weight_clip="max")))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A float model, and the same compiled by these passes."""
    folder = tmp_path_factory.mktemp("passes")
    tiny_model("llama").save_pretrained(folder / "float")
    words = ["compile", str(folder / "float"), "-o", str(folder / "out"), "--passes", TEXT, "--seed", "3", "--quiet"]
    assert main.main(words) == 0
    return folder


def test_the_model_is_that_of_the_settings_and_says_its_passes(place):
    loaded = resq_compiler.load(place / "out")
    settings = resq_compiler.compile(tiny_model("llama"), recipe="rtn", weight_bits=3, weight_clip="max")
    ids = tiny_tokens(2, 9)
    assert torch.equal(loaded(ids).logits, settings(ids).logits)
    assert loaded.passes == settings.passes == TEXT and loaded.options.scheme == "W3A4KV4"
    assert json.loads((place / "out" / "resq_report.json").read_text())["passes_text"] == TEXT


def test_the_recipe_file_gives_them_back(place, capsys):
    file = place / "out" / "resq_recipe.yaml"
    values = yaml.safe_load(file.read_text())
    assert values.pop("passes") == TEXT and values.pop("seed") == 3
    assert all(name.startswith(("calibration", "basis", "bos", "hidden_dtype")) for name in values)
    capsys.readouterr()
    assert main.main(["compile", str(place / "float"), "--config", str(file), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["passes_text"] == TEXT and plan["options"]["seed"] == 3


def test_a_model_saved_without_passes_still_loads(place, tmp_path):
    compiled = resq_compiler.load(place / "out")
    compiled.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["quantization_config"]["passes"]
    config["quantization_config"]["options"]["gptq_sweeps"] = 0
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert resq_compiler.load(tmp_path / "old").passes == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "rtn"], "passes and recipe: each says what a compile does; give one of them"),
        (["--weight-bits", "4"], "option weight_bits: a tuple of passes has it as a field"),
        (["--passes", "fold-norm"], "pass 0 fold-norm: there is no such pass; did you mean fold-norms?"),
        (["--passes", "partition-linears"], "pass 0 partition-linears: needs Topology"),
    ],
)
def test_what_is_wrong_is_one_line(place, capsys, flags, message):
    words = ["compile", str(place / "float"), "-o", str(place / "new"), "--passes", TEXT, *flags]
    assert main.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_file_may_not_name_what_was_removed(place, tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text("gptq_sweeps: 4\n")
    assert main.main(["compile", str(place / "float"), "--config", str(file), "--dry-run"]) == 2
    assert "option gptq_sweeps: removed in 0.2" in capsys.readouterr().err
    file.write_text("gptq_sweeps: 0\n")
    assert main.main(["compile", str(place / "float"), "--config", str(file), "--dry-run"]) == 0


def test_inspect_takes_them_too(place, tmp_path, capsys):
    dump = tmp_path / "dump"
    assert main.main(["inspect", str(place / "float"), "--passes", TEXT, "--dump", str(dump), "--quiet"]) == 0
    shown = [stage["options"] for stage in read_manifest(dump)["stages"] if stage["name"] == "plan-columns"]
    assert len(shown) == 1 and "weight-bits=3" in shown[0]
    assert main.main(["inspect", str(place / "float"), "--passes", TEXT]) == 2
    assert "--passes: nothing is compiled" in capsys.readouterr().err
