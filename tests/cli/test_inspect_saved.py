"""Diagnostics of a saved model: its float original is found or asked for, and equal to those taken beside the compile."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import resq_compiler
from resq_compiler.cli import inspect_saved
from resq_compiler.cli.inspect_compile import Request, inspect_model
from resq_compiler.cli.main import main
from resq_compiler.errors import ConfigError
from resq_compiler.frontend.source import ModelSource, weights_digest
from resq_compiler.pipeline.provenance import CalibrationSource, windows_digest
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
    found = inspect_saved.inspect_saved(directory, REQUEST, original, lambda: CALIBRATION)
    assert found.tables == expected.tables


def test_activations_need_no_calibration_data(original, directory, tmp_path):
    def never():
        raise AssertionError("calibration data were asked for")

    found = inspect_saved.inspect_saved(
        directory, Request(activations=True, tokens=512, dump_dir=tmp_path), original, never
    )
    assert found.diagnostics is not None and found.costs is None
    assert json.loads((tmp_path / "dump.json").read_text())[
        "noise"
    ]  # measured on the text, a loaded model has no sample


def test_other_calibration_data_are_noticed(original, directory):
    with pytest.raises(
        ConfigError, match=r"--calibration: these 256 tokens are not the 256 that .* give the same data"
    ):
        inspect_saved.inspect_saved(
            directory, Request(levels=("kind",), tokens=512), original, lambda: tiny_tokens(4, 64, seed=9)
        )


def test_overrides_of_the_topology_are_those_kept_beside_the_model(original, directory, tmp_path, capsys):
    shutil.copytree(directory, tmp_path / "model")
    (tmp_path / "model" / "resq_topology.yaml").write_text("blocks: [{index: 7, attention: {values_fusable: false}}]")
    arguments = ["inspect", str(tmp_path / "model"), "--activations", "--tokens", "512", "--reference", str(original)]
    assert main(arguments) == 2
    assert "7" in capsys.readouterr().err  # read, and refused: there is no such block


def test_a_reference_of_other_sizes_is_refused(directory):
    with pytest.raises(ConfigError, match=r"--reference .*model_type qwen2, the compiled model llama"):
        inspect_saved.inspect_saved(directory, REQUEST, tiny_model("qwen2"), lambda: CALIBRATION)


def test_a_saved_model_records_names_and_hashes(original, directory):
    found = inspect_saved.recorded_provenance(directory)
    assert found.known and found.model == ModelSource(
        "directory", original.name, "LlamaForCausalLM", weights=weights_digest(tiny_model("llama"))
    )
    assert found.calibration == CalibrationSource("given", "", 256, windows_digest(CALIBRATION))
    assert not [path for path in directory.iterdir() if str(original).encode() in path.read_bytes()]


def with_provenance(directory, target, **changes):
    """A copy of a saved model whose quantization_config says something else."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


def recorded(directory, **changes):
    """The recorded provenance with other fields of the calibration data, or of the model."""
    values = json.loads((directory / "config.json").read_text())["quantization_config"]["provenance"]
    return {kind: {**values[kind], **changes.get(kind, {})} for kind in values}


@pytest.mark.parametrize("kind", ["embedded", "hub"])
def test_a_source_that_its_name_finds_is_used(original, directory, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(inspect_saved, "embedded_model_path", lambda: original)
    monkeypatch.setattr(inspect_saved, "_in_cache", lambda name: True)
    provenance = recorded(directory, model={"kind": kind, "name": str(original)})
    named = with_provenance(directory, tmp_path / "named", provenance=provenance)
    assert main(["inspect", str(named), "--activations", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert f"float original: {original} (LlamaForCausalLM) (recorded in the model)" in out and "on 512 tokens" in out


def test_a_source_that_its_name_does_not_find_is_asked_for(original, directory, capsys):
    assert main(["inspect", str(directory), "--activations"]) == 2
    expected = f"it was compiled from {original.name} (LlamaForCausalLM), and that name does not say where to find it"
    error = capsys.readouterr().err
    assert expected in error and "--reference MODEL" in error


def test_a_model_of_other_weights_is_refused(directory):
    with pytest.raises(ConfigError, match="--reference .*has the sizes of the compiled model and other weights"):
        inspect_saved.inspect_saved(directory, REQUEST, tiny_model("llama", seed=1), lambda: CALIBRATION)


def test_what_an_older_version_kept_is_read(original, directory, tmp_path, capsys):
    """A path and a class, in words; neither hashes nor calibration data."""
    old = with_provenance(directory, tmp_path / "old", source=f"{original} (LlamaForCausalLM)", provenance=None)
    assert resq_compiler.load(old).source == f"{original.name} (LlamaForCausalLM)"
    reference = ["--reference", str(original)]
    assert main(["inspect", str(old), "--activations", "--tokens", "512", *reference]) == 0
    assert main(["inspect", str(old), "--attribute", *reference]) == 2
    assert "does not say which calibration data it was compiled with" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"saved codes are .* dB from the weights .* --reference and --calibration"):
        inspect_saved.inspect_saved(
            old, Request(levels=("kind",), tokens=512), original, lambda: tiny_tokens(4, 64, seed=9)
        )


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"kind": "file", "name": "a.txt"}, "was calibrated on the file a.txt"),
        ({}, "was calibrated on data of the program"),
    ],
)
def test_calibration_data_that_are_not_at_hand_are_asked_for(original, directory, tmp_path, capsys, calibration, said):
    model = with_provenance(directory, tmp_path / "m", provenance=recorded(directory, calibration=calibration))
    assert main(["inspect", str(model), "--attribute", "--reference", str(original)]) == 2
    error = capsys.readouterr().err
    assert said in error and "give the same data with --calibration" in error


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
