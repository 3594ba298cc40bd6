"""Speed, memory and accuracy of a model on this CPU in our format and in those of its peers, each in a process of its own.

    python benchmarks/cpu_peers.py speed --native DIR ... --float DIR [--gguf FILE ...] [--genai DIR ...] [--openvino DIR ...] -o OUT.json
    python benchmarks/cpu_peers.py accuracy (the same models) --text FILE -o OUT.json
    python benchmarks/cpu_peers.py picture OUT.json -o PICTURE.png

--native: a directory of `resq export --profile native`. --float: the float model as transformers saves it; it runs in PyTorch (float32,
bfloat16) and as float32 in ONNX Runtime, by this package's emitters. The others: benchmarks/cpu_peer_models.py makes them.
Every round measures every model once, one after the other, so load on the machine hits all alike (llama.cpp's
threads wait for each other by spinning and need idle cores). A prefill is what a client pays that generates: ours, PyTorch
and llama.cpp give logits of the last token then, the graphs of ONNX Runtime float32, onnxruntime-genai and OpenVINO of all; "all
logits" is the same work for every row that has it. Memory is that behind 128 tokens. `speed` prints tokens per second, best and
median over the rounds, times ONNX Runtime float32. Results are added to what OUT.json has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BASE = "ONNX Runtime float32"
PEER = Path(__file__).with_name("cpu_peer.py")
LABEL_WIDTH, LABEL_HEIGHT = 175, 11  # of the picture, in points
REST = 0.1  # seconds between two models: threads of ONNX Runtime wait for work for some 20 ms before they sleep


@dataclass(frozen=True)
class Model:
    """A row: what it is called, the kind of peer that runs it, where it is."""

    name: str
    kind: str
    path: Path

    @property
    def bytes(self) -> int:
        """On disk, without tokenizers and settings."""
        files = [self.path] if self.path.is_file() else [p for p in self.path.iterdir() if p.suffix != ".json"]
        return sum(p.stat().st_size for p in files)


class Process:
    """A peer in a process of its own, which answers one command at a time."""

    def __init__(self, model: Model, threads: int, vocabulary: int, *flags: str):
        self.model, self.began = model, time.perf_counter()
        command = [sys.executable, str(PEER), model.kind, str(model.path), str(threads), str(vocabulary), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.opened = self._answer()
        self.start_seconds = time.perf_counter() - self.began

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.model.name}: the process ended with {self.process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def opened(models: list[Model], threads: int, vocabulary: int) -> Iterator[list[Process]]:
    """All of them at once, started one after the other."""
    processes: list[Process] = []
    try:
        for model in models:
            processes.append(Process(model, threads, vocabulary))
            first = processes[-1].ask(prefill=16, batch=1)
            processes[-1].opened["first_token_seconds"] = processes[-1].start_seconds + first.get("seconds", 0.0)
            processes[-1].ask(decode=8, context=128, batch=1)
            processes[-1].opened |= processes[-1].ask(memory=True)
        yield processes
    finally:
        for process in processes:
            process.close()


def tasks(arguments: argparse.Namespace) -> dict[str, dict[str, int]]:
    """What is measured in a round: a name, and the command."""
    prompt = {"prefill": arguments.prompt, "batch": 1}
    found: dict[str, dict[str, int]] = {
        f"prefill {arguments.prompt}": prompt,
        f"prefill {arguments.prompt}, all logits": prompt | {"keep": 0},
    }
    for context in arguments.contexts:
        found[f"decode at {context}"] = {"decode": arguments.steps, "context": context, "batch": 1}
    for batch in arguments.batches:
        found[f"decode, batch of {batch}"] = {
            "decode": arguments.steps,
            "context": arguments.contexts[0],
            "batch": batch,
        }
    return found


def speed(arguments: argparse.Namespace, models: list[Model], vocabulary: int) -> dict[str, Any]:
    """Rounds of all tasks of all models; long contexts and batches only of ours, all logits of those that can leave them out."""
    plan = tasks(arguments)
    seconds: dict[str, dict[str, list[float]]] = {m.name: {} for m in models}
    with opened(models, arguments.threads, vocabulary) as processes:
        for number in range(arguments.rounds + 1):
            for task, command in plan.items():
                for process in processes:
                    if _left_out(task, command, process.model, arguments):
                        continue
                    time.sleep(REST)
                    took = process.ask(**command)
                    if number and "seconds" in took:  # the first round warms caches up
                        seconds[process.model.name].setdefault(task, []).append(took["seconds"])
        about = {p.model.name: p.opened for p in processes}
    return {
        m.name: {"kind": m.kind, "bytes": m.bytes, **about[m.name], "rates": _rates(seconds[m.name], plan)}
        for m in models
    }  # fmt: skip


def _left_out(task: str, command: dict[str, int], model: Model, arguments: argparse.Namespace) -> bool:
    if command.get("keep") == 0:
        return model.kind != "ort" and not model.kind.startswith("torch")
    ordinary = command["batch"] == 1 and command.get("context", 0) <= arguments.contexts[0]
    return not ordinary and (model.kind != "ort" or model.name == BASE)


def _rates(seconds: dict[str, list[float]], plan: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Tokens per second of every task, best and median."""
    found = {}
    for task, times in seconds.items():
        tokens = plan[task]["batch"] * (plan[task].get("prefill") or plan[task]["decode"])
        found[task] = {"best": tokens / min(times), "median": tokens / statistics.median(times)}
    return found


