"""resq compile: quantize a model and write it to a directory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from resq_compiler.cli.commands import common
from resq_compiler.cli.commands.options import add_option_flags, chosen_passes
from resq_compiler.cli.launched import joined
from resq_compiler.errors import ConfigError

TOPOLOGY_FILE = "resq_topology.yaml"  # the user's own statements, kept beside the model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq compile`."""
    parser.add_argument("model", metavar="MODEL", help=common.MODEL_HELP)
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="where the compiled model goes")
    parser.add_argument(
        "--calibration", metavar="FILE",
        help=f".txt, .jsonl, `{common.DEMO}` (built-in English text), or `self` (default): the model writes its own, slowly",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        type=Path,
        help="keep finished work there: the same command goes on from it after an interruption",
    )
    parser.add_argument(
        "--statistics", metavar="DIR", type=Path, nargs="+", default=(),
        help="files that `resq calibrate` wrote with the same model, text and options: all parts of one run",
    )  # fmt: skip
    parser.add_argument(
        "--dump", metavar="DIR", type=Path, help="write every pass there, and index.html to browse them"
    )
    parser.add_argument(
        "--accept-unused-weights",
        action="store_true",
        help="leave out weights of the checkpoint that its configuration has no place for",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output directory")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan: passes, memory, disk, time; compile nothing"
    )
    parser.add_argument(
        "--processes", metavar="N", type=int, default=2, help="of --dry-run: how many processes it plans for beside one (default: 2)"
    )  # fmt: skip
    common.add_topology_argument(parser)
    common.add_device_argument(parser, "what computes calibration, bases and codes, a block at a time")
    add_option_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compile and write, or print the plan."""
    chosen = chosen_passes(arguments)
    if arguments.dry_run:
        from resq_compiler.cli.commands import plan

        result = plan.make_plan(
            arguments.model, chosen, arguments.calibration, arguments.device, arguments.processes, arguments.output
        )
        common.show(arguments, result, plan.plan_text(result))
        return 0
    if arguments.output is None:
        raise ConfigError("resq compile: --output DIR is missing; name the directory the compiled model goes to")
    with joined(arguments) as group:
        return _compile_and_write(arguments, chosen, group)


def _compile_and_write(arguments: argparse.Namespace, chosen: Any, group: Any) -> int:
    """Of the processes of a group the first writes, and says what was done."""
    from resq_compiler.cli.commands import plan
    from resq_compiler.storage.saving import check_target
    from resq_compiler.util.processes import Processes

    output = arguments.output.expanduser()
    is_first = Processes.of(group).is_first
    if is_first:
        common.check_output(output, arguments.overwrite)
        check_target(output)
        plan.check_disk(arguments.model, chosen.settings, output)
    compiled, seconds = _compile(arguments, chosen, group)
    if not is_first:
        return 0
    compiled.save_pretrained(output)
    record = common.run_record(compiled, seconds)
    common.write_text(output / common.RECORD_FILE, common.to_json(record) + "\n")
    if arguments.topology_file is not None:
        stated = Path(arguments.topology_file).expanduser().read_text(encoding="utf-8")
        common.write_text(output / TOPOLOGY_FILE, stated)
    from resq_compiler.inspection.dump import target_directory

    dumped = target_directory(arguments.dump)
    common.show(
        arguments, {"output": str(output), "dump": dumped and str(dumped), **record}, _text(record, output, dumped)
    )
    return 0


def _compile(arguments: argparse.Namespace, chosen: Any, group: Any) -> tuple[Any, float]:
    from resq_compiler.api import compile
    from resq_compiler.util.progress import Progress

    common.quiet_libraries()
    began = time.perf_counter()
    with Progress(arguments.quiet) as progress:
        compiled = compile(
            common.model_source(arguments.model),
            common.calibration_data(arguments.calibration),
            recipe=chosen,
            topology=arguments.topology_file,
            device=arguments.device,
            progress=progress,
            work_dir=arguments.work_dir,
            statistics=arguments.statistics,
            dump_dir=arguments.dump,
            accept_unused_weights=arguments.accept_unused_weights,
            process_group=group,
        )
    return compiled, time.perf_counter() - began


def _text(record: dict[str, Any], output: Path, dumped: Path | None) -> str:
    from resq_compiler.util.text import megabytes, number

    bits, size = record["average_bits"], record["memory_bytes"]
    lines = [
        f"wrote {output}: {record['recipe']} {record['scheme']} of {record['source']}",
        f"  average bits: weights {number(bits['weights'], 2)}, activations {number(bits['activations'], 2)}, "
        f"KV cache {number(bits['kv'], 2)} (scales not counted)",
        f"  size: {megabytes(size['total'])}, of it codes {megabytes(size['weight_codes'])}, scales "
        f"{megabytes(size['weight_scales'])}, embeddings {megabytes(size['embeddings'])}, lm_head {megabytes(size['head'])}",
        f"  {record['seconds']:.1f} s, peak memory {megabytes(record['peak_memory_bytes'])}",
        *(f"  note: {note}" for note in record["notes"]),
    ]
    if dumped is not None:
        lines.append(f"wrote {dumped}: every pass, and index.html to browse them; open it in a browser")
    return "\n".join(lines)
