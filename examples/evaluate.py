"""Measure a compiled model against its float original, in Python instead of with `resq eval`.

python examples/evaluate.py COMPILED_DIRECTORY FLOAT_MODEL TEXT_FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path

import resq_compiler
from resq_compiler.calibration.data import text_windows
from resq_compiler.evaluation import sizes
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.frontend.models import load_model
from resq_compiler.inspection.noise import quantizer_noise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("compiled")
    parser.add_argument("float")
    parser.add_argument("text", help=".txt or .jsonl")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()

    compiled = resq_compiler.load(arguments.compiled)
    original = load_model(arguments.float)
    windows = text_windows(Path(arguments.text), original.tokenizer, arguments.length, arguments.windows)

    found = evaluate(compiled, windows, reference=original.model)
    print(f"perplexity {found.perplexity:.3f}, KL {found.kl:.4f} nats, same top-1 {found.top1_agreement:.1%}")
    print(f"float perplexity {evaluate(original.model, windows).perplexity:.3f}")

    bits = sizes.average_bits(compiled.result)
    print(f"average bits: weights {bits.weights:.2f}, activations {bits.activations:.2f}, KV cache {bits.kv:.2f}")
    for kind, size in sizes.memory_bytes(compiled.result).items():
        print(f"  {kind:14} {size / 1e6:8.2f} MB")

    noisiest = sorted(quantizer_noise(compiled.graph_module, windows[:1]), key=lambda site: site.sqnr_db)[:5]
    for site in noisiest:
        print(f"  {site.name:34} {site.bits} bits  SQNR {site.sqnr_db:.1f} dB")


if __name__ == "__main__":
    main()
