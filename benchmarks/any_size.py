"""The table of docs/results/any-size.md: resident memory and time of compiles, by pass.

    python benchmarks/any_size.py measure embedded --text valid.txt --recipe resq+ --samples 32 --length 512
    python benchmarks/any_size.py make llama-3-8b /data/made                     # random weights, a file for each block, bfloat16
    python benchmarks/any_size.py make qwen2.5-1.5b /data/twice --blocks 56      # a shape with another number of blocks
    python benchmarks/any_size.py measure /data/made --recipe rtn --samples 2 --length 512 --save /data/compiled
    python benchmarks/any_size.py table any-size.jsonl

Every measurement runs in a process of its own and is appended to --output. Peak memory is the resident set as Linux counts it (VmHWM),
pages of mapped files and all libraries included; the mark is set back before each pass, so that every pass has its own. Without a text,
calibration tokens are random ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import accuracy

from resq_compiler.cli import environment
from resq_compiler.cli.commands.common import model_source
from resq_compiler.util.text import table

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
SPREAD = 0.02  # of random weights


def main() -> None:
    """Measure, make a model, or print the table."""
    arguments = parse()
    if arguments.command == "make":
        make(SHAPES[arguments.shape], arguments.blocks, arguments.directory)
    elif arguments.command == "table":
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
        sys.stdout.write(summary(rows) + "\n\n" + by_pass(rows) + "\n")
    elif arguments.here:
        sys.stdout.write(json.dumps(measure(arguments)) + "\n")
    else:
        found = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--here"], stdout=subprocess.PIPE, check=True)
        with arguments.output.open("ab") as file:
            file.write(found.stdout)
        sys.stdout.write(summary([json.loads(found.stdout)]) + "\n")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="compile a model in a process of its own")
    one.add_argument("model", help="directory, .gguf, hub id, or `embedded`")
    one.add_argument("--name", help="in the table (default: the model)")
    one.add_argument("--text", type=Path, help="a .txt file to calibrate on")
    one.add_argument("--recipe", default="resq+")
    one.add_argument("--samples", type=int, default=32)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of the compiler")
    one.add_argument("--save", type=Path, help="write the compiled model there")
    one.add_argument(
        "--work-dir", type=Path, help="an interrupted compile goes on from there; its row is of the rest alone"
    )
    one.add_argument("--output", type=Path, default=Path("any-size.jsonl"))
    one.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    made = commands.add_parser("make", help="write a model with random weights")
    made.add_argument("shape", choices=SHAPES)
    made.add_argument("directory", type=Path)
    made.add_argument("--blocks", type=int, help="another number of decoder blocks")
    rows = commands.add_parser("table", help="print what was measured")
    rows.add_argument("rows", type=Path)
    return parser.parse_args()


def make(shape: dict[str, Any], blocks: int | None, directory: Path) -> None:
    """A sharded bfloat16 checkpoint of random weights, a block in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    from resq_compiler.frontend.opened import skeleton_of

    config = AutoConfig.for_model(**shape | ({"num_hidden_layers": blocks} if blocks else {}))
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Size]] = {}
    skeleton = skeleton_of(config)
    for name, parameter in skeleton.named_parameters():
        block = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        files.setdefault(f"model-{block}.safetensors", {})[name] = parameter.shape
    where: dict[str, str] = {}
    for file, names in files.items():
        values = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else (SPREAD * torch.randn(size, generator=generator)).bfloat16()
            for name, size in names.items()
        }
        values = revert_weight_conversion(skeleton, values)  # as it is published: every expert has tensors of its own
        where |= dict.fromkeys(values, file)
        save_file({name: value.contiguous() for name, value in values.items()}, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [type(skeleton).__name__]
    config.save_pretrained(directory)


class Marks:
    """Peak resident memory between calls."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.found: list[tuple[str, float, int]] = []

    def set(self, name: str) -> None:
        """What ends here took so long and so much, by its own peak."""
        now = time.perf_counter()
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        self.found.append((name, now - self.last, peak))
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the mark of the peak back
        self.last = now


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile, and save where asked."""
    import torch

    import resq_compiler
    from resq_compiler.frontend.models import open_model

    marks, load = Marks(), environment.load_average()
    marks.set("imports")
    source = model_source(arguments.model)
    opened = open_model(source)
    parameters = {id(p): p.numel() for p in opened.skeleton.parameters()}
    vocabulary = opened.skeleton.config.get_text_config().vocab_size
    del opened
    marks.set("open")
    shape = (arguments.samples, arguments.length)
    tokens = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    model = resq_compiler.compile(
        source, arguments.text or tokens, recipe=arguments.recipe, calibration_samples=arguments.samples,
        calibration_length=arguments.length, on_stage=lambda stage: marks.set(stage.name),
        work_dir=arguments.work_dir, **accuracy.given(arguments),
    )  # fmt: skip
    marks.set("check")
    if arguments.save:
        model.save_pretrained(arguments.save)
        marks.set("save")
    return {
        "name": arguments.name or Path(arguments.model).name, "recipe": arguments.recipe, "windows": shape,
        "weights": 4 * sum(parameters.values()), "peak": max(peak for _, _, peak in marks.found),
        "seconds": sum(seconds for _, seconds, _ in marks.found[2:]), "passes": marks.found, "threads": torch.get_num_threads(),
        "load": [load, environment.load_average()], "versions": environment.versions(), "cpu": environment.cpu()["model"],
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each compile."""
    head = ("model", "recipe", "windows", "float32 weights GB", "peak GB", "ratio", "seconds")
    cells = [
        (
            row["name"], row["recipe"], f"{row['windows'][0]} x {row['windows'][1]}", f"{row['weights'] / 1e9:.2f}",
            f"{row['peak'] / 1e9:.2f}", f"{row['peak'] / row['weights']:.2f}", f"{row['seconds']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)


def by_pass(rows: list[dict[str, Any]], least: float = 0.02) -> str:
    """Seconds and peak of every pass that took a share of its compile."""
    head = ("model", "pass", "seconds", "peak GB")
    cells = [
        (row["name"], name, f"{seconds:.1f}", f"{peak / 1e9:.2f}")
        for row in rows
        for name, seconds, peak in row["passes"]
        if seconds >= least * row["seconds"] or peak == row["peak"]
    ]
    return table(head, cells)


if __name__ == "__main__":
    main()
