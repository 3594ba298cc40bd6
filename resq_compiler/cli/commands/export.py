"""resq export: write a compiled model as an ONNX directory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq export`."""
    parser.add_argument("model", metavar="DIR", help="a compiled model")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="where the ONNX model goes")
    parser.add_argument(
        "--profile", choices=("qdq", "ort", "weight-only", "native"), default="qdq",
        help="qdq (default): standard INT4/INT8 QuantizeLinear/DequantizeLinear, any runtime; ort: integer products, fastest in ONNX "
        "Runtime as it is; weight-only: INT4 in weights only; native: fused operators with their library beside the model, fastest on CPUs",
    )  # fmt: skip
    parser.add_argument(
        "--embedding", choices=("float16", "float32", "int8", "lm_head"), default="float16",
        help="how the table is stored; lm_head: not at all, rows of an 8-bit lm_head stand for it (native, models whose tables are tied)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache", choices=("float", "packed"), default="float",
        help="float (default): what clients understand; packed: uint8 codes and scales, about a fifth of the memory",
    )  # fmt: skip
    parser.add_argument(
        "--platform", nargs="+", default=[], metavar="NAME",
        help="with native: libraries for other machines too: linux-x86_64, linux-aarch64 (compiled by ziglang), or wheels of resq_kernels",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output directory")


def run(arguments: argparse.Namespace) -> int:
    """Export."""
    opened_from = arguments.model
    if not common.is_compiled_directory(opened_from):
        raise ConfigError(f"resq export: {opened_from} is not a compiled model; make one with `resq compile`")
    opened = common.open_model(opened_from)
    began = time.perf_counter()
    output = opened.model.export_onnx(
        arguments.output.expanduser(), arguments.profile, embedding=arguments.embedding, kv_cache=arguments.kv_cache,
        overwrite=arguments.overwrite, tokenizer=opened.tokenizer, platforms=arguments.platform,
    )  # fmt: skip
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    result = {
        "output": str(output),
        "profile": arguments.profile,
        "bytes": size,
        "seconds": time.perf_counter() - began,
    }
    common.show(arguments, result, f"{output}: profile {arguments.profile}, {size / 2**20:.1f} MiB")
    return 0
