"""The table of docs/results/accuracy.md: perplexity of compiled models, and what compiling cost.

    python benchmarks/accuracy.py --text wikitext2-valid.txt --recipes resq quarot --seeds 0 1 2 --weight-method rtn gptq

Windows hold tokens of the text alone, as in papers; with --bos each begins as the tokenizer begins a text.
Calibration: the first 32768 tokens as 64 windows of 512. Evaluation: tokens 60000 to
100960 as 20 windows of 2048, perplexity over all predicted positions, float32 between the integers. Every row runs in a
process of its own, so that its peak memory is its own, and is appended to --output; rows that are there are not run again.

"float tok/s" says how fast the machine was just then: the float model in eager PyTorch on a prompt of 512 tokens, median of 5.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from resq_compiler.cli import environment
from resq_compiler.cli.commands.common import EMBEDDED, model_source
from resq_compiler.cli.commands.options import convert
from resq_compiler.util.text import number, table

OWN_METHOD = {"rtn": "rtn", "gptq": "gptq"}  # recipes that are named after theirs
WEIGHT_PASSES = ("quantize-weights",)
BASIS_PASSES = ("compute-bases",)


def main() -> None:
    """Run what is missing and print the table."""
    arguments = parse()
    if arguments.job:
        sys.stdout.write(json.dumps(run_job(json.loads(arguments.job))) + "\n")
        return
    jobs = make_jobs(arguments)
    known = read_rows(arguments.output)
    for i, job in enumerate(jobs, 1):
        if key(job) in known:
            continue
        sys.stderr.write(f"[{i}/{len(jobs)}] {job['recipe']} {job['weight_method']} seed {job['seed']}\n")
        run_one(job, known, arguments.output)
    sys.stdout.write(make_table([known[key(job)] for job in jobs]) + "\n")


def run_one(job: dict[str, Any], known: dict[str, dict[str, Any]], output: Path) -> None:
    """Run a job and keep its row."""
    row = in_own_process(job)
    known[key(job)] = row
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_protocol(parser)
    parser.add_argument("--recipes", nargs="+", default=["resq", "quarot"])
    parser.add_argument("--weight-method", nargs="+", default=["rtn", "gptq"], choices=["rtn", "gptq"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of the compiler")
    parser.add_argument("--output", type=Path, default=Path("accuracy.jsonl"), help="rows, one JSON object a line")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.job and arguments.text is None:
        parser.error("--text FILE is missing")
    return arguments


def add_protocol(parser: argparse.ArgumentParser) -> None:
    """What is compiled, calibrated on and evaluated."""
    parser.add_argument("--text", type=Path, help="a .txt file")
    parser.add_argument("--model", default=EMBEDDED, help="directory, .gguf, hub id, or `embedded` (default)")
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--skip", type=int, default=60000, help="tokens before the evaluated ones (default: 60000)")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window-length", type=int, default=2048)
    parser.add_argument(
        "--bos",
        action="store_const",
        const="auto",
        default="never",
        help="windows begin as the tokenizer begins a text",
    )


def protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same, as it is kept in rows."""
    return {
        "model": arguments.model, "text": str(arguments.text), "skip": arguments.skip, "windows": arguments.windows,
        "text_sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest()[:16], "window_length": arguments.window_length,
        "bos": arguments.bos,
    }  # fmt: skip


def make_jobs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The float model, then every recipe with every method and seed."""
    common = protocol(arguments)
    jobs = [{**common, "recipe": "float", "weight_method": "-", "seed": 0, "options": {}}]
    options = given(arguments) | {n: getattr(arguments, n) for n in ("calibration_samples", "calibration_length")}
    for recipe in arguments.recipes:
        for method in [OWN_METHOD[recipe]] if recipe in OWN_METHOD else arguments.weight_method:
            for seed in arguments.seeds:
                jobs.append({**common, "recipe": recipe, "weight_method": method, "seed": seed, "options": options})
    return jobs


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of --set."""
    texts = (item.split("=", 1) for item in arguments.set)
    return {name: convert(name, {"true": True, "false": False}.get(value.lower(), value)) for name, value in texts}


def key(row: dict[str, Any]) -> str:
    """What makes two rows the same run."""
    names = ("model", "text_sha256", "skip", "windows", "window_length", "recipe", "weight_method", "seed", "options")
    optional = [row.get(name) for name in ("compare", "self_written") if row.get(name)]
    optional += ["bos"] if row.get("bos", "never") != "never" else []
    return json.dumps([row[name] for name in names] + optional, sort_keys=True)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of former runs."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {key(row): row for row in map(json.loads, lines)}


