"""resq inspect: the topology of a model, and what the passes did to a compiled one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from resq_compiler.commands import common
from resq_compiler.commands.options import add_option_flags, chosen_config

LEVELS = ("kind", "block", "linear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq inspect`."""
    parser.add_argument("model", metavar="MODEL", help=f"a compiled model, or a float one: {common.MODEL_HELP}")
    parser.add_argument("--topology", action="store_true", help="residual stream, blocks, attention, feed-forward (float models)")
    parser.add_argument("--stages", action="store_true", help="the passes and what each of them did (compiled models)")
    measures = parser.add_argument_group("compile a float model and look at what happens (slow: it compiles)")
    measures.add_argument("--dump", metavar="DIR", type=Path, help="every pass as text, JSON and Graphviz, and index.html to browse them")
    measures.add_argument("--activations", action="store_true", help="ranges, outliers, spectra, noise at every site, before and after")
    measures.add_argument(
        "--attribute", metavar="LEVELS", nargs="?", const="kind,block", type=_levels,
        help="which sites cost the accuracy: one kind, block or linear quantized at a time (default: kind,block)",
    )  # fmt: skip
    measures.add_argument("--calibration", metavar="FILE", help=f".txt, .jsonl, `{common.DEMO}`, or `self` (default)")
    measures.add_argument("--text", metavar="FILE", type=Path, help="what to measure on (default: built-in English text)")
    add_option_flags(parser)


def _levels(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if any(level not in LEVELS for level in chosen):
        raise argparse.ArgumentTypeError(f"expected a list out of {', '.join(LEVELS)}, such as kind,block; got {text!r}")
    return chosen


def run(arguments: argparse.Namespace) -> int:
    """Print the topology of a float model, or sizes and passes of a compiled one; flags choose one of the two."""
    if arguments.activations or arguments.attribute or (arguments.dump and not common.is_compiled_directory(arguments.model)):
        result, text = inspect_compile(arguments)
    elif common.is_compiled_directory(arguments.model):
        result, text = inspect_compiled(arguments)
    else:
        result, text = inspect_float(arguments)
    common.show(arguments, result, text)
    return 0


def inspect_compile(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compile with a dump and diagnostics."""
    from resq_compiler.errors import ConfigError
    from resq_compiler.inspection.diagnostic_tables import table_text
    from resq_compiler.inspection.session import inspect_model
    from resq_compiler.progress import Progress

    if common.is_compiled_directory(arguments.model):
        raise ConfigError(
            f"resq inspect --activations and --attribute: {arguments.model} is a compiled model and has no float weights to compare "
            "with; inspect its float original with the same options"
        )
    common.quiet_libraries()
    with Progress(arguments.quiet) as progress:
        found = inspect_model(
            common.model_source(arguments.model), common.calibration_data(arguments.calibration), config=chosen_config(arguments),
            dump_dir=arguments.dump, activations=arguments.activations, levels=arguments.attribute or (), text=arguments.text,
            progress=progress,
        )  # fmt: skip
    lines = [table_text(table) + "\n" for table in found.tables if "Sites before" not in table["title"] or not arguments.dump]
    if arguments.dump:
        lines.append(f"wrote {arguments.dump}: open {arguments.dump / 'index.html'}")
    dumped = str(arguments.dump) if arguments.dump else None
    return {"dump": dumped, "files": [str(f) for f in found.files], "tables": found.tables}, "\n".join(lines)


def inspect_float(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Topology of a model that is not compiled; reads its configuration, not its weights."""
    from resq_compiler.compiler import trace
    from resq_compiler.errors import ConfigError
    from resq_compiler.inspection.topology_view import topology_dict, topology_text

    if arguments.stages:
        raise ConfigError(f"resq inspect --stages: {arguments.model} is not a compiled model; compile it first")
    model = common.meta_model(arguments.model)
    _, ctx = trace(model)
    result = topology_dict(ctx.topology)
    return {"model": type(model).__name__, **result}, topology_text(type(model).__name__, result)


def inspect_compiled(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Sizes, average bits and the record of passes of a compiled model."""
    from resq_compiler import report
    from resq_compiler.errors import ConfigError
    from resq_compiler.tables import megabytes, number, table

    if arguments.topology:
        raise ConfigError(
            f"resq inspect --topology: {arguments.model} is a compiled model, its blocks are rewritten; inspect its float original"
        )
    opened = common.open_model(arguments.model)
    if arguments.dump:
        opened.model.dump(arguments.dump)
    result = {
        "options": opened.model.options.to_dict(),
        **report.describe(opened.model),
        "passes": _recorded(arguments.model),
    }
    bits = result["average_bits"]
    rows = [(kind.replace("_", " "), megabytes(size)) for kind, size in result["memory_bytes"].items()]
    lines = [
        f"{arguments.model}: {result['recipe']} {result['scheme']} of {opened.model.source or 'an unnamed model'}",
        f"average bits: weights {number(bits['weights'], 2)}, activations {number(bits['activations'], 2)}, "
        f"KV cache {number(bits['kv'], 2)}",
        table(("memory", "size"), rows),
    ]
    if result["passes"]:
        lines += [
            "",
            table(("pass", "rewrites", "seconds", "relative change"), [_pass_row(p) for p in result["passes"]]),
        ]
    elif arguments.stages:
        lines += ["", f"no {common.RECORD_FILE} beside the model: `resq compile` writes it, save_pretrained does not"]
    return result, "\n".join(lines)


def _recorded(directory: str) -> list[dict[str, Any]]:
    path = Path(directory).expanduser() / common.RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("passes", []) if path.is_file() else []


def _pass_row(item: dict[str, Any]) -> tuple[str, ...]:
    error = item["max_error"]
    change = "not compared" if error is None else f"{error:.1e}" + ("" if item["exact"] else " (quantizes)")
    return item["name"], str(item["rewrites"]), f"{item['seconds']:.1f}", change
