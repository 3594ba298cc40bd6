"""Damaged files of every format that is read: the file can still be read, or one ResqError says what is wrong."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import resq_compiler
from resq_compiler import api
from resq_compiler.analysis.overrides import read_overrides
from resq_compiler.calibration.data import calibration_windows
from resq_compiler.cli.commands.options import read_recipe_file
from resq_compiler.errors import ResqError
from resq_compiler.frontend.models import load_model
from resq_compiler.inspection.diff import compare, difference_text
from resq_compiler.inspection.page import write_page
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tests.fuzz.damage import FEW, MANY, contents, damaged, put

ONE_LAYER = {"num_hidden_layers": 1, "tie_word_embeddings": False}
TOPOLOGY = (
    b"""{"tied_embeddings": false, "blocks": [{"index": 0, "attention": {"q": "model.layers.0.self_attn.q_proj"}}]}"""
)
RECIPE = b"recipe: resq\nweight_bits: 4\nhigh_fraction: 0.125\nseed: 3\n"
ROWS = b'{"text": "one line of some text, longer than a window"}\n{"text": "and another"}\n{"messages": [{"role": "user"}]}\n'


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """Name of a format -> (its files, what reads a directory of them)."""
    place = tmp_path_factory.mktemp("formats")
    model = tiny_model("llama", **ONE_LAYER)
    model.save_pretrained(place / "float")
    tiny_tokenizer().save_pretrained(place / "float")
    options = {"weight_method": "rtn", "calibration_samples": 4, "calibration_length": 16}
    compiled = api.compile(model, tiny_tokens(4, 16), tokenizer=tiny_tokenizer(), **options)
    compiled.save_pretrained(place / "saved")
    compiled.dump(place / "dump")
    known = contents(place / "dump")
    found = {
        "saved model": (contents(place / "saved"), lambda path: resq_compiler.load(path)(tiny_tokens(1, 5))),
        "float model": (contents(place / "float"), load_model),
        "dump": (known, lambda path: (write_page(path), difference_text(compare(path, place / "dump")))),
        "topology": ({"topology.json": TOPOLOGY}, lambda path: read_overrides(path / "topology.json")),
        "recipe": ({"recipe.yaml": RECIPE}, lambda path: named.choose(**_recipe(path / "recipe.yaml"))),
        "rows": ({"rows.jsonl": ROWS}, lambda path: _windows(path / "rows.jsonl")),
        "text": (
            {"text.txt": b"one line of some text, longer than a window"},
            lambda path: _windows(path / "text.txt"),
        ),
    }
    if _has("onnxruntime"):
        from resq_compiler.backends.onnx.runtime import OnnxDecoder

        compiled.export_onnx(place / "onnx", "ort")
        exported = contents(place / "onnx")

        def open_export(path):
            """And use its settings; a graph with other bytes may compute anything, and is opened only."""
            decoder = OnnxDecoder(path, threads=1)
            if (path / "model.onnx").read_bytes() == exported["model.onnx"]:
                decoder.generate([[3, 4]], max_new_tokens=2)
            return decoder.tokenizer

        found["exported model"] = (exported, open_export)
    return found


def _has(package):
    import importlib.util

    return importlib.util.find_spec(package) is not None


def _recipe(path):
    values = read_recipe_file(path)
    values.pop("passes", None)
    return values


def _windows(path):
    return calibration_windows(path, samples=2, sequence_length=8, vocab_size=131, tokenizer=tiny_tokenizer())


def check(formats, data):
    """One file of one format is damaged, or is not there."""
    files, read = formats[data.draw(st.sampled_from(sorted(formats)))]
    name = data.draw(st.sampled_from(sorted(files)))
    changed = dict(files)
    if data.draw(st.integers(0, 9)):
        changed[name] = damaged(data.draw, files[name])
    else:
        del changed[name]
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(put(changed, Path(place)))
        except ResqError as error:
            assert str(error)


@FEW
@given(data=st.data())
def test_damaged_files(formats, data):
    check(formats, data)


@pytest.mark.slow
@MANY
@given(data=st.data())
def test_many_damaged_files(formats, data):
    check(formats, data)
