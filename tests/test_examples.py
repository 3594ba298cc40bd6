"""Every example runs, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from resq_compiler.passes import PASSES

from resq_compiler.calibration.data import demo_text
from resq_compiler.recipes import named
from resq_compiler.recipes.text import parse, to_text
from resq_compiler.tiny import tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
FAST = ("--samples", "4", "--length", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, a text, and the model compiled by the first example."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_model("llama").save_pretrained(folder / "float")
    tiny_tokenizer().save_pretrained(folder / "float")
    (folder / "text.txt").write_text(demo_text()[0][:2000])
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """(name, *arguments) -> what the example printed."""
    monkeypatch.setattr(named, "RECIPES", dict(named.RECIPES))  # toy_recipe adds to it

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_compile_evaluate_generate(run, place):
    out = run("compile_local_model.py", place / "float", place / "text.txt", place / "compiled", *FAST)
    assert "17-quantize-kv-cache" in out and "W4A4KV4 in" in out
    out = run("evaluate.py", place / "compiled", place / "float", place / "text.txt", "--length", 64, "--windows", 2)
    assert "float perplexity" in out and "weights 4.50" in out and "SQNR" in out
    out = run("generate.py", place / "compiled", "Python is", "A", "--new-tokens", 3)
    assert out.count("[greedy]") == out.count("[sampled]") == 2
    pytest.importorskip("onnxruntime")
    out = run("export_onnx.py", place / "compiled", place / "onnx", "--prompt", "Python is", "--new-tokens", 3)
    assert out.startswith("Python is") and (place / "onnx" / "model.onnx").is_file()


def test_compile_hub_model(run, place):
    """A directory stands in for the hub: from_pretrained takes both."""
    out = run("compile_hub_model.py", place / "float", place / "hub", "--text", place / "text.txt", *FAST)
    assert "W4A4KV4 in" in out and (place / "hub" / "config.json").is_file()


def test_toy_recipe(run, monkeypatch):
    """A pass and a recipe in a file each: named, written as text and read back like those of the package."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "toy_recipe"))
    monkeypatch.setitem(
        PASSES, "prune-small-weights", None
    )  # which the recipe sets, and the end of the test takes away
    out = run("toy_recipe/recipe.py")
    text = out.splitlines()[0]
    assert ",prune-small-weights{share=0.2},quantize-weights{method=rtn}," in text
    assert "13-prune-small-weights        26 rewrites" in out and to_text(parse(text)) == text


def test_no_example_is_left_out():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in text, f"{path.name} is not tested"
        assert len(path.read_text().splitlines()) <= 80, f"{path.name} is longer than an example should be"