def accuracy(arguments: argparse.Namespace, models: list[Model], vocabulary: int) -> dict[str, Any]:
    """Perplexity, and KL and top-1 agreement with PyTorch float32, on the same windows of text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.float)
    ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = arguments.windows * arguments.length
    windows = np.array(ids[arguments.skip : arguments.skip + count], np.int64).reshape(arguments.windows, -1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="cpu-peers-") as folder:
        text, stored = Path(folder) / "windows.npy", Path(folder) / "reference.npy"
        np.save(text, windows)
        for model in models:
            process = Process(model, arguments.threads, vocabulary, "--all-logits")
            paths = {"reference": str(stored)} if stored.exists() else {"store": str(stored)}
            got = process.ask(measure=str(text), **paths)
            process.close()
            found[model.name] = {"kind": model.kind, "bytes": model.bytes, "accuracy": got}
            print(
                f"{model.name:40s} perplexity {got['perplexity']:9.4f}  KL {got['kl']:7.4f}  same top-1 {got['top1']:.1%}",
                flush=True,
            )
    return found


def show_speed(result: dict[str, Any], names: list[str]) -> None:
    """A table: every task of every model, times the base."""
    found = list(dict.fromkeys(task for name in names for task in result[name]["rates"]))
    print(f"{'tokens per second: best (median)':40s}" + "".join(f"{task:>36s}" for task in found))
    for name in names:
        cells = [
            _cell(result[name]["rates"].get(task), result.get(BASE, {}).get("rates", {}).get(task)) for task in found
        ]
        print(f"{name:40s}" + "".join(f"{cell:>36s}" for cell in cells))
    for name in names:
        row, mib = result[name], 2**20
        memory = row["resident"]
        print(
            f"{name:40s} {row['version']}, on disk {row['bytes'] / mib:.0f} MiB, resident {memory['own'] / mib:.0f} MiB of its own and "
            f"{memory['mapped'] / mib:.0f} MiB of mapped files, first token {row['first_token_seconds']:.2f} s from the start"
        )


def _cell(rate: dict[str, float] | None, base: dict[str, float] | None) -> str:
    if rate is None:
        return "-"
    text = f"{rate['best']:.1f} ({rate['median']:.1f})"
    return (
        text if base is None else f"{text} x{rate['best'] / base['best']:.2f} (x{rate['median'] / base['median']:.2f})"
    )


def picture(result: dict[str, Any], output: Path) -> None:
    """Decode speed against perplexity, the area of a point is its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    points = []
    for name, row in result.items():
        if "rates" in row and "accuracy" in row:
            task = next(task for task in row["rates"] if task.startswith("decode"))
            size = sum(row["resident"].values()) / 2**20
            points.append((row["rates"][task]["median"], row["accuracy"]["perplexity"], size, name))
    for x, y, size, name in points:
        axes.scatter(x, y, s=size, alpha=0.5, color="tab:red" if name.startswith("resq") else "tab:blue")
    axes.set(
        yscale="log",
        xlabel="tokens a second, decode (median)",
        ylabel="perplexity",
        title="Decode, accuracy, and resident memory (area)",
    )
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.margins(y=0.18)
    axes.set_xlim(0, 1.4 * max(point[0] for point in points))  # room for the last labels
    figure.tight_layout()  # before labels are placed: it moves points
    placed: list[tuple[float, float]] = []  # labels, in points of 1/72 inch: one that would lie on another goes up
    for x, y, size, name in sorted(points, key=lambda point: point[1]):
        left, low = axes.transData.transform((x, y)) * 72 / figure.dpi
        at = low
        while any(abs(left - other) < LABEL_WIDTH and abs(at - height) < LABEL_HEIGHT for other, height in placed):
            at += 1
        placed.append((left, at))
        axes.annotate(
            f"{name}, {size:.0f} MiB", (x, y), (12, at - low), textcoords="offset points", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "gray"},
        )  # fmt: skip
    figure.savefig(output, dpi=120)


