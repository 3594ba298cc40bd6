"""The table and the picture of docs/results/recipes.md: every recipe at its usual setting, and all of them at W4A4KV4.

    python benchmarks/recipes.py --text wikitext2-valid.txt --picture docs/results/recipes.png

Protocol, rows and the file that keeps them are those of benchmarks/accuracy.py: a process for each row, and rows that are there are not run
again. --short is for a first look: 16 windows of 512 tokens to calibrate on, 2 of 2048 to evaluate. --recipes and --settings choose rows.
Divergence (KL, nats a token) and top-1 agreement are from the float model on the evaluated text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import accuracy

from resq_compiler.recipes import named
from resq_compiler.util.text import number, table

SAME = {"weight_bits": 4, "activation_bits": 4, "kv_bits": 4}
SETTINGS = ("usual", "W4A4KV4")
HEADER = (
    "recipe", "setting", "perplexity", "x float", "KL", "top-1 %", "bits of weights / activations / cache", "MB", "compile s",
    "online operators",
)  # fmt: skip


def main() -> None:
    """Run what is missing, print the table, draw the picture."""
    arguments = parse()
    base = job(arguments, "resq", "usual", 0) | {"recipe": "float", "weight_method": "-", "options": {}}
    jobs = {
        (recipe, setting, seed): job(arguments, recipe, setting, seed)
        for recipe in arguments.recipes
        for setting in settings_of(recipe, arguments.settings)
        for seed in arguments.seeds
    }
    known = accuracy.read_rows(arguments.output)
    for i, one in enumerate((base, *jobs.values()), 1):
        if accuracy.key(one) not in known:
            sys.stderr.write(f"[{i}/{len(jobs) + 1}] {one['recipe']} {one['options']} seed {one['seed']}\n")
            accuracy.run_one(one, known, arguments.output)
    reference = known[accuracy.key(base)]["perplexity"]
    rows = {(recipe, setting): [] for recipe, setting, _ in jobs}
    for (recipe, setting, _), one in jobs.items():
        rows[recipe, setting].append(known[accuracy.key(one)])
    lines = [line(recipe, setting, found, reference) for (recipe, setting), found in rows.items()]
    sys.stdout.write(table(HEADER, lines, markdown=True) + "\n")
    if arguments.picture:
        draw(rows, reference, arguments.picture)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accuracy.add_protocol(parser)
    parser.add_argument(
        "--recipes", nargs="+", default=list(named.RECIPES), choices=list(named.RECIPES), metavar="NAME"
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--short", action="store_true", help="16 windows of 512 to calibrate on, 2 of 2048 to evaluate")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of the compiler")
    parser.add_argument("--output", type=Path, default=Path("recipes.jsonl"), help="rows, one JSON object a line")
    parser.add_argument("--picture", type=Path, help="a .png file")
    arguments = parser.parse_args()
    if arguments.text is None:
        parser.error("--text FILE is missing")
    if arguments.short:
        arguments.calibration_samples, arguments.windows = 16, 2
    return arguments


def settings_of(recipe: str, wanted: list[str]) -> list[str]:
    """The settings of a recipe: W4A4KV4 alone where that is its usual one."""
    if named.resolve(recipe).scheme == "W4A4KV4":
        return ["W4A4KV4"]
    return [setting for setting in SETTINGS if setting in wanted]


def job(arguments: argparse.Namespace, recipe: str, setting: str, seed: int) -> dict[str, Any]:
    """A row to be run, as accuracy.py runs it."""
    options = accuracy.given(arguments) | (SAME if setting == "W4A4KV4" else {})
    options |= {name: getattr(arguments, name) for name in ("calibration_samples", "calibration_length")}
    method = named.resolve(recipe).weight_method
    common = accuracy.protocol(arguments) | {"recipe": recipe, "weight_method": method, "seed": seed, "compare": True}
    return {**common, "options": options}


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Of a number of rows."""
    return sum(row[name] for row in rows) / len(rows)


def line(recipe: str, setting: str, rows: list[dict[str, Any]], reference: float) -> tuple[str, ...]:
    """A line of the table: means over seeds."""
    bits, perplexity = rows[0]["average_bits"], mean(rows, "perplexity")
    three = " / ".join(number(bits[name], 2) for name in ("weights", "activations", "kv"))
    online = ", ".join(f"{count} {name}" for name, count in rows[0]["online"].items()) or "none"
    return (
        recipe, setting, number(perplexity, 2), number(perplexity / reference, 3), number(mean(rows, "kl"), 3),
        number(100 * mean(rows, "top1_agreement"), 1), three, number(rows[0]["memory_bytes"]["total"] / 1e6, 0),
        number(mean(rows, "compile_seconds"), 0), online,
    )  # fmt: skip


def draw(rows: dict[tuple[str, str], list[dict[str, Any]]], reference: float, path: Path) -> None:
    """What each recipe loses: perplexity over that of float, less 1, the best first."""
    from matplotlib.figure import Figure

    lost = {name: mean(found, "perplexity") / reference - 1 for name, found in rows.items()}
    order = sorted(rows, key=lambda name: -lost[name])
    figure = Figure(figsize=(8, 0.8 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = ["#2b6cb0" if setting == "W4A4KV4" else "#c05621" for _, setting in order]
    bars = axes.barh(
        [label(recipe, rows[recipe, setting]) for recipe, setting in order], [lost[n] for n in order], color=colors
    )
    axes.bar_label(
        bars, [f"{1 + lost[name]:.3g}" if lost[name] > 1 else f"{1 + lost[name]:.3f}" for name in order], padding=3
    )
    axes.set_xscale("log")
    axes.set_xlabel("perplexity over that of float, less 1 (blue: W4A4KV4; red: usual bits)")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def label(recipe: str, rows: list[dict[str, Any]]) -> str:
    """A recipe and the bits of its weights, activations and cache."""
    bits = rows[0]["average_bits"]
    return f"{recipe}  " + " / ".join(f"{bits[name]:.3g}" for name in ("weights", "activations", "kv"))


if __name__ == "__main__":
    main()
