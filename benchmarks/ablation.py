"""What each idea beyond the paper gains or costs: the tables of docs/results/ablation.md.

    python benchmarks/ablation.py --text wikitext2-valid.txt --seeds 0 1 2 --jobs 2
    python benchmarks/ablation.py --model out/small-opt --text out/small-opt/text.txt \
        --windows 60 --window-length 256 --skip HELD_OUT --calibration-length 256

Every line is `resq` or `resq+` with one thing changed. The protocol is that of accuracy.py; KL divergence and top-1 agreement
are against the float model on the same windows. Rows are kept in --output and not run again.

What all rows share is done once: loading, capture, the exact passes before the bases, second moments and the float logits. Each row
is then a fork of that process with one thread, --jobs of them at a time; its seconds are those of the passes that follow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import accuracy
import torch

from resq_compiler.calibration import precision
from resq_compiler.calibration.data import calibration_windows, text_windows
from resq_compiler.cli import environment
from resq_compiler.cli.commands.common import model_source
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.frontend import models
from resq_compiler.frontend.capture import capture
from resq_compiler.model import CompiledModel
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.recipes.named import passes_for, resolve
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.result import CompileResult
from resq_compiler.util.text import number, table

TOKENS_ALIKE = {"gptq_token_weighting": "none"}
A_THEN_W = {**TOKENS_ALIKE, "gptq_on_quantized_activations": True}
EQUAL = {"allocation": "equal"}
MOVED = "mlp=1/4,o=0,key=1/4,value=0"
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "quarot": ("quarot", {}, "random Hadamard rotations, everything in 4 bits"),
    "resq": ("resq", {}, "the paper's method"),
    "resq+": ("resq+", {}, "the best of what follows"),
    "down hadamard": ("resq+", {"down_proj": "hadamard"}, "all of down_proj's input in 4 bits, as in the paper"),
    "block-pca": (
        "resq+",
        {"down_proj": "block-pca"},
        "principal directions of blocks of 64 channels there; 64 products a channel online",
    ),
    "no clip": ("resq+", {"activation_clip": 1.0}, "whole range of 4-bit activations"),
    "clip input": (
        "resq+",
        {"activation_clip": "input"},
        "clips searched on the error of the value, not of the linears that read it",
    ),
    "clip 0.85": ("resq+", {"activation_clip": 0.85}, "the same share of the range at every site"),
    "plain bases": ("resq+", {"basis_weighting": "none"}, "bases of activations alone, not weighted by their readers"),
    "mse clip": ("resq+", {"weight_clip": "mse"}, "weight scales searched on the weights alone"),
    "no act-order": ("resq+", {"gptq_act_order": False}, "columns in the order of the basis"),
    "tokens alike": (
        "resq+",
        TOKENS_ALIKE,
        "GPTQ counts massive tokens by their size; what `A then W` starts from",
    ),
    "orthogonal": ("resq+", {"rotation": "orthogonal"}, "random orthogonal rotations, not randomized Hadamard"),
    "A then W": ("resq+", A_THEN_W, "GPTQ sees quantized activations"),
    "key head": ("resq+", {"key_basis": "head"}, "U_C for each key/value head"),
    "equal shares": ("resq+", EQUAL, "1/8 of the columns in 8 bits at every site, whatever the forecast"),
    "always shared": (
        "resq+",
        {"average_bits": 4.5},
        "8-bit columns shared out by sensitivity, however little the forecast gains",
    ),
    "widths": (
        "resq+",
        {"allocation": "widths", "average_bits": 4.5},
        "the same budget, high columns of 5 to 8 bits, low ones of 2",
    ),
    "1/4 at 6 bits": (
        "resq+",
        {**EQUAL, "high_fraction": 1 / 4, "high_bits": 6},
        "the same 4.5 bits: twice the high columns, 6 bits each",
    ),
    "8/4/2": ("resq+", {**EQUAL, "low_fraction": 1 / 8}, "1/8 of the columns in 2 bits: 4.25 average bits"),
    "6/4/2": ("resq+", {**EQUAL, "low_fraction": 1 / 8, "high_bits": 6}, "the paper's split at 4 average bits"),
    "5 bits": ("resq+", {"average_bits": 5.0}, "a budget of 5 average bits, shared out by sensitivity"),
    "bits moved": ("resq+", {**EQUAL, "site_fractions": MOVED}, "more 8-bit columns for mlp inputs and keys"),
    "damping 0.01": ("resq+", {"gptq_damping": 0.01}, "GPTQ's usual damping"),
    "kv clip": ("resq+", {"kv_clip": 0.95}, "0.95 of the range of keys and values"),
    "o per token": ("resq+", {"o_proj_granularity": "token"}, "one scale a token for the input of output projections"),
    "prefix": (
        "resq+",
        {"prefix_tokens": "auto"},
        "tokens with massive activations before every sequence (PrefixQuant)",
    ),
    "self-written": ("resq+", {}, "calibrated on text that the model writes"),
    "4 windows": ("resq+", {"calibration_samples": 4}, "calibrated on 4 windows of text only"),
    "64 windows": ("resq+", {"calibration_samples": 64}, "calibrated on 64 windows"),
    "112 windows": ("resq+", {"calibration_samples": 112}, "calibrated on 112 windows"),
}


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    jobs = {(name, seed): make_job(arguments, name, seed) for seed in arguments.seeds for name in arguments.variants}
    base = make_job(arguments, "resq", 0) | {"recipe": "float", "weight_method": "-", "options": {}}
    known = accuracy.read_rows(arguments.output)
    missing = [job for job in (base, *jobs.values()) if accuracy.key(job) not in known]
    if missing:
        run_all(arguments, base, missing)
        known = accuracy.read_rows(arguments.output)
    rows = {name: [known[accuracy.key(jobs[name, seed])] for seed in arguments.seeds] for name in arguments.variants}
    sys.stdout.write(make_table(rows, known[accuracy.key(base)]) + "\n")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accuracy.add_protocol(parser)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of all rows but where a row changes them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each with one thread (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("ablation.jsonl"), help="rows, one JSON object a line")
    arguments = parser.parse_args()
    if arguments.text is None:
        parser.error("--text FILE is missing")
    return arguments


def settings(recipe: str, **options: Any) -> CompileConfig:
    """Settings with the dtype of calibration that this machine takes."""
    config = resolve(recipe, **options)
    return dataclasses.replace(config, calibration_dtype=precision.resolve(config.calibration_dtype))


def make_job(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What a row is known by."""
    recipe, options, _ = VARIANTS[name]
    sizes = {n: getattr(arguments, n) for n in ("calibration_samples", "calibration_length")}
    job = {
        "recipe": recipe,
        "weight_method": "gptq",
        "seed": seed,
        "options": {**sizes, **accuracy.given(arguments), **options},
    }
    return {**accuracy.protocol(arguments), **job, "compare": True, "self_written": name == "self-written"}


