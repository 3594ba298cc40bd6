"""Write a compiled model as an ONNX directory and generate with it: ONNX Runtime and numpy do the work, PyTorch none.

python examples/export_onnx.py COMPILED_DIRECTORY ONNX_DIRECTORY --prompt "The capital of France is"
"""

from __future__ import annotations

import argparse

from resq_compiler.backends.onnx.runtime import OnnxDecoder

import resq_compiler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("compiled")
    parser.add_argument("output")
    parser.add_argument("--profile", default="ort", help="qdq, ort or weight-only")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    model = resq_compiler.load(arguments.compiled)
    model.export_onnx(arguments.output, arguments.profile, kv_cache="packed", overwrite=True)

    decoder = OnnxDecoder(arguments.output)
    ids = decoder.tokenizer(arguments.prompt, return_tensors="np")["input_ids"]
    new = [int(token[0]) for token in decoder.stream(ids, max_new_tokens=arguments.new_tokens)]
    print(arguments.prompt + decoder.tokenizer.decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
