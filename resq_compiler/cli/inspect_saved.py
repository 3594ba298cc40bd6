"""Diagnostics of a saved compiled model. It holds no float weights, so they come from the model it was compiled from.

Activations need that model only. Attribution also needs its weights in the compiled model's basis: the exact passes are run again,
with the saved options and the calibration data of the compile, and the result is checked against the saved codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.overrides import read_overrides
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration.data import calibration_windows
from resq_compiler.cli.inspect_compile import (
    Inspection,
    Request,
    decoder,
    measure_costs,
    measuring_windows,
    write_results,
)
from resq_compiler.errors import CheckpointError, ConfigError, ModelError
from resq_compiler.frontend.capture import capture
from resq_compiler.frontend.models import LoadedModel, embedded_model_path, load_model
from resq_compiler.frontend.source import ModelSource, weights_digest
from resq_compiler.inspection.activations import diagnose
from resq_compiler.inspection.attribution import coded_parts, float_weights
from resq_compiler.inspection.dump import dump_result
from resq_compiler.inspection.noise import ratio_db
from resq_compiler.pipeline.order import check_comparable
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.provenance import CalibrationSource, Provenance, windows_digest
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.recipes import named as recipes
from resq_compiler.result import CompileResult
from resq_compiler.storage.layout import CONFIG
from resq_compiler.storage.reading import read
from resq_compiler.storage.tensor_files import read_json

LEAST_DB = 3.0  # codes of three bits or more are about 10 dB or more from their own weights, and 0 from others


def inspect_saved(
    directory: Path, request: Request, reference: Any, calibration: Callable[[], Any], topology: Any = None
) -> Inspection:  # fmt: skip
    """Measure a saved model against its float original.

    Args:    directory: of the compiled model. reference: the original, as load_model takes it. calibration: called, for
             attribution only, for the data the model was compiled with, as compile() takes it. topology: the overrides it was
             compiled with, as for compile().
    Raises:  ConfigError: the reference, or the calibration data, is not what the model was compiled from.
    """
    compiled = read(directory)
    loaded = load_model(reference)
    check_reference(compiled, loaded.model, loaded.where)
    windows = measuring_windows(loaded.model, loaded.tokenizer or compiled.tokenizer, request)
    passes = recipes.recorded(compiled.options, compiled.passes)
    if request.levels:
        check_comparable(passes)
    data = _calibration(compiled, passes, loaded, calibration(), request) if request.levels else None
    captured = capture(loaded.model)
    gm = captured.graph_module
    options = compiled.options
    ctx = PassContext(
        captured.example_inputs, data, read_overrides(topology), seed=options.seed, basis_samples=options.basis_samples,
        calibration_dtype=options.calibration_dtype, hidden_dtype=options.hidden_dtype, progress=request.progress,
    )  # fmt: skip
    pipeline = Pipeline(ctx)
    pipeline.start(gm)
    naming, projecting = _exact_passes(passes)
    pipeline.run(gm, naming)
    result = Inspection(compiled)
    if request.activations:
        text = decoder(loaded.tokenizer or compiled.tokenizer)
        result.diagnostics = diagnose(
            gm, ctx.facts.get(Topology), compiled.graph_module, windows, compiled.options.activation_bits, text
        )
    if request.levels:
        with torch.no_grad():
            pipeline.run(gm, projecting)
        check_projection(compiled.graph_module, gm, loaded.where)
        result.costs = measure_costs(compiled.graph_module, gm, windows, request)
    if request.dump_dir is not None:
        dump_result(compiled, request.dump_dir, windows[:1])
    return write_results(result, request)


def _exact_passes(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """The exact passes of a compile, up to find-topology and after it."""
    exact = list(itertools.takewhile(lambda item: item.exact, passes))
    at = 1 + next(i for i, item in enumerate(exact) if item.name == "find-topology")
    return exact[:at], exact[at:]


def _calibration(
    compiled: CompileResult, passes: Sequence[Pass], loaded: LoadedModel, data: Any, request: Request
) -> Tensor | None:  # fmt: skip
    from resq_compiler.api import needs_calibration

    options = compiled.options
    if not needs_calibration(passes):
        return None
    windows = calibration_windows(
        data, model=loaded.model, tokenizer=loaded.tokenizer, samples=options.calibration_samples,
        sequence_length=options.calibration_length, seed=options.seed, bos=options.bos,
        vocab_size=loaded.model.config.get_text_config().vocab_size,
        progress=lambda done, total: request.progress("write calibration text", done, total),
    )  # fmt: skip
    check_calibration(compiled.provenance.calibration, windows)
    return windows


def check_calibration(recorded: CalibrationSource | None, windows: Tensor) -> None:
    """Raise ConfigError where other tokens are recorded than these windows [n, length]."""
    if recorded is not None and recorded.digest != windows_digest(windows):
        raise ConfigError(
            f"--calibration: these {windows.numel()} tokens are not the {recorded.tokens} that the model was compiled with; "
            f"it was calibrated on {recorded}: give the same data"
        )


def check_reference(compiled: CompileResult, model: Any, name: str) -> None:
    """Raise ConfigError unless a model has the sizes of the one that was compiled and, where they are recorded, its weights."""
    ours, theirs = (c.get_text_config() for c in (compiled.config, model.config))
    for field in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ):
        expected, got = getattr(ours, field, None), getattr(theirs, field, None)
        if expected != got:
            raise ConfigError(
                f"--reference {name}: has {field} {got}, the compiled model {expected}; give the float model it was compiled from "
                f"({compiled.source})"
            )
    recorded = compiled.provenance.model.weights
    if recorded is not None and recorded != weights_digest(model):
        raise ConfigError(
            f"--reference {name}: has the sizes of the compiled model and other weights; give the float model it was compiled from "
            f"({compiled.source})"
        )


def check_projection(quantized: GraphModule, projected: GraphModule, name: str) -> None:
    """Raise ConfigError unless the float weights, in the recomputed basis, are the ones that the codes stand for."""
    weights = float_weights(quantized, projected)
    for coded, part in coded_parts(quantized):
        if part.weight_bits < 3:
            continue
        expected = weights[part.site.name, part.index]
        noise = coded.image(quantized) - expected
        decibels = ratio_db(float(expected.square().sum()), float(noise.square().sum()))
        if decibels < LEAST_DB:
            raise ConfigError(
                f"--attribute: {part.site.name} part {part.index}: the saved codes are {decibels} dB from the weights that "
                f"{name} has in the recomputed basis, expected more than {LEAST_DB:g}; this is not the model, or not the calibration "
                "data, that was compiled: give both with --reference and --calibration"
            )


def recorded_provenance(directory: Path) -> Provenance:
    """What a saved model says about how it came about. Raises CheckpointError: its config.json is not readable."""
    quantization = read_json(directory / CONFIG).get("quantization_config", {})
    try:
        return Provenance.from_config(quantization)
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory / CONFIG}: malformed provenance ({error}); the file is damaged") from error


def found_here(source: ModelSource) -> str | None:
    """What load_model takes to open a recorded model on this machine without a download; None where only the user can say."""
    if source.kind == "embedded":
        try:
            return str(embedded_model_path())
        except ModelError:
            return None
    return source.name if source.kind == "hub" and _in_cache(source.name) else None


def _in_cache(name: str) -> bool:
    """True for a hub id whose files were downloaded before."""
    try:
        return isinstance(try_to_load_from_cache(name, CONFIG), str)
    except HFValidationError:
        return False
