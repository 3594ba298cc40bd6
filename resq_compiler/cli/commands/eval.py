"""resq eval: how good a model is on a text, and how far it moved from its float original."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError, ModelError

LENGTH = 2048  # of a window, as papers measure
NOISE_TOKENS = 4096  # enough for two digits of a ratio of sums over every token and column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq eval`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a compiled model, a directory of `resq export`, or a float one: {common.MODEL_HELP}",
    )
    common.add_text_arguments(parser)
    parser.add_argument(
        "--reference", metavar="FLOATMODEL", help="the float original: adds KL divergence and agreement"
    )
    parser.add_argument(
        "--length", type=int,
        help=f"tokens in a window (default: {LENGTH}, or as many positions as the model has learned)",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, metavar="N", help="at most that many windows (default: the whole text)")
    parser.add_argument("--skip", type=int, default=0, metavar="TOKENS", help="left out at the start of the text")
    parser.add_argument(
        "--bos", action=argparse.BooleanOptionalAction, default=True,
        help="begin windows as the tokenizer begins a text (default); papers measure without",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows run at once (default: 1)")
    parser.add_argument(
        "--by-block", action=argparse.BooleanOptionalAction,
        help="run all windows through one block after the other, with its weights alone in memory and on the device "
        "(default: where a model is larger than the memory that is free)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", action=argparse.BooleanOptionalAction, help="noise of quantizers (default: on for compiled models)"
    )
    parser.add_argument("--all-sites", action="store_true", help="every quantizer in the table, not only places")
    common.add_backend_argument(parser)
    common.add_device_argument(parser, "where the models lie and run")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print."""
    _check(arguments)
    opened, reference = _open(arguments)
    result = evaluate_model(opened, reference, arguments)
    text = [_title(opened, reference, result), result.pop("table")]
    if "noise_table" in result:
        text += ["", "Noise that each quantizer adds (signal to quantization noise):", result.pop("noise_table")]
    if reference is None:
        sys.stderr.write("hint: --reference FLOATMODEL adds KL divergence and agreement with the float model\n")
    common.show(arguments, result, "\n".join(text))
    return 0


def _open(arguments: argparse.Namespace) -> tuple[common.OpenModel, common.OpenModel | None]:
    """The model and its reference; block by block where that is asked for, or needed."""
    names = [name for name in (arguments.model, arguments.reference) if name]
    if arguments.by_block or (arguments.by_block is None and _larger_than_memory(arguments, names)):
        found = [
            common.open_by_block(name, arguments.backend if name is names[0] else "reference", arguments.device)
            for name in names
        ]
        return found[0], found[1] if arguments.reference else None
    if common.is_exported_directory(arguments.model):
        opened = common.open_exported(arguments.model, arguments.backend, arguments.device)
    else:
        opened = common.open_model(arguments.model, arguments.backend, arguments.device)
    return opened, common.open_float(arguments.reference, arguments.device) if arguments.reference else None


def _larger_than_memory(arguments: argparse.Namespace, names: list[str]) -> bool:
    """Whether all models together are larger than the memory that is free; stderr says so."""
    from resq_compiler.util import machine
    from resq_compiler.util.text import megabytes

    free = machine.free_memory()
    if free is None or arguments.backend != "reference" or common.is_exported_directory(arguments.model):
        return False
    try:
        size = sum(common.size_in_memory(name) for name in names)
    except ModelError:  # opening it says what is wrong
        return False
    if size > free:
        sys.stderr.write(
            f"note: block by block: the weights have {megabytes(size)} and {megabytes(free)} of memory are free (--no-by-block: at once)\n"
        )
    return size > free


def evaluate_model(opened: common.OpenModel, reference: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Numbers for JSON, and under "table" and "noise_table" what people read."""
    from resq_compiler.calibration.data import Bos, text_start, text_windows
    from resq_compiler.evaluation import comparison
    from resq_compiler.inspection.noise import quantizer_noise
    from resq_compiler.inspection.noise_table import noise_table
    from resq_compiler.util.progress import Progress

    tokenizer = opened.tokenizer or (reference and reference.tokenizer)
    bos: Bos = "auto" if arguments.bos else "never"
    length = window_length(arguments.length, opened, reference)
    windows = text_windows(
        common.evaluation_text(arguments), tokenizer, length, arguments.windows, skip=arguments.skip,
        vocab_size=opened.model.config.get_text_config().vocab_size, bos=bos,
    )  # fmt: skip
    with Progress(arguments.quiet) as progress:
        result = comparison.measure(
            opened.model, windows, reference and reference.model, arguments.batch_size, progress.of("evaluate")
        )
        result["table"] = comparison.measure_table(
            result, (opened.name if not opened.compiled else "compiled", "float")
        )
        result["begins_with"] = text_start(tokenizer, bos).tolist()
        if result["begins_with"]:
            result["table"] += (
                f"\nevery window begins as the tokenizer begins a text, with {result['begins_with']}; --no-bos for none"
            )
        if opened.compiled and arguments.noise is not False:
            few = windows[: max(1, NOISE_TOKENS // length)]
            sites = quantizer_noise(opened.model.graph_module, few, progress.of("noise of quantizers"))
            result["noise"] = [site.to_dict() for site in sites]
            result["noise_table"] = noise_table(sites, arguments.all_sites)
    return result


def window_length(asked: int | None, *opened: common.OpenModel | None) -> int:
    """Tokens of a window: what is asked for, else LENGTH, or less where a model has learned fewer positions, which stderr then says.

    Raises ConfigError: more is asked for than a model can take.
    """
    from resq_compiler.frontend.positions import longest_text

    limits = {limit: one.name for one in opened if one is not None and (limit := longest_text(one.model)) is not None}
    limit = min(limits, default=asked or LENGTH)
    if asked is not None and asked > limit:
        raise ConfigError(
            f"resq eval --length {asked}: {limits[limit]} has learned {limit} positions; give at most {limit}"
        )
    if asked is None and limit < LENGTH:
        sys.stderr.write(
            f"note: windows of {limit} tokens, not {LENGTH}: {limits[limit]} has learned no more positions\n"
        )
    return asked or min(limit, LENGTH)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("length", 2), ("windows", 1), ("skip", 0), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"resq eval: {flag}: expected a whole number of at least {least}; got {value}")
    if arguments.all_sites and arguments.noise is False:
        raise ConfigError("resq eval --all-sites: there is no table with --no-noise; drop one of them")
    if (arguments.all_sites or arguments.noise) and not common.is_compiled_directory(arguments.model):
        flag = "--all-sites" if arguments.all_sites else "--noise"
        raise ConfigError(
            f"resq eval {flag}: {arguments.model} is not a compiled model and has no quantizers; drop the flag"
        )


def _title(opened: common.OpenModel, reference: Any, result: dict[str, Any]) -> str:
    what = f"{result['recipe']} {result['scheme']}" if opened.compiled else opened.kind
    against = f" against {reference.name}" if reference else ""
    count, length = result["windows"]
    return f"{opened.name} ({what}){against}, {count} windows of {length} tokens:"
