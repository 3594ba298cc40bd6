"""Milliseconds of a decode step of latent attention with random weights: the CPU kernels against ONNX Runtime's standard operators.

    python benchmarks/latent.py out/latent                     # 4 blocks of 16 heads, vectors of 512 columns; behind 128 and 512 tokens
    python benchmarks/latent.py out/latent --behind 2048       # what is there is not made again

The model is MiniCPM3, W4A4KV4 by recipe `resq`, its weights rounded to the nearest; the directory gets an export of each profile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from resq_compiler.backends.onnx import speed
from resq_compiler.backends.onnx.export import LAST_FILE
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from transformers import AutoModelForCausalLM, MiniCPM3Config

import resq_compiler
from resq_compiler.util.text import table

PROFILES = ("native", "ort")
STEPS = 16


def main(given: list[str] | None = None) -> None:
    """Make what is not there yet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the exports are, or are put")
    for name, value in (("blocks", 4), ("heads", 16), ("vector", 512), ("own", 128), ("rotary", 64), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model (default: {value})")
    parser.add_argument("--behind", type=int, nargs="+", default=[128, 512], help="tokens before the steps")
    parser.add_argument("--rounds", type=int, default=5, help="of every profile, in turn (default: 5)")
    parser.add_argument("--threads", type=int, help="of a session (default: all)")
    arguments = parser.parse_args(given)
    for profile in PROFILES:
        if not (arguments.directory / profile / LAST_FILE).is_file():
            make(arguments)
    sys.stdout.write(measured(arguments) + "\n")


def make(arguments: argparse.Namespace) -> None:
    """A random model, compiled and exported in every profile."""
    calibration = torch.randint(0, 1024, (8, 128), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"calibration_samples": 8, "calibration_length": 128, "weight_method": "rtn"}
    compiled = resq_compiler.compile(random_model(arguments), calibration, recipe="resq", lm_head_bits=8, **options)
    for profile in PROFILES:
        compiled.export_onnx(arguments.directory / profile, profile, overwrite=True)


def random_model(a: argparse.Namespace) -> Any:
    """MiniCPM3 of a shape; values are as wide as the keys' own columns."""
    config = MiniCPM3Config(
        vocab_size=1024, hidden_size=a.hidden, intermediate_size=2 * a.hidden, num_hidden_layers=a.blocks, num_attention_heads=a.heads,
        num_key_value_heads=a.heads, q_lora_rank=a.hidden // 2, kv_lora_rank=a.vector, qk_nope_head_dim=a.own, qk_rope_head_dim=a.rotary,
        v_head_dim=a.own, head_dim=a.rotary, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def measured(arguments: argparse.Namespace) -> str:
    """Median and best step of every profile behind every number of tokens; in turn, so that all see the same machine."""
    decoders = {p: OnnxDecoder(arguments.directory / p, threads=arguments.threads) for p in PROFILES}
    lines = []
    for behind in arguments.behind:
        found: dict[str, list[speed.Speed]] = {profile: [] for profile in PROFILES}
        for _ in range(arguments.rounds):
            for profile, decoder in decoders.items():
                found[profile].append(speed.measure(decoder, 1, behind, STEPS, 1))
        for profile, rounds in found.items():
            steps = [1000 * one.rest[0] / STEPS for one in rounds]
            first = statistics.median(1000 * one.first[0] for one in rounds)
            lines.append([str(behind), profile, f"{statistics.median(steps):.2f}", f"{min(steps):.2f}", f"{first:.1f}"])
    return table(["behind", "profile", "ms a step (median)", "best", "prefill, ms (median)"], lines)


if __name__ == "__main__":
    main()
