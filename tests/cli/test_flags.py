"""Every flag has an effect, or is refused where it would have none."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch

import resq_compiler
from resq_compiler.cli import main
from resq_compiler.cli.commands import options
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import tiny_model, tiny_tokenizer, tiny_tokens

SAMPLES: dict[str, tuple[str, object]] = {
    "recipe": ("quarot", "quarot"), "weight_bits": ("3", 3), "activation_bits": ("8", 8), "kv_bits": ("16", 16),
    "high_bits": ("6", 6), "high_fraction": ("1/16", 1 / 16), "site_fractions": ("mlp=1/4", "mlp=1/4"),
    "expert_bits": ("0=4432/8866", "0=4432/8866"),
    "allocation": ("sensitivity", "sensitivity"), "average_bits": ("4.75", 4.75), "model_megabytes": ("0.5", 0.5),
    "low_bits": ("3", 3), "low_fraction": ("1/16", 1 / 16), "rank_multiple": ("16", 16), "basis": ("hadamard", "hadamard"),
    "basis_weighting": ("readers", "readers"), "key_basis": ("head", "head"), "online_basis": ("shared", "shared"),
    "rotation": ("orthogonal", "orthogonal"),
    "down_proj": ("energy-split", "energy-split"), "weight_method": ("rtn", "rtn"), "weight_clip": ("hessian", "hessian"),
    "gptq_damping": ("0.1", 0.1), "gptq_act_order": ("", True), "gptq_on_quantized_activations": ("", True),
    "gptq_token_weighting": ("residual", "residual"), "activation_clip": ("input", "input"), "kv_clip": ("0.9", 0.9),
    "o_proj_granularity": ("token", "token"), "prefix_tokens": ("auto", "auto"), "lm_head_bits": ("8", 8),
    "calibration_samples": ("8", 8), "calibration_length": ("64", 64), "basis_samples": ("4", 4),
    "weight_group_size": ("64", 64), "activation_group_size": ("64", 64),
    "smooth_alpha": ("0.75", 0.75), "scale_search": ("", True), "outlier_threshold": ("5", 5.0),
    "learn_rotations": ("divergence", "divergence"), "learn_pairs": ("", True), "learn_blocks": ("", True), "learn_scales": ("", True),
    "learn_codes": ("", True),
    "learning_steps": ("20", 20), "learning_rate": ("0.01", 0.01),
    "expert_tokens": ("64", 64), "calibrate_all_experts": ("", True), "unreached_experts": ("layer", "layer"),
    "calibration_routing": ("quantized", "quantized"), "spread_outliers": ("", True), "activation_scales": ("static", "static"),
    "calibration_dtype": ("float32", "float32"), "hidden_dtype": ("bfloat16", "bfloat16"), "bos": ("never", "never"), "seed": ("7", 7),
}  # fmt: skip
"""What is given for each option on the command line, and what it means; none of them is the default."""


def parsed(command, *arguments):
    module = importlib.import_module(f"resq_compiler.cli.commands.{command}")
    return main.make_parser(command, module).parse_args([command, *arguments])


def test_every_option_has_a_sample():
    assert SAMPLES.keys() == {f.name for f in dataclasses.fields(CompileConfig)}


BESIDE = {
    "smooth_alpha": ["rtn"], "scale_search": ["rtn"], "spread_outliers": ["rtn"], "outlier_threshold": ["llm-int8"],
    "learn_rotations": ["spinquant"], "learn_pairs": ["spinquant"], "learn_scales": ["resq-trained"],
    "learn_codes": ["resq-trained", "--learn-scales"],
    "learn_blocks": ["rtn", "--gptq-on-quantized-activations"],
}  # fmt: skip
"""Recipes, and flags, that options go with which do not go with the recipe resq."""


@pytest.mark.parametrize("name", SAMPLES)
def test_an_option_reaches_the_compiler(name):
    text, meant = SAMPLES[name]
    plain = (
        ["compile", "m"] if name == "recipe" else ["compile", "m", "--recipe", *BESIDE.get(name, ["resq"])]
    )  # whose values are the defaults
    default = getattr(options.chosen_passes(parsed(*plain)).settings, name)
    flag = "--" + name.replace("_", "-")
    config = options.chosen_passes(parsed(*plain, flag, *([text] if text else []))).settings
    assert getattr(config, name) == meant != default


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A float model with a tokenizer, two compiles of it with dumps, and a text."""
    folder = tmp_path_factory.mktemp("flags")
    model = tiny_model("llama")
    model.save_pretrained(folder / "float")
    tiny_tokenizer().save_pretrained(folder / "float")
    for bits in (4, 8):
        compiled = resq_compiler.compile(
            model, tiny_tokens(2, 32), recipe="rtn", weight_bits=bits, tokenizer=tiny_tokenizer(), dump_dir=folder / f"dump{bits}"
        )  # fmt: skip
        compiled.save_pretrained(folder / f"w{bits}")
    (folder / "text.txt").write_text(" ".join(str(i) for i in range(600)))
    return SimpleNamespace(
        folder=folder, float=str(folder / "float"), out=str(folder / "w4"), text=str(folder / "text.txt")
    )


