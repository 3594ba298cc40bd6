"""Several processes that share a compile, against one, on the cores of this machine: time, memory, bytes sent, perplexity; and a forecast.

    python benchmarks/processes.py --text valid.txt --output out/processes.md

Compiles MODEL (default: the embedded SmolLM2-135M) with torchrun in 1 and in N processes of CORES / N threads each, evaluates both,
and writes a table. The forecast of strong scaling is one: what was measured to be shared is divided by the number of processes, what
is not stays, and bytes go over a network of --network gigabits a second. The machine must be idle.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CALIBRATING, QUANTIZING = "compute-bases", "quantize-weights"
SENT = re.compile(r"which sent ([\d.]+) MB")


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--recipe", default="resq+")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--network", type=float, default=100.0, help="of the forecast, in gigabits a second")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [measure(arguments, count, Path(folder) / str(count)) for count in (1, arguments.processes)]
    text = report(arguments, found)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure(arguments: argparse.Namespace, count: int, output: Path) -> dict[str, Any]:
    """One compile in `count` processes, and its perplexity."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, arguments.cores // count))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    options = ["--calibration", arguments.calibration, "--recipe", arguments.recipe, "--json", "--quiet"]
    sizes = ["--calibration-samples", str(arguments.samples), "--calibration-length", str(arguments.length)]
    command = [*torchrun, "-m", "resq_compiler", "compile", arguments.model, "-o", str(output), *options, *sizes]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record = json.loads(done.stdout)
    evaluate = [sys.executable, "-m", "resq_compiler", "eval", str(output), "--text", arguments.text, "--length", "512"]
    rest = ["--windows", str(arguments.windows), "--no-noise", "--json", "--quiet"]
    scored = subprocess.run([*evaluate, *rest], stdout=subprocess.PIPE, text=True, check=True)
    return summary(record, count, json.loads(scored.stdout)["model"]["perplexity"])


def summary(record: Mapping[str, Any], count: int, perplexity: float) -> dict[str, Any]:
    """What the table shows of a compile's record."""
    seconds = {item["name"]: item["seconds"] for item in record["passes"]}
    sent = [float(match[1]) for note in record["notes"] if (match := SENT.search(note))]
    return {
        "processes": count, "seconds": record["seconds"], "calibrate": seconds[CALIBRATING], "quantize": seconds[QUANTIZING],
        "peak": record["peak_memory_bytes"] / 1e6, "sent": sent[0] if sent else 0.0, "perplexity": perplexity,
    }  # fmt: skip


def report(arguments: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """The table, and the forecast."""
    tokens = arguments.samples * arguments.length
    lines = [
        f"# {arguments.recipe} of {arguments.model} in several processes",
        "",
        f"{time.strftime('%Y-%m-%d')}, `{' '.join(['python', 'benchmarks/processes.py', *sys.argv[1:]])}`: {arguments.samples} windows of "
        f"{arguments.length} tokens, {arguments.cores} cores for all processes together, gloo.",
        "",
        "| processes | whole, s | calibration, s | of it ms a token | quantizing, s | peak of the first, MB | sent, MB | perplexity |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        lines.append(
            f"| {one['processes']} | {one['seconds']:.1f} | {one['calibrate']:.1f} | {1000 * one['calibrate'] / tokens:.3f} | "
            f"{one['quantize']:.1f} | {one['peak']:.0f} | {one['sent']:.1f} | {one['perplexity']:.3f} |"
        )
    change = found[-1]["perplexity"] / found[0]["perplexity"] - 1
    lines += [
        "",
        f"Perplexity differs by {100 * change:+.2f} %.",
        "",
        *forecast(found[0], found[-1], arguments.network),
    ]
    return "\n".join(lines) + "\n"


def forecast(one: Mapping[str, Any], several: Mapping[str, Any], network: float) -> list[str]:
    """Strong scaling on machines of these cores, from what one process took."""
    shared = one["calibrate"] + one["quantize"]
    rest = one["seconds"] - shared
    lines = [
        f"A forecast, not a measurement: N machines like this one, {network:g} gigabits a second between them; calibration and quantizing "
        "are divided by N, the rest is not, and sums go around a ring.",
        "",
        "| machines | whole, s | times faster |",
        "|--:|--:|--:|",
    ]
    for count in (1, 2, 4, 8):
        moved = several["sent"] * 1e6 * 8 / (network * 1e9) * 2 * (count - 1) / count
        whole = rest + shared / count + moved
        lines.append(f"| {count} | {whole:.1f} | {one['seconds'] / whole:.2f} |")
    return lines


if __name__ == "__main__":
    main()
