"""The demo on a tiny model: everything it writes and prints."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex

import pytest

from resq_compiler.api import load
from resq_compiler.cli import demo, main
from resq_compiler.cli.commands import demo as command
from resq_compiler.cli.inspect_saved import recorded_provenance
from resq_compiler.errors import ConfigError
from resq_compiler.recipes.named import RECIPES
from resq_compiler.tiny import tiny_model, tiny_tokenizer

SMALL = ["--calibration-samples=4", "--calibration-length=32", "--windows=2", "--window-length=64", "--new-tokens=3"]
CHAT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


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
    assert list(result["recipes"]) == ["resq", "rtn"] and result["prompts"] == list(demo.OPENINGS)
    for name, entry in result["recipes"].items():
        assert entry["model"]["kl"] > 0 and entry["seconds"] > 0 and len(entry["texts"]) == len(demo.OPENINGS)
        assert f"{name} W4A4KV4" in out
    assert "speed" in result["recipes"]["resq"] and "speed" not in result["recipes"]["rtn"]
    assert "tokens per second" in out or "Speed was not measured: " in out
    assert result["tokens"] == {"calibration": 128, "evaluation": 128}
    assert "Calibrated on 128 tokens, evaluated on 128 others.\nThat is little" in out
    assert "equal shares" in out and load(tmp_path / "model").options.allocation == "equal"
    assert result["float"]["perplexity"] > 1 and f"{result['float']['perplexity']:.3f}" in out
    assert load(tmp_path / "model").options.recipe == "resq"
    provenance = recorded_provenance(tmp_path / "model")
    assert (provenance.model.kind, provenance.model.name) == ("directory", model.name)
    assert provenance.calibration is not None and (provenance.calibration.kind, provenance.calibration.tokens) == (
        "demo",
        128,
    )
    assert str(model) not in (tmp_path / "report.json").read_text()
    written = (tmp_path / "report.md").read_text()
    for words in (shlex.split(line, comments=True)[1:] for line in out.partition("Try next:")[2].splitlines()[1:3]):
        words = words[words.index("generate" if "generate" in words else "inspect") :]
        assert main.main([*words, "--threads", "1"]) == 0, words
    assert "Kinds of sites" in capsys.readouterr().out
    assert written.startswith("# ") and all(f"{text} ..." in written and text in out for text in demo.OPENINGS)
    assert main.main([*arguments, *SMALL, "--json", "--recipes", "rtn"]) == 0  # again, over what is there
    assert json.loads(capsys.readouterr().out)["recipes"].keys() == {"rtn"}
    assert load(tmp_path / "model").options.recipe == "rtn"


def test_a_model_with_a_chat_template_is_asked_questions(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    assert demo.prompts(tokenizer) == demo.QUESTIONS
    batch = demo._encode_prompts(tokenizer)
    assert tokenizer.decode(batch["input_ids"][0]).replace("<pad>", "") == f"[{demo.QUESTIONS[0]}]>"
    tiny_model("llama").save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    arguments = ["demo", "--model", str(tmp_path / "float"), "-o", str(tmp_path / "out"), "--recipes", "rtn"]
    assert main.main([*arguments, *SMALL]) == 0
    out = capsys.readouterr().out
    assert all(f"{question}\n  float32" in out for question in demo.QUESTIONS)


def test_commands_to_try_next_parse(tmp_path):
    for chat in (True, False):
        first, *commands = demo.next_steps("resq", tmp_path / "a model", "embedded", chat).splitlines()
        assert first == "Try next:" and len(commands) == 3
        for words in (shlex.split(line, comments=True)[1:] for line in commands):
            module = importlib.import_module(f"resq_compiler.cli.commands.{words[0]}")
            main.make_parser(words[0], module).parse_args(words)


def parsed(*words):
    return command.options_of(main.make_parser("demo", command).parse_args(["demo", "--model", "some/model", *words]))


def test_the_quick_and_the_full_setting():
    quick, full = parsed(), parsed("--all")
    assert quick == demo.DemoOptions(model="some/model") and quick.recipes == ("resq+", "quarot")
    assert full.recipes == demo.EVERY_RECIPE and set(full.recipes) | set(demo.LEARNED) == set(RECIPES)
    assert (full.calibration_samples, full.windows, full.window_length, full.search_shares) == (32, 6, 1024, True)
    assert parsed("--all", "--recipes", "rtn", "--windows", "3", "--seed", "5") == dataclasses.replace(
        full, recipes=("rtn",), windows=3, seed=5
    )
    with pytest.raises(ConfigError, match="windows: expected a whole number of at least 1; got 0"):
        parsed("--windows", "0")


def test_the_setting_says_what_was_left_out():
    result = {"tokens": {"calibration": 16384, "evaluation": 6144}, "search_shares": True}
    assert demo.setting(result) == "Calibrated on 16,384 tokens, evaluated on 6,144 others."
    quick = {"tokens": {"calibration": 4096, "evaluation": 2048}, "search_shares": False}
    assert [line.partition(":")[0] for line in demo.setting(quick).splitlines()] == [
        "Calibrated on 4,096 tokens, evaluated on 2,048 others.",
        "That is little, to be quick",
        "To be quick, 8-bit columns have equal shares at all sites",
        "All of it",
    ]


def test_unknown_recipes_are_refused():
    with pytest.raises(ConfigError, match=r"expected recipes out of resq, resq\+, quarot"):
        demo.DemoOptions(recipes=("resq", "best"))
    with pytest.raises(ConfigError, match="got none"):
        demo.DemoOptions(recipes=())


@pytest.mark.slow
def test_demo_on_the_embedded_model(tmp_path, capsys):
    """The order that the method promises, on a real model: ResQ before QuaRot before rounding."""
    recipes = ("resq+", "resq", "quarot", "rtn")
    small = ["--recipes", *recipes, "--calibration-samples", "16", "--windows", "2", "--new-tokens", "8"]
    assert main.main(["demo", "-o", str(tmp_path), *small]) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    found = [result["recipes"][name]["model"]["perplexity"] for name in recipes]
    assert found == sorted(found) and result["chat"]
