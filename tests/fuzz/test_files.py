"""Damaged files of every format that is read: the file can still be read, or one ResqError says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import strategies as st

import resq_compiler
from resq_compiler import api
from resq_compiler.analysis.overrides import read_overrides
from resq_compiler.calibration import shards, statistics
from resq_compiler.calibration.data import calibration_windows
from resq_compiler.calibration.shards import SavedStatistics
from resq_compiler.calibration.workdir import WorkDirectory, block_codes
from resq_compiler.cli.commands.common import RECORD_FILE, run_record, to_json
from resq_compiler.cli.commands.options import read_recipe_file
from resq_compiler.cli.main import make_parser
from resq_compiler.errors import ResqError
from resq_compiler.frontend.models import load_model
from resq_compiler.inspection.diff import compare, difference_text
from resq_compiler.inspection.page import write_page
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tests.fuzz.damage import FEW, MANY, contents, damaged, put
from tests.fuzz.ends import ends_of
from tests.gguf_files import small_llama

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
    model.save_pretrained(place / "float-shards", max_shard_size="50KB")
    for name in ("float", "float-shards"):
        tiny_tokenizer().save_pretrained(place / name)
    options = {"calibration_samples": 4, "calibration_length": 16, "recipe": "resq"}
    with mock.patch.object(shards, "write", wraps=shards.write) as written:
        resq_compiler.calibrate(model, tiny_tokens(4, 16), place / "statistics", **options)
    about = written.call_args[0][3]
    requests = [dataclasses.replace(request, nodes=()) for request in written.call_args[0][2]]
    compiled = api.compile(model, tiny_tokens(4, 16), tokenizer=tiny_tokenizer(), work_dir=place / "work", **options)
    compiled.save_pretrained(place / "saved")
    (place / "saved" / RECORD_FILE).write_text(to_json(run_record(compiled, 1.0)))
    compiled.save_pretrained(place / "saved-shards", max_shard_size="20KB")
    compiled.dump(place / "dump")
    known = contents(place / "dump")
    work = json.loads((place / "work" / "fingerprint.json").read_text())
    found = {
        "saved model": (contents(place / "saved"), lambda path: resq_compiler.load(path)(tiny_tokens(1, 5))),
        "saved model in parts": (
            contents(place / "saved-shards"),
            lambda path: resq_compiler.load(path)(tiny_tokens(1, 5)),
        ),
        "inspected model": (contents(place / "saved"), lambda path: command("inspect", path, "--stages")),
        "float model": (contents(place / "float"), load_model),
        "float model in parts": (contents(place / "float-shards"), load_model),
        "dump": (known, lambda path: (write_page(path), difference_text(compare(path, place / "dump")))),
        "topology": ({"topology.json": TOPOLOGY}, lambda path: read_overrides(path / "topology.json")),
        "recipe": ({"recipe.yaml": RECIPE}, lambda path: named.choose(**_recipe(path / "recipe.yaml"))),
        "rows": ({"rows.jsonl": ROWS}, lambda path: _windows(path / "rows.jsonl")),
        "text": (
            {"text.txt": b"one line of some text, longer than a window"},
            lambda path: _windows(path / "text.txt"),
        ),
        "work directory": (contents(place / "work"), lambda path: _resumed(WorkDirectory(path, work), requests)),
        "statistics": (contents(place / "statistics"), lambda path: _added(path, about, requests)),
    }
    if _has("gguf") and _has("accelerate"):
        whole = small_llama(place / "model.gguf").read_bytes()
        found["GGUF file"] = ({"model.gguf": whole}, lambda path: load_model(path / "model.gguf"))
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
        found["evaluated export"] = (
            exported,
            lambda path: command("generate", path, "--prompt", "a", "--max-new-tokens", "1"),
        )
    return found


def command(name, path, *flags):
    """A command of `resq`, with nothing between it and what it raises."""
    module = importlib.import_module(f"resq_compiler.cli.commands.{name}")
    with contextlib.redirect_stdout(io.StringIO()):
        module.run(make_parser(name, module).parse_args([name, str(path), *flags]))


def _resumed(work, requests):
    """What a compile reads as it goes on."""
    statistics.restored(copy.deepcopy(requests), work)
    block_codes(work, 0)


def _added(path, about, requests):
    saved = SavedStatistics.open([path])
    saved.check(about)
    saved.fill(copy.deepcopy(requests))


def _has(package):
    return importlib.util.find_spec(package) is not None


def _recipe(path):
    values = read_recipe_file(path)
    values.pop("passes", None)
    return values


def _windows(path):
    return calibration_windows(path, samples=2, sequence_length=8, vocab_size=131, tokenizer=tiny_tokenizer())


def check(formats, data) -> str:
    """One file of one format is damaged, or is not there."""
    files, read = formats[data.draw(st.sampled_from(sorted(formats)))]
    name = data.draw(st.sampled_from(sorted(files)))
    changed = dict(files)
    if data.draw(st.integers(0, 9)):
        changed[name] = damaged(data.draw, files[name])
    else:
        del changed[name]
    with tempfile.TemporaryDirectory() as place:
        try:
            read(put(changed, Path(place)))
        except ResqError as error:
            assert str(error)
            return "refused"
    return "read"


def test_damaged_files(formats):
    ends = ends_of(lambda data: check(formats, data), FEW)
    assert min(ends["read"], ends["refused"]) > 5, ends


@pytest.mark.slow
def test_many_damaged_files(formats):
    ends = ends_of(lambda data: check(formats, data), MANY)
    assert min(ends["read"], ends["refused"]) > 100, ends