def rows(arguments: argparse.Namespace, work: Path) -> list[Model]:
    """The models, float PyTorch first: it is the reference of accuracy."""
    found = [
        Model("PyTorch float32", "torch-float32", arguments.float),
        Model("PyTorch bfloat16", "torch-bfloat16", arguments.float),
    ]
    if not arguments.no_float_onnx:
        found.append(Model(BASE, "ort", arguments.float_onnx or _float_onnx(arguments.float, work)))
    found += [Model(f"resq {path.name}", "ort", path) for path in arguments.native]
    found += [Model(f"genai {path.name}", "genai", path) for path in arguments.genai]
    found += [Model(f"llama.cpp {path.stem.rpartition('-')[2]}", "llama", path) for path in arguments.gguf]
    found += [Model(f"OpenVINO {path.name}", "openvino", path) for path in arguments.openvino]
    chosen = [m for m in found if not arguments.only or any(word in m.name for word in arguments.only)]
    return [m for m in chosen if not any(word in m.name for word in arguments.without)]


def _float_onnx(source: Path, work: Path) -> Path:
    """The float model as ONNX Runtime float32 runs it fastest here."""
    from onnx_speed import float_model

    return float_model(str(source), work / "float32").parent


def save(output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Add to what is in the file."""
    result: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    for name, row in found.items():
        result[name] = {**result.get(name, {}), **row}
    output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "accuracy", "picture"))
    parser.add_argument("result", nargs="?", type=Path, help="of the picture")
    parser.add_argument("--float", type=Path)
    parser.add_argument("--float-onnx", type=Path, help="ONNX float32, if there is one already")
    parser.add_argument("--no-float-onnx", action="store_true")
    for name in ("native", "genai", "gguf", "openvino"):
        parser.add_argument(f"--{name}", type=Path, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names hold one of these words")
    parser.add_argument("--without", nargs="*", default=[], help="rows that are left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--batches", type=int, nargs="*", default=[8])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--skip", type=int, default=60000)
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.what == "picture":
        picture(json.loads(arguments.result.read_text()), arguments.output)
        return
    config = json.loads((arguments.float / "config.json").read_text())
    with tempfile.TemporaryDirectory(prefix="cpu-peers-") as folder:
        models = rows(arguments, Path(folder))
        if arguments.what == "accuracy":
            save(arguments.output, accuracy(arguments, models, config["vocab_size"]))
            return
        found = speed(arguments, models, config["vocab_size"])
        show_speed(save(arguments.output, found), list(found))


if __name__ == "__main__":
    main()
