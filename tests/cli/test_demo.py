"""The demo on a tiny model: everything it writes and prints."""

from __future__ import annotations

import json

import pytest

from resq_compiler.cli import demo, main
from resq_compiler.errors import ConfigError
from resq_compiler.inspection.saved import recorded_source
from resq_compiler.storage.checkpoint import load
from resq_compiler.tiny import tiny_model, tiny_tokenizer

SMALL = [
    "--calibration-samples",
    "4",
    "--calibration-length",
    "32",
    "--windows",
    "2",
    "--window-length",
    "64",
    "--new-tokens",
    "3",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_demo_writes_model_and_report(model, tmp_path, capsys):
    arguments = ["demo", "--model", str(model), "-o", str(tmp_path), "--recipes", "resq", "rtn", "--threads", "1"]
    assert main.main([*arguments, *SMALL]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "report.json").read_text())
    assert list(result["recipes"]) == ["resq", "rtn"]
    for name, entry in result["recipes"].items():
        assert entry["model"]["kl"] > 0 and entry["seconds"] > 0 and len(entry["texts"]) == len(demo.PROMPTS)
        assert f"{name} W4A4KV4" in out
    assert result["tokens"] == {"calibration": 128, "evaluation": 128}
    assert result["float"]["perplexity"] > 1 and f"{result['float']['perplexity']:.3f}" in out
    assert load(tmp_path / "model").options.recipe == "resq"
    assert recorded_source(tmp_path / "model")[1] == str(model)
    written = (tmp_path / "report.md").read_text()
    assert written.startswith("# ") and all(prompt in written and prompt in out for prompt in demo.PROMPTS)
    assert main.main([*arguments, *SMALL, "--json", "--recipes", "rtn"]) == 0  # again, over what is there
    assert json.loads(capsys.readouterr().out)["recipes"].keys() == {"rtn"}
    assert load(tmp_path / "model").options.recipe == "rtn"


def test_unknown_recipes_are_refused():
    with pytest.raises(ConfigError, match=r"expected recipes out of resq, resq\+, quarot"):
        demo.DemoOptions(recipes=("resq", "best"))
    with pytest.raises(ConfigError, match="got none"):
        demo.DemoOptions(recipes=())


@pytest.mark.slow
def test_demo_on_the_embedded_model(tmp_path, capsys):
    """The order that the method promises, on a real model: ResQ before QuaRot before rounding."""
    small = ["--calibration-samples", "16", "--windows", "2", "--new-tokens", "8"]
    assert main.main(["demo", "-o", str(tmp_path), *small]) == 0
    recipes = json.loads((tmp_path / "report.json").read_text())["recipes"]
    found = {name: entry["model"]["perplexity"] for name, entry in recipes.items()}
    assert found["resq+"] < found["resq"] < found["quarot"] < found["rtn"]
