"""The command line on tiny models: results, exit codes, messages, files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from resq_compiler import api
from resq_compiler.calibration.data import demo_text
from resq_compiler.cli import main
from resq_compiler.cli.commands import COMMANDS, common, options
from resq_compiler.errors import ConfigError
from resq_compiler.inspection import rates
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import tiny_model, tiny_tokenizer
from resq_compiler.util import machine

FAST = ["--threads", "1", "--calibration-samples", "4", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model with a tokenizer, a text, and the model compiled through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "float")
    tiny_tokenizer().save_pretrained(folder / "float")
    (folder / "text.txt").write_text(demo_text()[1][:2000])
    code = main.main(
        [
            "compile",
            str(folder / "float"),
            "-o",
            str(folder / "out"),
            "--calibration",
            str(folder / "text.txt"),
            "--work-dir",
            str(folder / "work"),
            *FAST,
        ]
    )
    assert code == 0
    return SimpleNamespace(
        folder=folder, model=str(folder / "float"), text=str(folder / "text.txt"), out=str(folder / "out")
    )


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = main.main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_imports_no_torch():
    program = "import sys, resq_compiler.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("False\n") and all(name in found.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("name", "busy", "before", "expected"),
    [
        ("compile", True, None, "PASSIVE"),
        ("compile", False, None, None),
        ("compile", True, "ACTIVE", "ACTIVE"),
        ("demo", True, None, None),
    ],
)
def test_threads_that_wait_sleep_beside_other_work(monkeypatch, capsys, name, busy, before, expected):
    """Unless somebody else said how they wait, or PyTorch is measured as it is."""
    monkeypatch.setattr(main, "others_compute", lambda: busy)
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")  # what was there comes back after the test
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    run(capsys, name, "--help")
    assert os.environ.get("OMP_WAIT_POLICY") == expected


@pytest.mark.parametrize(
    ("name", "before", "expected"), [("compile", None, "1"), ("compile", "0", "0"), ("demo", None, None)]
)
def test_pytorch_asks_for_huge_pages(monkeypatch, capsys, name, before, expected):
    """Unless somebody else said, or PyTorch is measured as it is."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", before or "")  # what was there comes back after the test
    if before is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    run(capsys, name, "--help")
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5 0.4 0.3 1/80 7\n", False), ("0.5 0.4 0.3 2/80 7\n", True), ("", False), (None, False)]
)
def test_whether_others_compute(monkeypatch, tmp_path, text, expected):
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(main, "LOADS", file)
    assert main.others_compute() is expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "--json" in out and "--threads" in out


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and re.match(r"resq_compiler \d+\.\d+", out)


def test_every_option_has_a_flag_and_help():
    assert set(options.HELP) == set(CompileConfig().to_dict())


