"""Where a compiled model came from: names and hashes, written and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resq_compiler.frontend.models import load_model
from resq_compiler.frontend.source import NOT_RECORDED, ModelSource, weights_digest
from resq_compiler.pipeline.provenance import CalibrationSource, Provenance, windows_digest
from resq_compiler.tiny import tiny_model, tiny_tokens

WINDOWS = tiny_tokens(2, 8)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, ("self", "")),
        ("demo", ("demo", "")),
        ("some/where/a.txt", ("file", "a.txt")),
        (Path("b.jsonl"), ("file", "b.jsonl")),
        (["a text"], ("given", "")),
    ],
)
def test_calibration_data_are_named_without_their_folder(data, expected):
    found = CalibrationSource.of(data, WINDOWS)
    assert (found.kind, found.name, found.tokens) == (*expected, 16)


def test_digests_tell_values_and_windows_apart():
    assert windows_digest(WINDOWS) == windows_digest(WINDOWS.clone()) != windows_digest(WINDOWS.flatten()[None])
    model = tiny_model("llama").to(torch.bfloat16)
    assert weights_digest(model) == weights_digest(model.float())  # the same values in another type
    before = weights_digest(model)
    next(model.parameters()).data.flatten()[0] += 1
    assert weights_digest(model) != before


def test_provenance_survives_json_and_unknown_fields():
    made = Provenance(ModelSource("hub", "a/b", "C", "0123", "ff"), CalibrationSource("file", "t.txt", 16, "ee"), True)
    values = made.to_dict()
    assert Provenance.from_config({"provenance": values}) == made
    values["model"]["of a newer version"] = 1
    assert Provenance.from_config({"provenance": values}) == made
    assert Provenance.from_config({"provenance": Provenance().to_dict()}).calibration is None


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("/a/b/model (LlamaForCausalLM)", ModelSource("directory", "model", "LlamaForCausalLM")),
        ("org/model (LlamaForCausalLM)", ModelSource("hub", "org/model", "LlamaForCausalLM")),
        ("LlamaForCausalLM instance", ModelSource("instance", "LlamaForCausalLM")),
    ],
)
def test_the_line_that_older_versions_kept_is_read(text, source):
    assert Provenance.from_config({"source": text}) == Provenance(source)


def test_sources_in_words(tmp_path):
    assert str(ModelSource("unknown", "")) == NOT_RECORDED
    tiny_model("llama").save_pretrained(tmp_path / "mine")
    loaded = load_model(tmp_path / "mine")
    assert str(loaded.source) == "mine (LlamaForCausalLM)" and str(tmp_path) in loaded.where
    assert loaded.source == ModelSource("directory", "mine", "LlamaForCausalLM")
    assert load_model(loaded) is loaded
