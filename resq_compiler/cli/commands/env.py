"""resq env: versions, CPU and backends, for bug reports."""

from __future__ import annotations

import argparse

from resq_compiler.cli.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`resq env` has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    """Print the environment."""
    from resq_compiler.cli.environment import environment

    found = environment()
    cpu = found["cpu"]
    lines = [
        *(f"{name:15} {version}" for name, version in found["versions"].items()),
        f"{'platform':15} {found['platform']}",
        f"{'cpu':15} {cpu['model']}, {cpu['cores']} cores: {' '.join(cpu['features']) or 'no known features'}",
        f"{'cpu kernels':15} {found['cpu_kernels']}",
        f"{'threads':15} {found['threads']}",
        f"{'accelerator':15} {found['accelerator'] or 'none'}",
        *(f"backend {name:9}{state}" if len(name) < 9 else f"backend {name} {state}" for name, state in found["backends"].items()),
        *(f"{name}={value}" for name, value in found["settings"].items()),
    ]  # fmt: skip
    common.show(arguments, found, "\n".join(lines))
    return 0
