"""Diagnostics of a saved model: its float original is found or asked for, and equal to those taken beside the compile."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import resq_compiler
from resq_compiler.cli.main import main
from resq_compiler.errors import ConfigError
from resq_compiler.inspection import saved
from resq_compiler.inspection.session import Request, inspect_model
from resq_compiler.recipes.named import resolve
from resq_compiler.tiny import tiny_model, tiny_tokens

CONFIG = resolve("resq", weight_method="rtn", calibration_samples=4, calibration_length=64)
REQUEST = Request(activations=True, levels=("kind", "block"), tokens=512)
CALIBRATION = tiny_tokens(4, 64)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A float model on disk."""
    directory = tmp_path_factory.mktemp("float")
    tiny_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(original, tmp_path_factory):
    """The same model, compiled and saved."""
    target = tmp_path_factory.mktemp("compiled") / "model"
    resq_compiler.compile(original, CALIBRATION, recipe=CONFIG).save_pretrained(target)
    return target


def test_measures_the_same_as_beside_the_compile(original, directory):
    expected = inspect_model(original, CALIBRATION, CONFIG, REQUEST)
    found = saved.inspect_saved(directory, REQUEST, original, lambda: CALIBRATION)
    assert found.tables == expected.tables


def test_activations_need_no_calibration_data(original, directory, tmp_path):
    def never():
        raise AssertionError("calibration data were asked for")

    found = saved.inspect_saved(directory, Request(activations=True, tokens=512, dump_dir=tmp_path), original, never)
    assert found.diagnostics is not None and found.costs is None
    assert json.loads((tmp_path / "dump.json").read_text())[
        "noise"
    ]  # measured on the text, a loaded model has no sample


def test_other_calibration_data_are_noticed(original, directory):
    with pytest.raises(ConfigError, match=r"saved codes are .* dB from the weights .* --reference and --calibration"):
        saved.inspect_saved(
            directory, Request(levels=("kind",), tokens=512), original, lambda: tiny_tokens(4, 64, seed=9)
        )


def test_overrides_of_the_topology_are_those_kept_beside_the_model(original, directory, tmp_path, capsys):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "resq_topology.yaml").write_text("blocks: [{index: 7, attention: {values_fusable: false}}]")
    assert main(["inspect", str(tmp_path / "model"), "--activations", "--tokens", "512"]) == 2
    assert "7" in capsys.readouterr().err  # read, and refused: there is no such block


def test_a_reference_of_other_sizes_is_refused(directory):
    with pytest.raises(ConfigError, match=r"--reference .*model_type qwen2, the compiled model llama"):
        saved.inspect_saved(directory, REQUEST, tiny_model("qwen2"), lambda: CALIBRATION)


def test_the_recorded_source_is_used_where_it_is_still_found(original, directory, capsys):
    assert saved.recorded_source(directory) == (f"{original} (LlamaForCausalLM)", str(original))
    assert main(["inspect", str(directory), "--activations", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert f"float original: {original} (recorded in the model)" in out and "on 512 tokens" in out


def test_a_source_that_is_gone_is_asked_for(directory, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in directory.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    config = json.loads((moved / "config.json").read_text())
    config["quantization_config"]["source"] = "LlamaForCausalLM instance"
    (moved / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(moved), "--activations"]) == 2
    expected = "holds codes, not the float weights to compare with, and what it was compiled from (LlamaForCausalLM instance) is not found"
    error = capsys.readouterr().err
    assert expected in error and "--reference MODEL" in error


def test_attribution_without_a_record_of_the_calibration_asks_for_it(original, directory, capsys):
    assert main(["inspect", str(directory), "--attribute", "--reference", str(original)]) == 2
    assert "no resq_report.json that says which calibration data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("resq compile m --calibration a.txt --output o", "a.txt"),
        ("resq compile m --calibration=demo --output o", "demo"),
        ("resq compile m --output o", "self"),
        ("python own_program.py", None),
    ],
)
def test_the_calibration_data_of_a_compile_are_read_from_its_record(tmp_path, command, expected):
    assert saved.recorded_calibration(tmp_path) is None
    (tmp_path / "resq_report.json").write_text(json.dumps({"command": command}))
    assert saved.recorded_calibration(tmp_path) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--reference", "x"], "measured only with --activations or --attribute"),
        (["--activations", "--weight-bits", "8"], "--weight-bits: .* keeps the options it was compiled with"),
        (["--tokens", "600"], "nothing is measured"),
        (["--activations", "--tokens", "5"], "expected at least 512; got 5"),
        (["--activations", "--calibration", "demo"], "nothing is calibrated here"),
    ],
)
def test_flags_without_effect_are_refused(directory, flags, expected, capsys):
    assert main(["inspect", str(directory), *flags]) == 2
    assert re.search(expected, capsys.readouterr().err)