def test_flags_over_file_over_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("recipe: quarot\nweight_bits: 8\nhigh_fraction: 1/16\nlm_head_bits: 8\n")
    parser = main.make_parser("compile", __import__("resq_compiler.cli.commands.compile", fromlist=["run"]))
    flags = ["--weight-bits", "3", "--gptq-act-order", "--lm-head-bits", "none"]
    config = options.chosen_passes(parser.parse_args(["compile", "m", "--config", str(file), *flags])).settings
    assert (config.recipe, config.basis, config.weight_bits) == ("quarot", "hadamard", 3)
    assert (config.high_fraction, config.lm_head_bits, config.gptq_act_order) == (1 / 16, None, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wieght_bits: 4", "unknown option 'wieght_bits'; did you mean weight_bits"),
        ("weight_bits: four", "option weight_bits: expected a whole number; got 'four'"),
        ("gptq_act_order: 1", "option gptq_act_order: expected bool; got 1"),
        ("seed: 1.5", "option seed: expected int; got 1.5"),
        ("basis: pac", "did you mean pca"),
        ("high_fraction: 0.9", "option high_fraction: expected a number from 0 to 0.5"),
        ("- 1", "expected lines such as"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_recipe_files_are_checked(capsys, tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    code, out, err = run(capsys, "compile", "m", "-o", tmp_path / "o", "--config", file)
    assert (code, out) == (2, "") and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "no/such/model", "-o", "o"], "no/such/model"),
        (["compile", "m"], "--output DIR is missing"),
        (["compile", "m", "--weight-bits", "9", "-o", "o"], "option weight_bits: expected one of 2, 3"),
        (["compile", "m", "--basis", "pac"], "did you mean pca"),
        (["compile", "m", "--threads", "0"], "at least 1"),
        (["frobnicate"], "invalid choice"),
        ([], "required"),
        (["eval", "m"], "--text --dataset"),
        (["eval", "m", "--text", "t", "--length", "1"], "--length: expected a whole number of at least 2; got 1"),
        (["generate", "m", "-p", "x", "--system", "y"], "--system needs --chat"),
        (["generate", "m", "-p", "x", "--temperature", "-1"], "--temperature"),
        (["generate", "m", "-p", "x", "--top-k", "5"], "about sampling"),
        (["demo", "--recipes", "nope"], "expected recipes out of"),
        (["demo", "--windows", "0"], "windows: expected"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_compile_writes_model_and_record(place, capsys):
    record = json.loads((place.folder / "out" / common.RECORD_FILE).read_text())
    assert record["options"]["seed"] == 0 and record["options"]["weight_bits"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert (place.folder / "work" / "fingerprint.json").is_file()  # what --work-dir is for is tested with compile()
    assert record["passes"][-1]["name"] == "quantize-kv-cache" and record["seconds"] > 0
    assert record["provenance"]["calibration"]["name"] == "text.txt" and record["source"] == "float (LlamaForCausalLM)"
    written = [path for path in (place.folder / "out").iterdir() if str(place.folder).encode() in path.read_bytes()]
    assert written == []  # no path of the machine
    recipe = yaml.safe_load((place.folder / "out" / "resq_recipe.yaml").read_text())
    assert options.read_recipe_file(place.folder / "out" / "resq_recipe.yaml") == recipe == record["options"]
    code, _, err = run(capsys, "compile", place.model, "-o", place.out, "--calibration", place.text, *FAST)
    assert code == 2 and "--overwrite" in err


def test_eval_of_a_compiled_model(place, capsys):
    arguments = ("--text", place.text, "--length", "64", "--windows", "4", "--reference", place.model, "--threads", "1")
    code, out, _ = run(capsys, "eval", place.out, *arguments)
    assert code == 0
    for word in (
        "perplexity",
        "KL divergence",
        "top-1",
        "average bits",
        "size in memory",
        "tokens/s",
        "attention_input.part0",
    ):
        assert word in out, word
    code, out, _ = run(capsys, "eval", place.out, *arguments, "--json")
    found = json.loads(out)
    assert found["windows"] == [4, 64] and found["model"]["kl"] > 0 and found["reference"]["perplexity"] > 1
    assert {"name", "kind", "bits", "block", "sqnr_db"} == set(found["noise"][0])


def test_eval_block_by_block(place, capsys, monkeypatch):
    arguments = (
        "eval",
        place.out,
        "--text",
        place.text,
        "--length",
        "64",
        "--windows",
        "4",
        "--reference",
        place.model,
        "--json",
    )
    whole, blocks = (json.loads(run(capsys, *arguments, flag)[1]) for flag in ("--no-by-block", "--by-block"))
    for who in ("model", "reference"):
        for name in ("seconds", "tokens_per_second"):
            assert blocks[who].pop(name) > 0 and whole[who].pop(name) > 0
    assert blocks["model"]["perplexity"] == whole["model"]["perplexity"]
    # the float model is run as its captured graph, whose sums have another order than those of transformers
    for who, name in (("reference", "perplexity"), ("reference", "nll"), ("model", "kl"), ("model", "top1_agreement")):
        assert blocks[who].pop(name) == pytest.approx(whole[who].pop(name), rel=1e-4)
    assert blocks == whole
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    code, _, err = run(capsys, *arguments)
    assert code == 0 and "note: block by block: the weights have" in err
    code, _, err = run(capsys, *arguments, "--by-block", "--backend", "onnx")
    assert code == 2 and "only the reference backend runs a model block by block" in err


def test_eval_of_the_float_model_equals_the_reference_column(place, capsys):
    arguments = ("--text", place.text, "--length", "64", "--windows", "4", "--threads", "1", "--json", "-q")
    plain = json.loads(run(capsys, "eval", place.model, *arguments)[1])
    beside = json.loads(run(capsys, "eval", place.out, *arguments, "--reference", place.model, "--no-noise")[1])
    # two sums of the same logits, one window at a time against all at once
    assert plain["model"]["nll"] == pytest.approx(beside["reference"]["nll"], rel=1e-9)
    assert "noise" not in beside


def test_eval_on_a_dataset_directory(place, capsys, tmp_path):
    pytest.importorskip("datasets")
    lines = [json.dumps({"words": demo_text()[1][:500]})] * 2
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    arguments = ("eval", place.out, "--dataset", tmp_path, "--length", "64", "--no-noise", "--threads", "1")
    code, out, _ = run(capsys, *arguments, "--column", "words", "--json")
    assert code == 0 and json.loads(out)["windows"][1] == 64
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "has no column 'text'; its columns: words" in err


def test_generate_streams_and_repeats(place, capsys):
    greedy = ("generate", place.out, "-p", "Python is", "-n", "5", "--threads", "1")
    code, out, err = run(capsys, *greedy)
    assert code == 0 and "tokens/s" in err
    found = json.loads(run(capsys, *greedy, "--json")[1])
    assert found["text"] == out.rstrip("\n") or found["new_tokens"] <= 5
    state = torch.random.get_rng_state()
    sampled = [run(capsys, *greedy, "--json", "--temperature", "1", "--seed", "3")[1] for _ in range(2)]
    texts = [json.loads(text)["text"] for text in sampled]
    assert texts[0] == texts[1]
    assert torch.equal(torch.random.get_rng_state(), state)  # sampling leaves the global generator alone


def test_generate_refuses_what_it_cannot_do(place, capsys):
    assert "no chat template" in run(capsys, "generate", place.out, "-p", "x", "--chat", "--threads", "1")[2]
    assert "prompt is empty" in run(capsys, "generate", place.out, "-p", "", "--threads", "1")[2]
    code, _, err = run(capsys, "generate", place.model, "-p", "x", "--backend", "onnx", "--threads", "1")
    assert code == 2 and "not a compiled model" in err


@pytest.fixture
def quick_rates(monkeypatch):
    """Measurements of the machine that take no time."""
    monkeypatch.setattr(rates, "SIDE", 32)
    monkeypatch.setattr(rates, "LONG_ENOUGH", 0.0)


def test_dry_run_reads_no_weights(place, capsys, tmp_path, quick_rates):
    (tmp_path / "config.json").write_text((place.folder / "float" / "config.json").read_text())
    code, out, _ = run(capsys, "compile", tmp_path, "--dry-run", "--json", "--recipe", "rtn")
    plan = json.loads(out)
    assert code == 0 and plan["calibration"] == "not needed" and plan["options"]["recipe"] == "rtn"
    assert plan["bytes"]["float32_weights"] == sum(p.numel() for p in tiny_model("llama").parameters()) * 4
    assert [p["name"] for p in plan["passes"]][-1] == "quantize-kv-cache"
    assert "nothing was compiled" in run(capsys, "compile", tmp_path, "--dry-run")[1]
    sized = run(capsys, "compile", tmp_path, "--dry-run", "--json", "--model-megabytes", "0.5")[1]
    assert json.loads(sized)["bytes"]["compiled"] == 500_000


def test_dry_run_plans_every_step_for_one_process_and_for_several(place, capsys, quick_rates, monkeypatch):
    _, out, _ = run(capsys, "compile", place.model, "--dry-run", "--json", "--processes", "3")
    alone, shared = json.loads(out)["forecasts"]
    assert (alone["processes"], shared["processes"]) == (1, 3) and json.loads(out)["problem"] is None
    steps = ["open and check", "calibrate", "bases", "sensitivities", "GPTQ", "write"]
    assert [step["name"] for step in alone["steps"]] == steps
    assert alone["seconds"] == pytest.approx(sum(step["seconds"] for step in alone["steps"]))
    monkeypatch.setattr(machine, "free_memory", lambda: 10**6)
    text = run(capsys, "compile", place.model, "--dry-run", "--processes", "3")[1]
    assert "in each of 3 processes: peak" in text and "fits: NO: memory: step" in text


def test_a_disk_that_is_too_small_is_said_before_the_work(place, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda place: 1000)
    monkeypatch.setattr(api, "compile", None)
    code, out, err = run(capsys, "compile", place.model, "-o", tmp_path / "out", "--calibration", place.text, *FAST)
    assert (
        (code, out) == (2, "")
        and err.startswith("error: disk: the compiled model will have about")
        and err.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_env(capsys):
    code, out, _ = run(capsys, "env", "--json")
    found = json.loads(out)
    assert (
        code == 0 and found["backends"]["reference"] == "available" and found["versions"]["torch"] == torch.__version__
    )
    assert all(state.startswith(("available", "not available: ")) for state in found["backends"].values())
    assert "threads" in run(capsys, "env")[1]


def test_python_m(place):
    found = subprocess.run([sys.executable, "-m", "resq_compiler", "eval"], capture_output=True, text=True)
    assert found.returncode == 2 and "usage: resq eval" in found.stderr


def failing_command(error):
    def fail(arguments):
        raise error

    return SimpleNamespace(run=fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("where: what\nand more"), 2, "error: where: what and more\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            ZeroDivisionError("oops"),
            1,
            "error: ZeroDivisionError: oops; this is a bug in resq_compiler; run again with --debug",
        ),
    ],
)
def test_exit_codes(capsys, error, code, message):
    arguments = SimpleNamespace(verbose=False, debug=False, threads=None)
    assert main.run(failing_command(error), arguments) == code
    assert capsys.readouterr().err.startswith(message)


def test_debug_shows_the_traceback(capsys):
    assert (
        main.run(failing_command(ZeroDivisionError("oops")), SimpleNamespace(verbose=False, debug=True, threads=None))
        == 1
    )
    assert "Traceback" in capsys.readouterr().err


def test_colour_only_on_a_terminal_without_no_color(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main.say("error", "x")
    monkeypatch.setenv("NO_COLOR", "1")
    main.say("error", "x")
    assert capsys.readouterr().err == "\x1b[31merror\x1b[0m: x\nerror: x\n"


def test_interrupted_compile_leaves_nothing(place, tmp_path):
    """A real process, stopped in the middle as `kill` does; Ctrl-C takes the same way from KeyboardInterrupt on."""
    command = [sys.executable, "-m", "resq_compiler", "compile", place.model, "-o", str(tmp_path / "o")]
    process = subprocess.Popen([*command, "--calibration", place.text, *FAST], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # the first line of progress: imports are over, the work has begun
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "error: interrupted" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())
