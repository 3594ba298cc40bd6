"""resq bench: speed and memory of an exported directory."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq bench`."""
    parser.add_argument("model", metavar="DIR", help="a directory of `resq export`")
    parser.add_argument(
        "--prompt", type=_numbers, default=[128, 512], metavar="N,N", help="tokens of a prompt (default: 128,512)"
    )
    parser.add_argument("--batch", type=_numbers, default=[1], metavar="N,N", help="sequences at once (default: 1)")
    parser.add_argument(
        "-n", "--new-tokens", type=_number, default=32, metavar="N", help="behind the first (default: 32)"
    )
    parser.add_argument("--rounds", type=_number, default=3, metavar="N", help="of each measurement (default: 3)")
    parser.add_argument(
        "--operators", action="store_true", help="also where the time goes by operator (another session)"
    )


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1; got {text}")
    return value


def _numbers(text: str) -> list[int]:
    return [_number(piece) for piece in text.split(",")]


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    if not common.is_exported_directory(arguments.model):
        raise ConfigError(f"resq bench: {arguments.model} is not an exported model; make one with `resq export`")
    common.quiet_libraries()
    result = _measured(Path(arguments.model).expanduser(), arguments)
    common.show(arguments, result, "\n".join(_lines(result)))
    return 0


def _measured(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from resq_compiler.backends.onnx import speed
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    began, before = time.perf_counter(), _resident()
    decoder = OnnxDecoder(directory)
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "load_seconds": time.perf_counter() - began}
    sizes = [(batch, prompt) for batch in arguments.batch for prompt in arguments.prompt]
    measured = [speed.measure(decoder, *size, arguments.new_tokens, arguments.rounds) for size in sizes]
    result["speed"] = [one.summary() for one in measured]
    result["resident_bytes"], result["resident_before_bytes"] = _resident(), before
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    if arguments.operators:
        del decoder
        found = speed.time_by_operator(directory, None, arguments.prompt[0], arguments.new_tokens)
        result["operators"] = [{"operator": name, "calls": n, "seconds": seconds} for name, n, seconds in found]
    return result


def _resident() -> int | None:
    """Bytes of this process in memory, pages of mapped files included; None where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else None


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"loaded in {result['load_seconds']:.2f} s, {result['threads']} threads"]
    lines.append("batch  prompt  prefill tokens/s, best (median)  decode tokens/s, best (median)  first token s")
    for row in result["speed"]:
        prefill, decode = (f"{row[f'{kind}_best']:.1f} ({row[f'{kind}_median']:.1f})" for kind in ("prefill", "decode"))
        lines.append(
            f"{row['batch']:5}  {row['prompt']:6}  {prefill:>31}  {decode:>30}  {row['first_token_seconds']:13.3f}"
        )
    if result["resident_bytes"] is not None:
        grown = (result["resident_bytes"] - result["resident_before_bytes"]) / 2**20
        lines.append(
            f"resident {result['resident_bytes'] / 2**20:.0f} MiB, {grown:.0f} of them since the model was opened"
        )
    lines.append(f"peak {result['peak_bytes'] / 2**20:.0f} MiB")
    total = sum(row["seconds"] for row in result.get("operators", [])) or 1.0
    for row in result.get("operators", []):
        lines.append(
            f"{row['operator']:24} {row['calls']:7} calls {row['seconds']:9.4f} s {row['seconds'] / total:6.1%}"
        )
    return lines
