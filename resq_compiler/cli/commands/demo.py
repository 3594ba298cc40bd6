"""resq demo: an embedded real model, compiled by several recipes and compared with float."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError

if TYPE_CHECKING:
    from resq_compiler.cli.demo import DemoOptions

NUMBERS = {
    "calibration_samples": "windows of 512 tokens to calibrate on (default: 8; 32 with --all)",
    "calibration_length": argparse.SUPPRESS,
    "windows": "windows of 1024 tokens to evaluate on (default: 2; 6 with --all)",
    "window_length": argparse.SUPPRESS,
    "new_tokens": "tokens that each model writes (default: 40)",
}
"""Whole numbers that replace those of the setting, and their help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq demo`."""
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, default=Path("out/demo"), help="(default: out/demo)"
    )
    parser.add_argument(
        "--model", metavar="MODEL", default=common.EMBEDDED, help=f"{common.MODEL_HELP} (default: {common.EMBEDDED})"
    )
    parser.add_argument(
        "--all", action="store_true", help="every recipe, on more text: takes about a quarter of an hour"
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="NAME",
        help="the first one is saved (default: resq+ quarot; every one with --all)",
    )
    for name, text in NUMBERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the report goes to stdout and beside the model."""
    from resq_compiler.cli import demo
    from resq_compiler.util.progress import Progress

    options = options_of(arguments)
    common.quiet_libraries()
    output = arguments.output.expanduser()
    if not arguments.quiet:
        sys.stderr.write(f"recipes:\n{demo.describe_recipes(options.recipes)}\n")
    with Progress(arguments.quiet) as progress:
        result = demo.run_demo(options, output, progress)
    common.write_text(output / "report.json", common.to_json(result) + "\n")
    common.write_text(output / "report.md", demo.markdown_report(result))
    saved = f"compiled model: {output / 'model'}   report: {output / 'report.md'}   {result['seconds']:.0f} s in all"
    steps = demo.next_steps(_program(), output / "model", arguments.model, result["chat"])
    parts = (demo.texts(result), demo.summary(result), demo.setting(result), saved, steps)
    common.show(arguments, result, "\n\n".join(parts))
    return 0


def options_of(arguments: argparse.Namespace) -> DemoOptions:
    """The quick or the full setting, with what the user says on top. Raises ConfigError."""
    import dataclasses

    from resq_compiler.cli import demo

    given = {name: getattr(arguments, name) for name in NUMBERS if getattr(arguments, name) is not None}
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"resq demo: {name}: expected a whole number of at least 1; got {value}")
    if arguments.recipes:
        given["recipes"] = tuple(arguments.recipes)
    chosen = demo.FULL if arguments.all else demo.DemoOptions()
    return dataclasses.replace(chosen, model=common.model_source(arguments.model), seed=arguments.seed, **given)


def _program() -> str:
    """How a user calls `resq` here: by its name if the shell finds it, else through this Python."""
    if shutil.which("resq"):
        return "resq"
    python = Path(sys.executable)
    here = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{here} -m resq_compiler"
