"""One inspection run: compile with a dump, then measure activations and costs, as `resq inspect` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq_compiler.config import CompileConfig
from resq_compiler.errors import DataError
from resq_compiler.inspection.activations import Diagnostics, diagnose
from resq_compiler.inspection.attribution import Cost, attribute
from resq_compiler.inspection.diagnostic_tables import Table, activation_tables, attribution_tables, write_diagnostics

WINDOWS, WINDOW = 8, 256  # 2048 tokens: more than the channels of most sites, so that covariances are regular
COST_WINDOWS = 2  # a run of the model on these for every site that is costed
Progress = Callable[[str, int, int], None]


@dataclass
class Inspection:
    """Results: what was asked for, else None. files: written."""

    compiled: Any
    diagnostics: Diagnostics | None = None
    costs: list[Cost] | None = None
    files: list[Path] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """Everything measured, as tables."""
        tables = activation_tables(self.diagnostics) if self.diagnostics is not None else []
        return tables + (attribution_tables(self.costs) if self.costs is not None else [])


def inspect_model(
    source: Any, calib_data: Any = None, *, config: CompileConfig, dump_dir: Path | None = None, activations: bool = False,
    levels: Sequence[str] = (), text: Any = None, progress: Progress = lambda step, done, total: None,
) -> Inspection:  # fmt: skip
    """Compile a float model, keeping what diagnostics need beside it.

    Args:    source, calib_data: as for compile(). dump_dir: write a dump there. activations: measure them. levels: of error
             attribution, out of kind, block, linear. text: what to measure on, as data.text_windows takes it (default: a part
             of the built-in demo text that calibration does not use).
    Raises:  as compile(); DataError: the text has too few tokens.
    """
    from resq_compiler.compiler import compile, trace
    from resq_compiler.models import load_model

    loaded = load_model(source)
    windows = measuring_windows(loaded.model, loaded.tokenizer, text) if activations or levels else None
    held: list[Any] = []
    compiled = compile(
        source, calib_data, recipe=config, tokenizer=loaded.tokenizer, progress=progress, dump_dir=dump_dir, on_float=held.append
    )  # fmt: skip
    result = Inspection(compiled)
    if activations and windows is not None:
        original, ctx = trace(loaded.model if loaded.model.dtype == torch.float32 else loaded.model.float())
        result.diagnostics = diagnose(
            original, ctx.topology, held[0], compiled.graph_module, windows, config.activation_bits, _decoder(loaded.tokenizer)
        )
    if levels and windows is not None:
        tell: Callable[[int, int], None] = lambda done, total: progress("attribute", done, total)  # noqa: E731
        result.costs = attribute(compiled.graph_module, held[0], windows[:COST_WINDOWS], levels, tell)
    if dump_dir is not None and (activations or levels):
        result.files = write_diagnostics(Path(dump_dir), result.diagnostics, result.costs)
    return result


def measuring_windows(model: Any, tokenizer: Any, text: Any) -> Tensor:
    """Windows [n, WINDOW] to measure on; without a text and a tokenizer, seeded random tokens."""
    from resq_compiler.data import demo_text, text_windows
    from resq_compiler.numerics.seeds import generator

    vocabulary = model.config.get_text_config().vocab_size
    if text is None and tokenizer is None:
        return torch.randint(0, vocabulary, (WINDOWS, WINDOW), generator=generator(0, "inspection"))
    source = demo_text()[1] if text is None else text
    windows = text_windows(source, tokenizer, WINDOW, WINDOWS, vocab_size=vocabulary)
    if len(windows) < COST_WINDOWS:
        raise DataError(f"inspection text: expected at least {COST_WINDOWS * WINDOW} tokens; give a longer text")
    return windows


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    return str if tokenizer is None else (lambda token: repr(tokenizer.decode([token])))
