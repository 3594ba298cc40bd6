"""`resq`: parse the command line, run one subcommand, turn errors into one line and an exit code.

Exit codes: 0 done; 1 a bug in resq_compiler; 2 a wrong command line, option, model, text or file; 130 interrupted.
Results go to stdout, everything else to stderr. Only the module of the chosen subcommand is imported, so help is quick.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from resq_compiler import __version__
from resq_compiler.cli.commands import COMMANDS
from resq_compiler.cli.launched import AlreadyTold
from resq_compiler.errors import ResqError

EXIT_DONE, EXIT_BUG, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
RED, YELLOW = "31", "33"
LOADS = Path("/proc/loadavg")
AS_PYTORCH_IS = ("bench", "demo")
"""Subcommands that measure beside PyTorch, which has to run as its users have it."""


def others_compute() -> bool:
    """Whether other processes are running now, in most of ten looks within 50 ms. False where Linux does not tell."""
    seen = 0
    for _ in range(10):
        try:
            running = int(LOADS.read_text().split()[3].partition("/")[0])  # this process among them
        except (OSError, ValueError, IndexError):
            return False
        seen += running > 1
        time.sleep(0.005)
    return seen > 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Argument errors raise SystemExit(2), as argparse does."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if not word.startswith("-")), None)
    if name not in AS_PYTORCH_IS:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # of util/memory.py; torch is not imported yet
    if name not in AS_PYTORCH_IS and others_compute():
        # OpenMP reads it when torch is imported. Threads that spin while they wait keep the one that has the work from a core: beside
        # one other busy process GPTQ of a block takes 80 s, and 7 s when they sleep. Alone, a compile that sleeps takes 1.3 times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.import_module(f"resq_compiler.cli.commands.{name}") if name in COMMANDS else None
    arguments = make_parser(name, module).parse_args(argv)
    assert module is not None  # argparse has refused everything else
    set_up_messages(arguments)
    return run(module, arguments)


def make_parser(chosen: str | None = None, module: ModuleType | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line; only the chosen subcommand has its own arguments."""
    parser = argparse.ArgumentParser(
        prog="resq",
        description="Compile a Hugging Face decoder LLM to 4 bits (ResQ, W4A4KV4).",
        epilog="exit codes: 0 done, 1 a bug, 2 wrong input, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"resq_compiler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == chosen and module is not None:
            module.add_arguments(sub)
            add_common_arguments(sub)
    return parser


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that every subcommand has."""
    group = parser.add_argument_group("common")
    group.add_argument("--json", action="store_true", help="print the result as one JSON document")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress")
    group.add_argument("-v", "--verbose", action="store_true", help="log every pass to stderr; tracebacks for errors")
    group.add_argument("--debug", action="store_true", help="as -v, with the debug log")
    group.add_argument("--threads", type=_threads, metavar="N", help="CPU threads (default: torch's choice)")


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def set_up_messages(arguments: argparse.Namespace) -> None:
    """Logs, warnings and the chatter of libraries, by verbosity; all of it to stderr."""
    level = logging.DEBUG if arguments.debug else logging.INFO if arguments.verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("resq_compiler")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    if not arguments.debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; resq's own say disable=False
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def _show_warning(message: Any, *where: Any) -> None:
    say("warning", str(message), YELLOW)


def run(module: ModuleType, arguments: argparse.Namespace) -> int:
    """Run a subcommand; every way it can fail becomes a line on stderr and an exit code."""
    traceback_wanted = arguments.verbose or arguments.debug
    previous = _terminate_as_interrupt()
    try:
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        return module.run(arguments)
    except KeyboardInterrupt:
        say("error", "interrupted; what was being written was removed or never started")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        return EXIT_DONE
    except (ResqError, OSError) as error:
        _log_traceback(traceback_wanted)
        if not isinstance(error, AlreadyTold):
            say("error", _one_line(error))
        return EXIT_WRONG_INPUT
    except Exception as error:
        _log_traceback(traceback_wanted)
        hint = "" if traceback_wanted else "; run again with --debug for the traceback"
        say("error", f"{type(error).__name__}: {_one_line(error)}; this is a bug in resq_compiler{hint}")
        return EXIT_BUG
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate_as_interrupt() -> Any:
    """Treat SIGTERM as Ctrl-C, so that temporary files are removed. Returns the handler before, None outside the main thread."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, handler)
    except ValueError:
        return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _log_traceback(wanted: bool) -> None:
    if wanted:
        import traceback

        traceback.print_exc(file=sys.stderr)


def say(label: str, message: str, colour: str = RED) -> None:
    """One line on stderr; the label in colour on a terminal, unless NO_COLOR is set."""
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\x1b[{colour}m{label}\x1b[0m"
    sys.stderr.write(f"{label}: {message}\n")
