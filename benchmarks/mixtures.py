"""Tokens a second of a mixture of experts with random weights: the CPU kernels against ONNX Runtime's standard operators, round by round.

    python benchmarks/mixtures.py out/mixture                                          # 64 experts, 8 of them a token, 4 blocks
    python benchmarks/mixtures.py out/mixture --experts 8 --choices 2 --inner 2048     # another shape, such as Mixtral's
    python benchmarks/mixtures.py out/mixture --rounds 9                               # measured again: what is there is not made again

The model is Qwen3-MoE, W4A4KV4 by recipe `resq`, its weights rounded to the nearest; the directory gets an export of each profile. Random
weights route evenly: a trained router sends more tokens of a text through the same experts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from resq_compiler.backends.onnx import speed
from resq_compiler.backends.onnx.export import LAST_FILE
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import resq_compiler
from resq_compiler.util.text import table

PROFILES = ("native", "ort")
SHAPE = {"experts": 64, "choices": 8, "hidden": 1024, "inner": 512, "blocks": 4, "vocabulary": 8192}
SHAPE_FILE = "shape.json"


def main(given: list[str] | None = None) -> None:
    """Make what is not there yet, measure, print."""
    arguments = parse(given)
    shape = {name: getattr(arguments, name) for name in SHAPE}
    if not is_made(arguments.directory, shape):
        make(arguments.directory, shape)
    rows = measure(arguments.directory, arguments.prompt, arguments.new, arguments.rounds, arguments.threads)
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in shape.items()) + "\n" + summary(rows) + "\n")


def parse(given: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the exports are, or are put")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model (default: {value})")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--new", type=int, default=32, help="tokens behind the first (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="of every profile, in turn (default: 5)")
    parser.add_argument("--threads", type=int, help="of a session (default: all)")
    return parser.parse_args(given)


def is_made(directory: Path, shape: dict[str, int]) -> bool:
    """Whether the directory has exports of this shape."""
    written = directory / SHAPE_FILE
    return written.is_file() and json.loads(written.read_text()) == shape


def make(directory: Path, shape: dict[str, int]) -> None:
    """A random model, compiled and exported in every profile."""
    calibration = torch.randint(0, shape["vocabulary"], (8, 128), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"calibration_samples": 8, "calibration_length": 128, "unreached_experts": "layer"}
    compiled = resq_compiler.compile(
        random_model(shape), calibration, recipe="resq", weight_method="rtn", lm_head_bits=8, **options
    )
    for profile in PROFILES:
        compiled.export_onnx(directory / profile, profile, overwrite=(directory / profile / LAST_FILE).is_file())
    (directory / SHAPE_FILE).write_text(json.dumps(shape))


def random_model(shape: dict[str, int]) -> Any:
    """Qwen3-MoE of a shape, heads of 64 columns."""
    heads = max(2, shape["hidden"] // 64)
    config = Qwen3MoeConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_hidden_layers=shape["blocks"],
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=64, num_experts=shape["experts"],
        num_experts_per_tok=shape["choices"], moe_intermediate_size=shape["inner"], norm_topk_prob=True, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def measure(directory: Path, prompt: int, new: int, rounds: int, threads: int | None) -> dict[str, speed.Speed]:
    """Every profile in every round, so that all of them see the same machine."""
    decoders = {profile: OnnxDecoder(directory / profile, threads=threads) for profile in PROFILES}
    found: dict[str, list[speed.Speed]] = {profile: [] for profile in PROFILES}
    for _ in range(rounds):
        for profile, decoder in decoders.items():
            found[profile].append(speed.measure(decoder, 1, prompt, new, 1))
    return {
        profile: speed.Speed(1, prompt, new, tuple(s.first[0] for s in each), tuple(s.rest[0] for s in each))
        for profile, each in found.items()
    }


def summary(rows: dict[str, speed.Speed]) -> str:
    """Tokens a second by median and best round, and how often the last profile's."""
    base = rows[PROFILES[-1]].summary()
    lines = []
    for profile, row in rows.items():
        said, cells = row.summary(), [profile]
        for what in ("prefill", "decode"):
            median, best, times = (
                said[f"{what}_median"],
                said[f"{what}_best"],
                said[f"{what}_median"] / base[f"{what}_median"],
            )
            cells += [f"{median:.1f}", f"{best:.1f}", f"{times:.2f}"]
        lines.append(cells)
    heads = ["profile"]
    for what in ("prefill", "decode"):
        heads += [f"{what}: tokens/s (median)", "best", f"times {PROFILES[-1]}"]
    return table(heads, lines)


if __name__ == "__main__":
    main()
