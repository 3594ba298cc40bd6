"""What each idea beyond the paper gains or costs: the ablation table of the README.

    python benchmarks/ablation.py --text wikitext2-valid.txt --seeds 0 1 2
    python benchmarks/ablation.py --model out/small-opt --text out/small-opt/text.txt \
        --windows 60 --window-length 256 --skip HELD_OUT --calibration-length 256

Every line is `resq` or `resq+` with one thing changed. The protocol is that of accuracy.py; KL divergence and top-1 agreement
are against the float model on the same windows. Rows are kept in --output and not run again; every one has its own process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import accuracy

from resq_compiler.tables import number, table

PLAIN_GPTQ = {"gptq_sweeps": 0, "gptq_token_weighting": "none"}  # what corrections can be combined with
A_THEN_W = {**PLAIN_GPTQ, "gptq_on_quantized_activations": True}
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "resq": ("resq", {}, "the paper's method"),
    "resq+": ("resq+", {}, "the best of what follows"),
    "down hadamard": ("resq+", {"down_proj": "hadamard"}, "all of down_proj's input in 4 bits, as in the paper"),
    "no clip": ("resq+", {"activation_clip": 1.0}, "whole range of 4-bit activations"),
    "clip 0.85": ("resq+", {"activation_clip": 0.85}, "the same share of the range at every site"),
    "plain bases": ("resq+", {"basis_weighting": "none"}, "bases of activations alone, not weighted by their readers"),
    "mse clip": ("resq+", {"weight_clip": "mse"}, "weight scales searched on the weights alone"),
    "no act-order": ("resq+", {"gptq_act_order": False}, "columns in the order of the basis"),
    "no sweeps": ("resq+", {"gptq_sweeps": 0}, "GPTQ without coordinate descent after it"),
    "tokens alike": ("resq+", {"gptq_token_weighting": "none"}, "GPTQ counts massive tokens by their size"),
    "orthogonal": ("resq+", {"rotation": "orthogonal"}, "random orthogonal rotations, not randomized Hadamard"),
    "plain GPTQ": ("resq+", PLAIN_GPTQ, "neither sweeps nor token weights: what the next four start from"),
    "A then W": ("resq+", A_THEN_W, "GPTQ sees quantized activations"),
    "GPTAQ": ("resq+", {**A_THEN_W, "gptq_correction": "gptaq"}, "asymmetric calibration"),
    "output": ("resq+", {**A_THEN_W, "gptq_correction": "output"}, "weights aim at the float layer's output, nearly Qronos"),
    "residual": ("resq+", {**A_THEN_W, "gptq_correction": "residual"}, "weights aim at the float residual stream too"),
    "key head": ("resq+", {"key_basis": "head"}, "U_C for each key/value head"),
    "bits moved": ("resq+", {"site_fractions": "mlp=1/4,o=0,key=1/4,value=0"}, "more 8-bit columns for mlp inputs and keys"),
    "budget": ("resq+", {"average_bits": 4.5}, "8-bit columns shared out by allocate-bits"),
    "kv clip": ("resq+", {"kv_clip": 0.95}, "0.95 of the range of keys and values"),
    "o per token": ("resq+", {"o_proj_granularity": "token"}, "one scale a token for the input of output projections"),
    "self-written": ("resq+", {}, "calibrated on text that the model writes"),
    "1/4 of the text": ("resq+", {"calibration_samples": 16}, "a quarter of the calibration tokens"),
}


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    jobs = {(name, seed): make_job(arguments, name, seed) for name in arguments.variants for seed in arguments.seeds}
    base = make_job(arguments, "resq", 0) | {"recipe": "float", "weight_method": "-", "options": {}}
    known = accuracy.read_rows(arguments.output)
    wanted = {("float", 0): base, **jobs}
    for i, ((name, seed), job) in enumerate(wanted.items(), 1):
        if accuracy.key(job) not in known:
            sys.stderr.write(f"[{i}/{len(wanted)}] {name} seed {seed}\n")
            row = known[accuracy.key(job)] = accuracy.in_own_process(job)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    rows = {name: [known[accuracy.key(jobs[name, seed])] for seed in arguments.seeds] for name in arguments.variants}
    sys.stdout.write(make_table(rows, known[accuracy.key(base)]) + "\n")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accuracy.add_protocol(parser)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("ablation.jsonl"), help="rows, one JSON object a line")
    arguments = parser.parse_args()
    if arguments.text is None:
        parser.error("--text FILE is missing")
    return arguments


def make_job(arguments: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """What accuracy.py needs to run a variant."""
    recipe, options, _ = VARIANTS[name]
    sizes = {n: getattr(arguments, n) for n in ("calibration_samples", "calibration_length")}
    job = {"recipe": recipe, "weight_method": "gptq", "seed": seed, "options": {**sizes, **options}, "compare": True}
    return {**accuracy.protocol(arguments), **job, "self_written": name == "self-written"}


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
