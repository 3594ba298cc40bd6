"""Compile a model of the Hugging Face hub, loaded the usual way.

python examples/compile_hub_model.py Qwen/Qwen2.5-0.5B out/qwen

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as always. Without a text the model writes its own calibration data.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import resq_compiler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("id", help="of a decoder on the hub, such as Qwen/Qwen2.5-0.5B")
    parser.add_argument("output")
    parser.add_argument("--text", help=".txt or .jsonl to calibrate on (default: the model writes its own)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.id, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.id)
    compiled = resq_compiler.compile(
        model,
        arguments.text,
        tokenizer=tokenizer,
        calibration_samples=arguments.samples,
        calibration_length=arguments.length,
        seed=0,  # of rotations and of the text that the model writes: same seed, same machine, same bytes
    )
    compiled.save_pretrained(arguments.output)
    print(f"{arguments.id}: {compiled.options.scheme} in {arguments.output}")
    for note in compiled.notes:
        print("note:", note)


if __name__ == "__main__":
    main()