def in_own_process(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fresh interpreter and return its row."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if found.returncode:
        sys.exit(f"error: {job['recipe']} {job['weight_method']} seed {job['seed']} failed; its message is above")
    return json.loads(found.stdout.splitlines()[-1])


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Compile (unless float) and evaluate."""
    import torch

    from resq_compiler.calibration.data import text_windows
    from resq_compiler.evaluation.predictions import evaluate
    from resq_compiler.frontend.models import load_model
    from resq_compiler.util.progress import Progress

    row = {**job, "load_before": environment.load_average(), "threads": torch.get_num_threads()}
    source = model_source(job["model"])
    reference = None
    with Progress() as progress:
        if job["recipe"] == "float":
            model = load_model(source)
            tokenizer, model = model.tokenizer, model.model
        else:
            model = compile_job(job, source, progress, row)
            tokenizer = model.tokenizer
        windows = text_windows(
            Path(job["text"]), tokenizer, job["window_length"], job["windows"], skip=job["skip"], bos=job["bos"]
        )
        if len(windows) < job["windows"]:
            raise SystemExit(
                f"error: {job['text']}: {len(windows)} windows, expected {job['windows']}; give a longer text"
            )
        if job.get("compare"):
            reference = load_model(source).model
        found = evaluate(model, windows, reference, progress=progress.of("evaluate"))
    row |= {"perplexity": found.perplexity, "nll": found.nll, "evaluate_seconds": found.seconds}
    row |= {"kl": found.kl, "top1_agreement": found.top1_agreement}
    row |= {"peak_memory_bytes": environment.peak_memory(), "load_after": environment.load_average()}
    row["float_tokens_per_second"] = prefill_speed(reference or load_model(source).model)
    return {**row, "versions": environment.versions(), "cpu": environment.cpu()["model"]}


def prefill_speed(model: Any, length: int = 512, rounds: int = 5) -> float:
    """Prompt tokens per second of a transformers model, median; one round before is not counted."""
    import torch

    ids, seconds = torch.arange(length)[None] % model.config.get_text_config().vocab_size, []
    with torch.no_grad():
        for _ in range(rounds + 1):
            began = time.perf_counter()
            model(ids)
            seconds.append(time.perf_counter() - began)
    return length / statistics.median(seconds[1:])


def compile_job(job: dict[str, Any], source: str, progress: Any, row: dict[str, Any]) -> Any:
    """Compile, and note seconds by phase and peak memory so far in the row."""
    from resq_compiler.api import compile
    from resq_compiler.evaluation import sizes
    from resq_compiler.ir.graph_tools import is_call
    from resq_compiler.ir.transforms import TARGETS

    began = time.perf_counter()
    text = None if job.get("self_written") else Path(job["text"])
    model = compile(
        source, text, recipe=job["recipe"], weight_method=job["weight_method"], seed=job["seed"], bos=job["bos"],
        progress=progress, **job["options"],
    )  # fmt: skip
    row["compile_seconds"] = time.perf_counter() - began
    seconds = {stage.name: stage.seconds for stage in model.stages}
    row["pass_seconds"] = seconds
    row["basis_seconds"] = sum(seconds.get(name, 0) for name in BASIS_PASSES)
    row["weights_seconds"] = sum(seconds.get(name, 0) for name in WEIGHT_PASSES)
    row["compile_peak_memory_bytes"] = environment.peak_memory()
    row |= {
        "average_bits": sizes.average_bits(model.result).to_dict(),
        "memory_bytes": sizes.memory_bytes(model.result),
    }
    row["online"] = Counter(node.target.__name__ for node in model.graph_module.graph.nodes if is_call(node, *TARGETS))
    row["notes"] = list(model.result.notes)
    return model


def make_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each run, and a mean where there are several seeds."""
    base = next(row["perplexity"] for row in rows if row["recipe"] == "float")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["weight_method"]), []).append(row)
    lines = []
    for (recipe, method), members in groups.items():
        lines += [_line(row, base, str(row["seed"]) if recipe != "float" else "-") for row in members]
        if len(members) > 1:
            mean = sum(row["perplexity"] for row in members) / len(members)
            lines.append((recipe, method, "mean", number(mean), number(mean / base), *["-"] * 7))
    header = (
        "recipe",
        "weights",
        "seed",
        "perplexity",
        "x float",
        "compile s",
        "basis s",
        "weights s",
        "evaluate s",
        "peak GB",
        "load",
        "float tok/s",
    )
    return table(header, lines, markdown=True)


def _line(row: dict[str, Any], base: float, seed: str) -> tuple[str, ...]:
    peak = row.get("compile_peak_memory_bytes") or row["peak_memory_bytes"]
    times = (row.get(name) for name in ("compile_seconds", "basis_seconds", "weights_seconds", "evaluate_seconds"))
    return (
        row["recipe"], row["weight_method"], seed, number(row["perplexity"]), number(row["perplexity"] / base),
        *(number(value, 0) for value in times), number(peak / 1e9, 2), number(row["load_before"], 1),
        number(row.get("float_tokens_per_second"), 0),
    )  # fmt: skip


if __name__ == "__main__":
    main()
