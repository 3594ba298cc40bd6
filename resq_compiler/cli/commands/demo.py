"""resq demo: an embedded real model, compiled by several recipes and compared with float."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq demo`."""
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path("out/demo"), help="(default: out/demo)"
    )
    parser.add_argument(
        "--model", metavar="MODEL", default=common.EMBEDDED, help=f"{common.MODEL_HELP} (default: {common.EMBEDDED})"
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="NAME",
        default=["resq+", "resq", "quarot", "rtn"],
        help="the first one is saved",
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=32, metavar="N", help="windows of 512 tokens (default: 32)"
    )
    parser.add_argument("--calibration-length", type=int, default=512, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument(
        "--windows", type=int, default=6, metavar="N", help="evaluated windows of 1024 tokens (default: 6)"
    )
    parser.add_argument("--window-length", type=int, default=1024, metavar="N", help=argparse.SUPPRESS)
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N", help="that each model writes (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the report goes to stdout and beside the model."""
    numbers = ("calibration_samples", "calibration_length", "windows", "window_length", "new_tokens")
    for name in numbers:
        if getattr(arguments, name) < 1:
            raise ConfigError(
                f"resq demo: {name}: expected a whole number of at least 1; got {getattr(arguments, name)}"
            )
    from resq_compiler.cli import demo
    from resq_compiler.util.progress import Progress

    common.quiet_libraries()
    output = arguments.output.expanduser()
    options = demo.DemoOptions(
        model=common.model_source(arguments.model),
        recipes=tuple(arguments.recipes),
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name in numbers},
    )
    if not arguments.quiet:
        sys.stderr.write(f"recipes:\n{demo.describe_recipes(options.recipes)}\n")
    with Progress(arguments.quiet) as progress:
        result = demo.run_demo(options, output, progress)
    common.write_text(output / "report.json", common.to_json(result) + "\n")
    common.write_text(output / "report.md", demo.markdown_report(result))
    saved = f"compiled model: {output / 'model'}   report: {output / 'report.md'}   {result['seconds']:.0f} s in all"
    common.show(arguments, result, "\n\n".join((demo.texts(result), demo.summary(result), saved)))
    return 0
