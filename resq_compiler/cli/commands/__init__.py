"""Subcommands of `resq`, one module each, imported when used.

A module has `add_arguments(parser)` and `run(arguments) -> int` (the exit code). To add a command: write the module, add a line here.
"""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "compile": "quantize a model and write it to a directory",
    "calibrate": "take the statistics of one part of the calibration text, for `resq compile --statistics`",
    "eval": "perplexity, distance from the float model, size and average bits",
    "export": "write a compiled model as an ONNX directory",
    "bench": "speed and memory of a directory of `resq export`",
    "generate": "continue a prompt",
    "inspect": "what the compiler sees in a model, and what its passes did",
    "diff": "what differs between two dumps of `resq inspect --dump`",
    "env": "versions, CPU features and available backends",
    "demo": "compile, evaluate and compare an embedded real model",
}
"""Name and one line of help; the module is resq_compiler.cli.commands.<name>."""
