"""resq diff: what differs between two dumps."""

from __future__ import annotations

import argparse

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq diff`."""
    parser.add_argument("a", metavar="DIR_A", help="a dump, as `resq inspect MODEL --dump DIR` writes")
    parser.add_argument("b", metavar="DIR_B", help="another dump")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="lines of each section (default: 20)")


def run(arguments: argparse.Namespace) -> int:
    """Compare and print. Differences are no failure: the exit code is 0; `--json` says whether the dumps are equal."""
    if arguments.limit < 0:
        raise ConfigError(f"resq diff --limit: expected a whole number of at least 0; got {arguments.limit}")
    from resq_compiler.inspection.diff import compare, difference_text

    found = compare(arguments.a, arguments.b)
    common.show(arguments, found.to_dict(), difference_text(found, arguments.limit))
    return 0
