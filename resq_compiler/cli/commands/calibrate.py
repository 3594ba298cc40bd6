"""resq calibrate: take the statistics of one part of the calibration text, on a machine of its own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from resq_compiler.cli.commands import common
from resq_compiler.cli.commands.options import add_option_flags, chosen_passes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq calibrate`."""
    parser.add_argument("model", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="where the files of the part go"
    )
    parser.add_argument(
        "--shard", metavar="I/N", default="0/1", help="which part, from 0/N to N-1/N (default: 0/1, everything)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", required=True, help=f".txt, .jsonl, `{common.DEMO}` (built-in English text), or `self`",
    )  # fmt: skip
    parser.add_argument(
        "--accept-unused-weights", action="store_true", help="leave out weights of the checkpoint that its configuration has no place for",
    )  # fmt: skip
    common.add_topology_argument(parser)
    common.add_device_argument(parser, "what computes")
    add_option_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Take statistics and write them."""
    from resq_compiler.api import calibrate
    from resq_compiler.util.progress import Progress

    common.quiet_libraries()
    began = time.perf_counter()
    with Progress(arguments.quiet) as progress:
        file = calibrate(
            common.model_source(arguments.model), common.calibration_data(arguments.calibration), arguments.output, arguments.shard,
            recipe=chosen_passes(arguments), topology=arguments.topology_file, device=arguments.device, progress=progress,
            accept_unused_weights=arguments.accept_unused_weights,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    result = {"file": str(file), "shard": arguments.shard, "seconds": seconds}
    text = (
        f"wrote {file} and the tensors beside it ({seconds:.1f} s); next: resq compile --statistics {arguments.output}"
    )
    common.show(arguments, result, text)
    return 0
