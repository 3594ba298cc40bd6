"""resq inspect: the topology of a model, and what the passes did to a compiled one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler.cli.commands import common
from resq_compiler.cli.commands.options import add_option_flags, chosen_passes, given_options

if TYPE_CHECKING:
    from resq_compiler.pipeline.provenance import Provenance

LEVELS = ("kind", "block", "linear")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq inspect`."""
    parser.add_argument("model", metavar="MODEL", help=f"a compiled model, or a float one: {common.MODEL_HELP}")
    parser.add_argument(
        "--topology", action="store_true", help="residual stream, blocks, attention, feed-forward (float models)"
    )
    common.add_topology_argument(parser)
    parser.add_argument("--stages", action="store_true", help="the passes and what each of them did (compiled models)")
    measures = parser.add_argument_group(
        "look at what happens: a float model is compiled for it, a compiled one is measured against its float original"
    )
    measures.add_argument(
        "--dump",
        metavar="DIR",
        type=Path,
        help="every pass as text, JSON and Graphviz, and index.html to browse them",
    )
    measures.add_argument(
        "--activations", action="store_true", help="ranges, outliers, spectra, noise at every site, before and after"
    )
    measures.add_argument(
        "--attribute", metavar="LEVELS", nargs="?", const="kind,block", type=_levels,
        help="which sites cost the accuracy: one kind, block or linear quantized at a time (default: kind,block)",
    )  # fmt: skip
    measures.add_argument("--calibration", metavar="FILE", help=f".txt, .jsonl, `{common.DEMO}`, or `self` (default)")
    measures.add_argument(
        "--text", metavar="FILE", type=Path, help="what to measure on (default: built-in English text)"
    )
    measures.add_argument(
        "--tokens", metavar="N", type=int, help="how many of its tokens activations are measured on (default: 2048)"
    )
    measures.add_argument(
        "--reference",
        metavar="MODEL",
        help="float original of a compiled model (default: the recorded one, where its name is enough to find it)",
    )
    add_option_flags(parser)


