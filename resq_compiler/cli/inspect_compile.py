"""One inspection run: compile with a dump, then measure activations and costs, as `resq inspect` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.topology import Topology
from resq_compiler.errors import DataError
from resq_compiler.inspection.activations import Diagnostics, diagnose
from resq_compiler.inspection.attribution import Costs, attribute
from resq_compiler.inspection.diagnostic_tables import Table, activation_tables, attribution_tables, write_diagnostics
from resq_compiler.pipeline.order import check_comparable
from resq_compiler.recipes import named
from resq_compiler.recipes.named import Chosen
from resq_compiler.recipes.settings import CompileConfig

TOKENS, WINDOW = 2048, 256  # more tokens than the channels of most sites, so that covariances are regular
COST_WINDOWS = 2  # a run of the model on these for every site that is costed
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to measure. activations: at every site. levels: of error attribution, out of kind, block, linear.

    text: what to measure on, as data.text_windows takes it (default: a part of the built-in demo text that calibration does not
    use), its first `tokens` in windows of WINDOW; costs on its first COST_WINDOWS. dump_dir: write a dump and all results there.
    """

    activations: bool = False
    levels: Sequence[str] = ()
    text: Any = None
    tokens: int = TOKENS
    dump_dir: Path | None = None
    progress: Progress = lambda step, done, total: None

    @property
    def measures(self) -> bool:
        """True when there is anything to measure."""
        return self.activations or bool(self.levels)

    def tell_cost(self, done: int, total: int) -> None:
        """Report the progress of attribution."""
        self.progress("attribute", done, total)


@dataclass
class Inspection:
    """Results: what was asked for, else None. files: written."""

    compiled: Any
    diagnostics: Diagnostics | None = None
    costs: Costs | None = None
    files: list[Path] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """Everything measured, as tables."""
        tables = activation_tables(self.diagnostics) if self.diagnostics is not None else []
        return tables + (attribution_tables(self.costs) if self.costs is not None else [])


def inspect_model(
    source: Any, calib_data: Any, recipe: CompileConfig | Chosen, request: Request, topology: Any = None
) -> Inspection:
    """Compile a float model, keeping what the measurements need beside it, and measure.

    Args:    source, calib_data, recipe, topology: as for compile().
    Raises:  as compile(); DataError: the text has too few tokens.
    """
    from resq_compiler.api import compile, trace
    from resq_compiler.frontend.models import load_model

    if request.levels:
        check_comparable(named.choose(recipe).passes)
    loaded = load_model(source)
    windows = measuring_windows(loaded.model, loaded.tokenizer, request) if request.measures else None
    held: list[Any] = []
    compiled = compile(
        source, calib_data, recipe=recipe, tokenizer=loaded.tokenizer, topology=topology, progress=request.progress,
        dump_dir=request.dump_dir, on_float=held.append if request.levels else None,
    )  # fmt: skip
    result = Inspection(compiled)
    if request.activations and windows is not None:
        original, ctx = trace(loaded.model if loaded.model.dtype == torch.float32 else loaded.model.float(), topology)
        text = decoder(loaded.tokenizer)
        result.diagnostics = diagnose(
            original, ctx.facts.get(Topology), compiled.graph_module, windows, compiled.options.activation_bits, text
        )
    if request.levels and windows is not None:
        result.costs = measure_costs(compiled.graph_module, held[0], windows, request)
    return write_results(result, request)


def measure_costs(quantized: GraphModule, projected: GraphModule, windows: Tensor, request: Request) -> Costs:
    """Error attribution on the first windows."""
    ids = windows[:COST_WINDOWS]
    return Costs(ids.numel(), attribute(quantized, projected, ids, request.levels, request.tell_cost))


def write_results(result: Inspection, request: Request) -> Inspection:
    """Add what was measured to the dump, if there is one."""
    if request.dump_dir is not None and request.measures:
        result.files = write_diagnostics(request.dump_dir, result.diagnostics, result.costs)
    return result


def measuring_windows(model: Any, tokenizer: Any, request: Request) -> Tensor:
    """Windows [n, WINDOW] to measure on; without a text and a tokenizer, seeded random tokens."""
    from resq_compiler.calibration.data import demo_text, text_windows
    from resq_compiler.numerics.seeds import generator

    vocabulary, count = model.config.get_text_config().vocab_size, max(COST_WINDOWS, request.tokens // WINDOW)
    if request.text is None and tokenizer is None:
        return torch.randint(0, vocabulary, (count, WINDOW), generator=generator(0, "inspection"))
    source = demo_text()[1] if request.text is None else request.text
    windows = text_windows(source, tokenizer, WINDOW, count, vocab_size=vocabulary)
    if len(windows) < COST_WINDOWS:
        raise DataError(f"inspection text: expected at least {COST_WINDOWS * WINDOW} tokens; give a longer text")
    return windows


def decoder(tokenizer: Any) -> Callable[[int], str]:
    """The text of a token id, or its number where there is no tokenizer."""
    return str if tokenizer is None else (lambda token: repr(tokenizer.decode([token])))