def run(capsys, *arguments):
    code = main.main([str(a) for a in (*arguments, "--threads", "1")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def evaluate(capsys, place, *flags):
    code, out, _ = run(capsys, "eval", place.out, "--text", place.text, "--length", "32", "--json", "-q", *flags)
    assert code == 0
    return json.loads(out)


def test_eval_flags(place, capsys):
    whole = evaluate(capsys, place)
    assert "noise" in whole and "noise" not in evaluate(capsys, place, "--no-noise")
    few = evaluate(capsys, place, "--windows", "2", "--no-noise")
    assert few["windows"] == [2, 32] and whole["windows"][0] > 2
    later = evaluate(capsys, place, "--windows", "2", "--skip", "32", "--no-noise")
    assert later["model"]["nll"] != few["model"]["nll"]
    together = evaluate(capsys, place, "--windows", "2", "--batch-size", "2", "--no-noise")
    assert together["model"]["nll"] == pytest.approx(
        few["model"]["nll"], rel=1e-6
    )  # the same windows, summed in another order
    table = ("eval", place.out, "--text", place.text, "--length", "32", "--windows", "1")
    by_place, every = run(capsys, *table)[1], run(capsys, *table, "--all-sites")[1]
    assert "blocks.1.down_input" in every and re.search(r"^down_input", by_place, re.MULTILINE)


def test_common_flags(place, capsys):
    inspect = ("inspect", place.float, "--dump", place.folder / "d", "--recipe", "rtn", "--kv-bits", "16")
    quiet, loud, verbose = (run(capsys, *inspect, *flag)[2] for flag in (["-q"], [], ["-v"]))
    assert quiet == "" and loud and "INFO" in verbose and "INFO" not in loud
    assert torch.get_num_threads() == 1
    assert json.loads(run(capsys, *inspect, "-q", "--json")[1])["dump"] == str(place.folder / "d")


def test_diff_limit(place, capsys):
    dumps = ("diff", place.folder / "dump4", place.folder / "dump8")
    full, short = (run(capsys, *dumps, "--limit", n)[1].splitlines() for n in (50, 1))
    assert len(short) < len(full)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "OUT", "--text", "TEXT", "--split", "train"], "--split: says something about a data set"),
        (
            ["eval", "OUT", "--text", "TEXT", "--dataset-config", "a"],
            "--dataset-config: says something about a data set",
        ),
        (
            ["eval", "OUT", "--text", "TEXT", "--all-sites", "--no-noise"],
            "--all-sites: there is no table with --no-noise",
        ),
        (["eval", "FLOAT", "--text", "TEXT", "--all-sites"], "--all-sites: .* has no quantizers"),
        (["eval", "FLOAT", "--text", "TEXT", "--noise"], "--noise: .* has no quantizers"),
        (["inspect", "FLOAT", "--stages"], "--stages: .* is not a compiled model"),
        (["inspect", "OUT", "--stages", "--activations"], "--stages: .* not shown beside measurements"),
        (["inspect", "FLOAT", "--topology", "--activations"], "--topology: shows what is found before a compile"),
        (["inspect", "OUT", "--topology"], "--topology and --topology-file: .* is a compiled model"),
        (["diff", "OUT", "OUT", "--limit", "-1"], "--limit: expected a whole number of at least 0; got -1"),
    ],
)
def test_a_flag_without_effect_is_refused(place, capsys, arguments, message):
    named = {"OUT": place.out, "FLOAT": place.float, "TEXT": place.text}
    code, out, err = run(capsys, *(named.get(a, a) for a in arguments))
    assert (code, out) == (2, "") and re.search(message, err) and err.count("\n") == 1