def _levels(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if any(level not in LEVELS for level in chosen):
        raise argparse.ArgumentTypeError(
            f"expected a list out of {', '.join(LEVELS)}, such as kind,block; got {text!r}"
        )
    return chosen


def run(arguments: argparse.Namespace) -> int:
    """Print the topology of a float model, or sizes and passes of a compiled one; flags choose what is measured."""
    measured = arguments.activations or bool(arguments.attribute)
    compiled = common.is_compiled_directory(arguments.model)
    _check(arguments, compiled, measured)
    if compiled and measured:
        result, text = inspect_saved_model(arguments)
    elif compiled:
        result, text = inspect_compiled(arguments)
    elif measured or arguments.dump:
        result, text = inspect_compile(arguments)
    else:
        result, text = inspect_float(arguments)
    common.show(arguments, result, text)
    return 0


def _check(arguments: argparse.Namespace, compiled: bool, measured: bool) -> None:
    """Raise ConfigError for flags that would have no effect."""
    from resq_compiler.errors import ConfigError

    where, name = "resq inspect", arguments.model
    if arguments.topology and (measured or arguments.dump):
        raise ConfigError(
            f"{where} --topology: shows what is found before a compile; ask for it without --dump and measurements"
        )
    if arguments.stages and not compiled:
        raise ConfigError(f"{where} --stages: {name} is not a compiled model; compile it first")
    if arguments.stages and measured:
        raise ConfigError(
            f"{where} --stages: what the passes did is not shown beside measurements; ask for it without them"
        )
    if arguments.reference and not (compiled and measured):
        why = "is not a compiled model" if not compiled else "is measured only with --activations or --attribute"
        raise ConfigError(f"{where} --reference: {name} {why}; drop the flag")
    if (arguments.text or arguments.tokens is not None) and not measured:
        raise ConfigError(f"{where} --text and --tokens: nothing is measured; add --activations or --attribute")
    if arguments.tokens is not None and arguments.tokens < 512:
        raise ConfigError(f"{where} --tokens: expected at least 512; got {arguments.tokens}")
    given = (
        ["--passes"] * bool(arguments.passes)
        + ["--config"] * bool(arguments.config)
        + [f"--{option.replace('_', '-')}" for option in given_options(arguments)]
    )
    if given and compiled:
        raise ConfigError(
            f"{where} {given[0]}: {name} is a compiled model and keeps the options it was compiled with; drop the flag"
        )
    if arguments.calibration and (compiled and not arguments.attribute or not (compiled or measured or arguments.dump)):
        raise ConfigError(f"{where} --calibration: nothing is calibrated here; drop the flag")
    if given and not (measured or arguments.dump):
        raise ConfigError(f"{where} {given[0]}: nothing is compiled; add --dump DIR, --activations or --attribute")


def _request(arguments: argparse.Namespace, progress: Any) -> Any:
    from resq_compiler.cli.inspect_compile import TOKENS, Request

    return Request(
        arguments.activations, arguments.attribute or (), arguments.text, arguments.tokens or TOKENS, arguments.dump, progress
    )  # fmt: skip


def _shown(arguments: argparse.Namespace, found: Any, first: list[str]) -> tuple[dict[str, Any], str]:
    """Tables of an inspection; the long one of all sites is left to the page where there is one."""
    from resq_compiler.inspection.diagnostic_tables import table_text

    lines = [
        table_text(table) + "\n" for table in found.tables if "Sites before" not in table["title"] or not arguments.dump
    ]
    if arguments.dump:
        lines.append(f"wrote {arguments.dump}: open {arguments.dump / 'index.html'}")
    dumped = str(arguments.dump) if arguments.dump else None
    return {"dump": dumped, "files": [str(f) for f in found.files], "tables": found.tables}, "\n".join([*first, *lines])


def inspect_compile(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compile with a dump and diagnostics."""
    from resq_compiler.cli.inspect_compile import inspect_model
    from resq_compiler.util.progress import Progress

    common.quiet_libraries()
    with Progress(arguments.quiet) as progress:
        found = inspect_model(
            common.model_source(arguments.model), common.calibration_data(arguments.calibration), chosen_passes(arguments),
            _request(arguments, progress), arguments.topology_file,
        )  # fmt: skip
    return _shown(arguments, found, [])


def inspect_saved_model(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Measure a compiled model against its float original."""
    from resq_compiler.cli import inspect_saved
    from resq_compiler.cli.commands.compile import TOPOLOGY_FILE
    from resq_compiler.util.progress import Progress

    directory = Path(arguments.model).expanduser()
    kept = directory / TOPOLOGY_FILE
    topology = arguments.topology_file or (kept if kept.is_file() else None)
    provenance = inspect_saved.recorded_provenance(directory)
    reference, calibration = _reference(arguments, provenance), _calibration(arguments, provenance)
    said = [
        f"float original: {arguments.reference or provenance.model}{'' if arguments.reference else ' (recorded in the model)'}"
    ]
    if arguments.attribute:
        said.append(f"calibration data: {calibration}{'' if arguments.calibration else ' (recorded in the model)'}")
    common.quiet_libraries()
    with Progress(arguments.quiet) as progress:
        request = _request(arguments, progress)
        found = inspect_saved.inspect_saved(
            directory, request, reference, lambda: common.calibration_data(calibration), topology
        )
    result, text = _shown(arguments, found, [*said, ""])
    return {"reference": reference, "calibration": calibration, **result}, text


def _reference(arguments: argparse.Namespace, provenance: Provenance) -> str:
    """The float original: the one that is given, else the recorded one. Raises ConfigError."""
    from resq_compiler.cli import inspect_saved
    from resq_compiler.errors import ConfigError

    if arguments.reference:
        return common.model_source(arguments.reference)
    found = inspect_saved.found_here(provenance.model)
    if found is None:
        flag = "--activations" if arguments.activations else "--attribute"
        raise ConfigError(
            f"resq inspect {flag}: {arguments.model} holds codes, not the float weights to compare with; it was compiled from "
            f"{provenance.model}, and that name does not say where to find it: give its float original with --reference MODEL"
        )
    return found


def _calibration(arguments: argparse.Namespace, provenance: Provenance) -> str | None:
    """The calibration data for --attribute: what is given, else what is recorded. Raises ConfigError."""
    from resq_compiler.errors import ConfigError

    recorded = provenance.calibration
    if not arguments.attribute or arguments.calibration or (provenance.known and recorded is None):
        return arguments.calibration
    if recorded is not None and recorded.kind in ("self", common.DEMO):
        return recorded.kind
    what = f"was calibrated on {recorded}" if recorded else "does not say which calibration data it was compiled with"
    raise ConfigError(
        f"resq inspect --attribute: {arguments.model} {what}, and its basis comes from that: give the same data with --calibration"
    )


def inspect_float(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Topology of a model that is not compiled; reads its configuration, not its weights."""
    from resq_compiler.analysis.topology import Topology
    from resq_compiler.api import trace
    from resq_compiler.inspection.topology_view import topology_dict, topology_text

    model = common.meta_model(arguments.model)
    _, ctx = trace(model, arguments.topology_file)
    result = topology_dict(ctx.facts.get(Topology))
    return {"model": type(model).__name__, **result}, topology_text(type(model).__name__, result)


def inspect_compiled(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Sizes, average bits and the record of passes of a compiled model."""
    from resq_compiler.errors import ConfigError
    from resq_compiler.evaluation import sizes
    from resq_compiler.util.text import megabytes, number, table

    if arguments.topology or arguments.topology_file:
        raise ConfigError(
            f"resq inspect --topology and --topology-file: {arguments.model} is a compiled model, its blocks are rewritten; "
            "inspect its float original"
        )
    opened = common.open_model(arguments.model)
    if arguments.dump:
        opened.model.dump(arguments.dump)
    result = {
        "options": opened.model.options.to_dict(),
        **sizes.describe(opened.model.result),
        "passes": _recorded(arguments.model),
    }
    bits = result["average_bits"]
    rows = [(kind.replace("_", " "), megabytes(size)) for kind, size in result["memory_bytes"].items()]
    lines = [
        f"{arguments.model}: {result['recipe']} {result['scheme']} of {opened.model.source}",
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
    """What the passes did, as `resq compile` wrote it beside the model; [] where it did not. Raises CheckpointError: damaged."""
    from resq_compiler.errors import CheckpointError

    path = Path(directory).expanduser() / common.RECORD_FILE
    if not path.is_file():
        return []
    try:
        passes = list(json.loads(path.read_text(encoding="utf-8"))["passes"])
        for item in passes:
            _pass_row(item)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not readable as the record of a compile ({error}); delete it, the model does not need it"
        ) from error
    return passes


def _pass_row(item: dict[str, Any]) -> tuple[str, ...]:
    error = item["max_error"]
    change = "not compared" if error is None else f"{error:.1e}" + ("" if item["exact"] else " (quantizes)")
    return item["name"], str(item["rewrites"]), f"{item['seconds']:.1f}", change