class Bench:
    """The float model up to the point where rows part, and what they are compared with."""

    @torch.no_grad()
    def __init__(self, arguments: argparse.Namespace, base: dict[str, Any]):
        torch.set_num_threads(1)  # a fork of a process with a pool of threads may hang
        self.text = arguments.text
        self.loaded = models.load_model(model_source(arguments.model))
        self.windows = text_windows(
            self.text, self.loaded.tokenizer, arguments.window_length, arguments.windows, skip=arguments.skip,
            bos=arguments.bos,
        )  # fmt: skip
        if len(self.windows) < arguments.windows:
            raise SystemExit(
                f"error: {self.text}: {len(self.windows)} windows, expected {arguments.windows}; give a longer text"
            )
        self.logits = {tuple(w.tolist()): self.loaded.model(w[None]) for w in self.windows}
        captured = capture(self.loaded.model)
        self.gm, self.cache = captured.graph_module, captured.cache
        sizes = {n: getattr(arguments, n) for n in ("calibration_samples", "calibration_length")}
        self.config = settings("resq+", **sizes)
        bos = self.loaded.model.config.get_text_config().bos_token_id
        self.ctx = PassContext(
            captured.example_inputs, self.calibration(base), bos_token=bos, calibration_dtype=self.config.calibration_dtype,
            basis_samples=self.config.basis_samples,
        )  # fmt: skip
        self.pipeline = Pipeline(self.ctx)
        self.pipeline.start(self.gm)
        first = passes_for(self.config)
        self.shared = [p.name for p in first].index("find-topology") + 1  # recipes part there: not all fold norms
        self.pipeline.run(self.gm, first[: self.shared])

    def reference(self, ids: torch.Tensor) -> Any:
        """The float model on one of the windows."""
        return self.logits[tuple(ids[0].tolist())]

    def calibration(self, job: dict[str, Any]) -> torch.Tensor:
        """Windows of the text's beginning, or of what the model writes."""
        own = job.get("self_written")
        return calibration_windows(
            None if own else self.text, model=self.loaded.model, tokenizer=self.loaded.tokenizer, seed=job["seed"], bos=job["bos"],
            samples=job["options"].get("calibration_samples", 1), sequence_length=job["options"].get("calibration_length", 1),
            vocab_size=self.loaded.model.config.get_text_config().vocab_size, progress=lambda done, total: None,
        )  # fmt: skip

    @torch.no_grad()
    def row(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run the passes that a job asks for and evaluate; call it in a fork, it changes the graph."""
        row = {**job, "load_before": environment.load_average(), "threads": torch.get_num_threads()}
        model, seconds = self.loaded.model, 0.0
        if job["recipe"] != "float":
            config = settings(job["recipe"], weight_method="gptq", seed=job["seed"], **job["options"])
            began = time.perf_counter()
            ctx = dataclasses.replace(
                self.ctx, seed=config.seed, calibration_dtype=config.calibration_dtype, basis_samples=config.basis_samples,
                notes=[], lines=[],
            )  # fmt: skip
            ctx.calibration = self.calibration(job)
            self.pipeline.ctx = ctx
            self.pipeline.run(self.gm, passes_for(config)[self.shared :])
            seconds = time.perf_counter() - began
            model = CompiledModel(CompileResult(self.gm, config, self.cache, model.config, model.generation_config))
        found = evaluate(model, self.windows, self.reference)
        row |= {
            "perplexity": found.perplexity,
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "compile_seconds": seconds,
        }
        return {**row, "versions": environment.versions(), "cpu": environment.cpu()["model"]}


def run_all(arguments: argparse.Namespace, base: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
    """Fork for every job, --jobs at a time; each appends its row to --output."""
    sys.stderr.write("load, capture, calibrate ...\n")
    bench = Bench(arguments, {**base, "options": make_job(arguments, "resq", 0)["options"]})
    running: set[int] = set()
    for i, job in enumerate(jobs, 1):
        while len(running) >= arguments.jobs:
            running.discard(wait())
        sys.stderr.write(f"[{i}/{len(jobs)}] {job['recipe']} {job['options']} seed {job['seed']}\n")
        running.add(fork(bench, job, arguments.output))
    while running:
        running.discard(wait())


def fork(bench: Bench, job: dict[str, Any], output: Path) -> int:
    """Start a row in a process of its own."""
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        line = json.dumps(bench.row(job)) + "\n"
        with output.open("a", encoding="utf-8") as file:
            file.write(line)
        code = 0
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(code)


def wait() -> int:
    """The next process that ends; stop if it failed."""
    child, status = os.wait()
    if status:
        sys.exit("error: a row failed; its message is above, rows that were finished are kept")
    return child


def make_table(rows: dict[str, list[dict[str, Any]]], base: dict[str, Any]) -> str:
    """Markdown: means over seeds, and the spread of perplexity (largest minus smallest)."""
    lines = [("float32", number(base["perplexity"]), "", "1", "", "", "", "")]
    for name, members in rows.items():
        values = [row["perplexity"] for row in members]
        mean = statistics.fmean(values)
        lines.append(
            (
                name, number(mean), number(max(values) - min(values)), number(mean / base["perplexity"]),
                number(statistics.fmean(row["kl"] for row in members)),
                number(100 * statistics.fmean(row["top1_agreement"] for row in members), 1),
                number(statistics.median(row["compile_seconds"] for row in members), 0), VARIANTS[name][2],
            )
        )  # fmt: skip
    header = ("variant", "perplexity", "spread", "x float", "KL", "top-1 %", "compile s", "what it is")
    return table(header, lines, markdown=True)


if __name__ == "__main__":
    main()
