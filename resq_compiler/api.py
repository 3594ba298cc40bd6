"""compile(): from a float decoder and some text to a CompiledModel."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.overrides import TopologyOverrides, read_overrides
from resq_compiler.analysis.topology import Topology
from resq_compiler.backends import load_backend
from resq_compiler.calibration import precision
from resq_compiler.calibration.data import calibration_windows, text_start
from resq_compiler.calibration.workdir import WorkDirectory, fingerprint
from resq_compiler.errors import DataError, ModelError
from resq_compiler.frontend.capture import Captured, capture, runnable_attention
from resq_compiler.frontend.models import LoadedModel, load_model
from resq_compiler.frontend.source import weights_digest
from resq_compiler.inspection import guard
from resq_compiler.inspection.dump import recording, target_directory
from resq_compiler.ir import graph_tools
from resq_compiler.model import CompiledModel
from resq_compiler.passes import Canonicalize, FindTopology, NameAttention, SplitFused
from resq_compiler.pipeline.order import check_order
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.provenance import CalibrationSource, Provenance
from resq_compiler.pipeline.run import Pipeline
from resq_compiler.pipeline.stages import Stage
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.recipes.text import to_text
from resq_compiler.result import CompileResult
from resq_compiler.storage.quantization_config import versions
from resq_compiler.util import devices, memory, torch_state

log = logging.getLogger("resq_compiler")

Progress = Callable[[str, int, int], None]


@torch_state.compiling()
def compile(
    model: PreTrainedModel | LoadedModel | str | Path,
    calib_data: Any = None,
    *,
    recipe: str | CompileConfig | named.Chosen | Sequence[Pass] = named.DEFAULT_RECIPE,
    backend: str = "reference",
    tokenizer: Any = None,
    topology: Any = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_float: Callable[[GraphModule], None] | None = None,
    dump_dir: str | Path | None = None,
    work_dir: str | Path | None = None,
    accept_unused_weights: bool = False,
    **options: Any,
) -> CompiledModel:
    """Quantize a decoder.

    Args:    model: a PreTrainedModel or what load_model gave (left as it is), a local directory, a hub id, or a GGUF file.
             calib_data: list of texts, token-id tensors, dict batches, a DataLoader or Dataset, a path to .txt or .jsonl;
             "demo": built-in English text; None: the model writes its own calibration text, seeded.
             recipe: "resq+" (ResQ and what was found to help), "resq" (as published), "quarot", "quik", "gptq", "rtn", a
             CompileConfig, or a tuple of passes. options: any field of CompileConfig; beside passes, those of recipes.RUN_OPTIONS.
             backend: what computes: "reference" (PyTorch), "onnx" (ONNX Runtime) or "triton".
             tokenizer: for texts, when `model` does not come with one.
             topology: statements that override what is found in the graph: a dict, a YAML or a JSON file (topology_overrides.py).
             device: what computes the calibration, bases and codes: "cpu", "cuda", "cuda:1" or "auto", a GPU where there is one. The
             weights stay in the CPU's memory but for those of the block at work, and so do those of the result: .to(device) moves it.
             progress: called with (step, done, total). on_stage: called with each pipeline.Stage as it is made.
             on_float: called with the float graph after the last exact pass: projected, partitioned, nothing quantized.
             dump_dir: write a dump of every pass there (default: the environment variable RESQ_DUMP_DIR, else none).
             work_dir: keep finished work there; after an interruption the same call goes on from it, with bit-identical results.
             accept_unused_weights: leave out, with a warning, weights that the model's configuration has no place for.
    Returns: CompiledModel, float32 between the integers.
    Raises:  BackendError before any work if the backend cannot run here; ConfigError, ModelError, DataError, CaptureError,
             TopologyError, PassError: each says what to do.
    """
    chosen = named.choose(recipe, **options)
    check_order(chosen.passes)
    where = devices.resolve(device)
    config = dataclasses.replace(
        chosen.settings, calibration_dtype=precision.resolve(chosen.settings.calibration_dtype, where)
    )  # fmt: skip
    check_backend(backend)
    overrides = read_overrides(topology)
    dump_dir = target_directory(dump_dir)
    memory.tune_allocator()
    if isinstance(model, CompiledModel):
        raise ModelError(f"model: already compiled ({model.options.scheme}); give the float model it was made from")
    loaded = load_model(model, accept_unused_weights=accept_unused_weights)
    loaded = dataclasses.replace(loaded, tokenizer=tokenizer or loaded.tokenizer)
    report = progress or (lambda step, done, total: None)
    start_of_text = text_start(loaded.tokenizer, config.bos)
    windows = _calibration(loaded, calib_data, config, chosen.passes, report)
    compared = _compared(loaded, calib_data, windows, config)
    work = None
    if work_dir is not None:
        work = _work_directory(work_dir, chosen.passes, config, loaded.model, windows, overrides)
    about = _about(loaded, calib_data, windows)
    start = time.perf_counter()
    captured = _capture_float32(loaded.model, not isinstance(model, (PreTrainedModel, LoadedModel)), report)
    del loaded, model  # from here on only the graph holds the weights, so passes release them as they go
    memory.release(captured.graph_module)  # torch.export leaves the model in a reference cycle
    bos = about["config"].get_text_config().bos_token_id
    ctx = PassContext(
        captured.example_inputs, windows, overrides, work, bos, config.seed, config.calibration_dtype, config.basis_samples,
        progress=report,
    )  # fmt: skip
    if where.type == "cuda":
        ctx.note(
            f"computed on {where} ({torch.cuda.get_device_name(where)}); codes may differ from those of a CPU by rounding"
        )
    _note_calibration(ctx, config.calibration_dtype, start_of_text)
    recorded = recording(dump_dir, str(about["provenance"].model), config.to_dict(), on_stage)
    with recorded as record, memory.settled(), devices.computing_on(where):
        pipeline = Pipeline(ctx, record.add)
        pipeline.start(captured.graph_module, seconds=time.perf_counter() - start)
        _run_guarded(pipeline, captured.graph_module, chosen.passes, compared, on_float)
        plan = ctx.facts.find(ColumnPlan) or ColumnPlan()
        result = CompileResult(
            captured.graph_module, named.settled(config, str(plan.sites)), captured.cache, **about, stages=tuple(pipeline.stages),
            notes=tuple(ctx.notes), topology=ctx.facts.find(Topology), sample_ids=None if windows is None else windows[:1],
            passes=to_text(chosen.passes),
        )  # fmt: skip
        record.complete(result)
    compiled: Any = CompiledModel(result)  # whose `to` transformers types as a function of the model alone
    return (compiled.to(where) if backend == "triton" else compiled).use_backend(backend)


def load(directory: str | Path, device: torch.device | str | None = None) -> CompiledModel:
    """Open a saved compiled model, from a directory or from the Hugging Face hub by its id.

    device: where it lies and runs: "cpu" (default), "cuda", "cuda:1", or "auto", a GPU where there is one.

    Raises ConfigError: no such device.
    Raises: CheckpointError: nothing there, not compiled by resq, written by a newer format, incomplete or damaged.
    """
    return CompiledModel.from_pretrained(directory, device_map=device)


def _provenance(loaded: LoadedModel, calib_data: Any, windows: Tensor | None) -> Provenance:
    source = dataclasses.replace(loaded.source, weights=weights_digest(loaded.model))
    return Provenance(source, None if windows is None else CalibrationSource.of(calib_data, windows), known=True)


def _about(loaded: LoadedModel, calib_data: Any, windows: Tensor | None) -> dict[str, Any]:
    """What a result keeps of the float model beside its graph."""
    config = copy.deepcopy(loaded.model.config)
    config._attn_implementation = (
        "sdpa"  # what the graph has; transformers refuses some others in a class that does not name them
    )
    config._experts_implementation = "eager"  # the same for experts, which the graph has
    return {
        "config": config,
        "generation_config": copy.deepcopy(loaded.model.generation_config),
        "tokenizer": loaded.tokenizer,
        "provenance": _provenance(loaded, calib_data, windows),
    }


def _compared(loaded: LoadedModel, calib_data: Any, windows: Tensor | None, config: CompileConfig) -> Tensor | str:
    """The tokens [1, n] that the compiled graph is compared with the float one on, or why there are none, as a note."""
    if windows is not None:
        return windows[:1, : guard.TOKENS]
    if calib_data is None:
        return (
            "nothing was compared with the float model: no pass of this recipe looks at text, and none was given; "
            "calibration data (calib_data=demo, --calibration demo) is enough for that"
        )
    length = min(config.calibration_length, guard.TOKENS)
    vocab_size = loaded.model.config.get_text_config().vocab_size
    try:
        return calibration_windows(
            calib_data,
            samples=1,
            sequence_length=length,
            vocab_size=vocab_size,
            tokenizer=loaded.tokenizer,
            bos=config.bos,
        )
    except DataError as error:
        return f"nothing was compared with the float model, and no pass of this recipe looks at the data given: {error}"


def _note_calibration(ctx: PassContext, dtype: str, start_of_text: Tensor) -> None:
    """Tell how calibration differs from what a user may expect."""
    windows, count = ctx.calibration, len(start_of_text)
    if windows is None:
        return
    if dtype != "float32":
        ctx.note(
            f"calibration: linears and second moments computed in {dtype}, sums in float32; "
            "calibration_dtype=float32 for all of it"
        )
    if count and bool((windows[:, :count] == start_of_text).all()):
        ctx.note(
            f"calibration: windows begin as the tokenizer begins a text, with {start_of_text.tolist()} (bos=never for none)"
        )


def _run_guarded(
    pipeline: Pipeline, gm: GraphModule, passes: Sequence[Pass], compared: Tensor | str, on_float: Callable[[GraphModule], None] | None
) -> None:  # fmt: skip
    """Run the passes and note where the predictions of the result are far from those of the float graph, on the tokens `compared`."""
    ctx = pipeline.ctx
    if isinstance(compared, str) or any(t.is_meta for t in gm.state_dict().values()):
        _run_passes(pipeline, gm, passes, on_float)
        if isinstance(compared, str):
            ctx.note(compared)
        return
    if ctx.calibration is None:
        ctx.note("calibration: the data given serves to compare predictions alone, no pass of this recipe looks at it")
    reference = guard.predictions(gm, compared)
    _run_passes(pipeline, gm, passes, on_float)
    for note in guard.findings(gm, compared, reference):
        (log.warning if note.startswith("WARNING") else log.info)(note)
        ctx.notes.append(note)


@torch.no_grad()
def _run_passes(
    pipeline: Pipeline, gm: GraphModule, passes: Sequence[Pass], on_float: Callable[[GraphModule], None] | None
) -> None:
    exact = list(itertools.takewhile(lambda item: item.exact, passes))
    if on_float is None:
        pipeline.run(gm, passes)
        return
    pipeline.run(gm, exact)
    on_float(graph_tools.snapshot(gm))
    pipeline.run(gm, passes[len(exact) :])


def check_backend(name: str) -> None:
    """Raise BackendError if a backend does not exist or cannot run here."""
    load_backend(name)


def needs_calibration(passes: Sequence[Pass]) -> bool:
    """True when any of the passes looks at activations."""
    return any(item.needs_calibration for item in passes)


def _work_directory(
    path: str | Path, passes: Sequence[Pass], config: CompileConfig, model: PreTrainedModel, windows: Tensor | None,
    overrides: TopologyOverrides,
) -> WorkDirectory:  # fmt: skip
    settings = {"passes": to_text(passes), "options": named.run_options(config), "versions": versions()}
    return WorkDirectory(path, fingerprint(settings, model, windows, overrides))


def _calibration(
    loaded: LoadedModel, calib_data: Any, config: CompileConfig, passes: Sequence[Pass], report: Progress
) -> Tensor | None:  # fmt: skip
    if not needs_calibration(passes):
        return None
    vocab_size = loaded.model.config.get_text_config().vocab_size
    with runnable_attention(loaded.model):
        return calibration_windows(
            calib_data, model=loaded.model, tokenizer=loaded.tokenizer, samples=config.calibration_samples,
            sequence_length=config.calibration_length, seed=config.seed, bos=config.bos,
            vocab_size=vocab_size, progress=lambda done, total: report("write calibration text", done, total),
        )  # fmt: skip


def _capture_float32(model: PreTrainedModel, own: bool, report: Progress) -> Captured:
    """Capture in float32; a model of another dtype is converted (a copy of it, if it is the user's)."""
    report("capture", 0, 1)
    if any(p.is_inference() for p in model.parameters()):
        model = copy.deepcopy(model)  # tensors made in inference mode can be read, but not traced
    if model.dtype != torch.float32:
        log.info("the model is %s; it is compiled in float32", model.dtype)
        model = (model if own else copy.deepcopy(model)).float()
    captured = capture(model)
    report("capture", 1, 1)
    return captured


def trace(model: PreTrainedModel, topology: Any = None) -> tuple[GraphModule, PassContext]:
    """The named float graph of a model and its topology, nothing quantized. Works on meta weights. topology: as for compile()."""
    captured = capture(model)
    ctx = PassContext(captured.example_inputs, overrides=read_overrides(topology))
    pipeline = Pipeline(ctx)
    pipeline.start(captured.graph_module)
    pipeline.run(captured.graph_module, [Canonicalize(), NameAttention(), SplitFused(), FindTopology()])
    return captured.graph_module, ctx
