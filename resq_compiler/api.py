"""compile(): from a float decoder and some text to a CompiledModel."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.fx import GraphModule
from transformers import PreTrainedModel

from resq_compiler.analysis.columns import ColumnPlan
from resq_compiler.analysis.overrides import TopologyOverrides, read_overrides
from resq_compiler.analysis.topology import Topology
from resq_compiler.backends import load_backend
from resq_compiler.backends.fused.foreseen import kernel_problem
from resq_compiler.backends.onnx import export_problem
from resq_compiler.calibration import precision, shards, workdir
from resq_compiler.calibration.causality import check_causal_graph
from resq_compiler.calibration.data import calibration_windows, text_start
from resq_compiler.calibration.shards import SavedStatistics
from resq_compiler.calibration.statistics import take
from resq_compiler.calibration.workdir import WorkDirectory, fingerprint
from resq_compiler.errors import BackendError, ConfigError, DataError, ModelError
from resq_compiler.frontend.capture import Captured, capture, capture_promised, runnable_attention
from resq_compiler.frontend.checks import check_finite_tensor
from resq_compiler.frontend.models import LoadedModel, open_model, open_tokenizer
from resq_compiler.frontend.opened import OpenedModel
from resq_compiler.frontend.positions import longest_text
from resq_compiler.frontend.source import digest_of
from resq_compiler.inspection import forecast, guard, routing
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
from resq_compiler.util import devices, machine, memory, processes, torch_state

log = logging.getLogger("resq_compiler")

Progress = Callable[[str, int, int], None]


@torch_state.compiling()
@processes.shared_with_group
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
    statistics: str | Path | Sequence[str | Path] = (),
    accept_unused_weights: bool = False,
    process_group: ProcessGroup | None = None,
    **options: Any,
) -> CompiledModel:
    """Quantize a decoder.

    Args:    model: a PreTrainedModel or what load_model gave (left as it is), a local directory, a hub id, or a GGUF file.
             calib_data: list of texts, token-id tensors, dict batches, a DataLoader or Dataset, a path to .txt or .jsonl;
             "demo": built-in English text; None: the model writes its own calibration text, seeded.
             recipe: "resq+" (ResQ and what was found to help), "resq" (as published), "quarot", "quik", "gptq", "rtn", a
             CompileConfig, or a tuple of passes. options: any field of CompileConfig; beside passes, those of recipes.RUN_OPTIONS.
             backend: what computes: "reference" (PyTorch), "onnx" (ONNX Runtime) or "triton".
             tokenizer: for texts, when `model` does not come with one: an object, or the directory or hub id of one.
             topology: statements that override what is found in the graph: a dict, a YAML or a JSON file (topology_overrides.py).
             device: what computes the calibration, bases and codes: "cpu", "cuda", "cuda:1" or "auto", a GPU where there is one. The
             weights stay in the CPU's memory but for those of the block at work, and so do those of the result: .to(device) moves it.
             progress: called with (step, done, total). on_stage: called with each pipeline.Stage as it is made.
             on_float: called with the float graph after the last exact pass: projected, partitioned, nothing quantized.
             dump_dir: write a dump of every pass there (default: the environment variable RESQ_DUMP_DIR, else none).
             work_dir: keep finished work there; after an interruption the same call goes on from it, with bit-identical results.
             statistics: directories of files that calibrate() wrote, all parts of one run; their sum stands for the calibration run.
             accept_unused_weights: leave out, with a warning, weights that the model's configuration has no place for.
             process_group: of torch.distributed, whose processes all make this call and share the work: each runs a part of
             the calibration windows and quantizes a part of the rows of every linear. Only the first keeps a work directory and a dump.
    Returns: CompiledModel, float32 between the integers.
    Raises:  BackendError before any work if the backend cannot run here; ConfigError, ModelError, DataError, CaptureError,
             TopologyError, PassError, ProcessError: each says what to do.
    """
    check_backend(backend)
    chosen = named.choose(recipe, **options)
    if not processes.current().is_first:
        work_dir = None
    dump_dir = target_directory(dump_dir) if processes.current().is_first else None
    begun = _begin(
        model, calib_data, chosen, tokenizer, topology, device, progress, work_dir, accept_unused_weights
    )  # fmt: skip
    del model  # from here on only the graph holds the weights, so passes release them as they go
    ctx, about, gm = begun.ctx, begun.about, begun.captured.graph_module
    if statistics:
        ctx.saved = SavedStatistics.open([statistics] if isinstance(statistics, (str, Path)) else list(statistics))
        ctx.saved.check(begun.about_statistics())
    recorded = recording(dump_dir, str(about["provenance"].model), begun.config.to_dict(), on_stage)
    processes.require_equal(processes.current(), begun.about_statistics())
    with recorded as record, memory.settled(), devices.computing_on(begun.device):
        pipeline = Pipeline(ctx, _checking_fit(_checking_export(record.add, ctx, backend), begun))
        pipeline.start(gm, seconds=begun.seconds)
        _run_guarded(pipeline, gm, begun.passes, begun.compared, on_float)
        ctx.note_processes()
        plan = ctx.facts.find(ColumnPlan) or ColumnPlan()
        result = CompileResult(
            gm, named.settled(begun.config, str(plan.sites), str(plan.experts)), begun.captured.cache, **about,
            stages=tuple(pipeline.stages),
            notes=tuple(ctx.notes), topology=ctx.facts.find(Topology),
            sample_ids=None if ctx.calibration is None else ctx.calibration[:1], passes=to_text(begun.passes),
        )  # fmt: skip
        record.complete(result)
    compiled: Any = CompiledModel(result)  # whose `to` transformers types as a function of the model alone
    return (compiled.to(begun.device) if backend == "triton" else compiled).use_backend(backend)


@torch_state.compiling()
def calibrate(
    model: PreTrainedModel | LoadedModel | str | Path,
    calib_data: Any,
    directory: str | Path,
    shard: str = "0/1",
    *,
    recipe: str | CompileConfig | named.Chosen | Sequence[Pass] = named.DEFAULT_RECIPE,
    tokenizer: Any = None,
    topology: Any = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    accept_unused_weights: bool = False,
    **options: Any,
) -> Path:
    """Take the statistics of one part of the calibration windows; `compile(..., statistics=directory)` adds up those of all parts.

    Args:    directory: where the files of this part go, beside those of other parts or alone. shard: "I/N": every Nth of the windows
             that statistics are taken of, from I on; I from 0 to N - 1. All others: as for compile(), and the same as there.
    Returns: the JSON file of the part.
    Raises:  ConfigError: no pass of the recipe asks for statistics, or no windows for this part. Others: as compile() does.
    """
    part = shards.Shard.parse(shard)
    begun = _begin(
        model, calib_data, named.choose(recipe, **options), tokenizer, topology, device, progress, None, accept_unused_weights
    )  # fmt: skip
    ctx, gm = begun.ctx, begun.captured.graph_module
    with torch.no_grad(), devices.computing_on(begun.device):
        pipeline = Pipeline(ctx)
        pipeline.start(gm, seconds=begun.seconds)
        requests = pipeline.run_to_statistics(gm, begun.passes)
        take(gm, requests, part.of(ctx.statistics_windows), None, ctx.progress)
    return shards.write(Path(directory).expanduser(), part, requests, begun.about_statistics())


@dataclass(frozen=True)
class _Begun:
    """What a compile has before its first pass. about: what a result keeps of the float model. seconds: that the capture took."""

    passes: tuple[Pass, ...]
    config: CompileConfig
    device: torch.device
    ctx: PassContext
    captured: Captured
    about: dict[str, Any]
    compared: Tensor | str
    seconds: float

    def about_statistics(self) -> dict[str, Any]:
        """What must be equal for statistics of one compile to be those of another."""
        exact = itertools.takewhile(lambda item: item.exact, self.passes)
        source: Provenance = self.about["provenance"]
        return {
            "passes": to_text(tuple(exact)),
            "options": {name: str(value) for name, value in named.run_options(self.config).items()},
            "versions": versions(),
            "topology": repr(self.ctx.overrides),
            "weights": None if source.model is None else source.model.weights,
            "calibration tokens": None if source.calibration is None else source.calibration.digest,
        }


def _begin(
    model: PreTrainedModel | LoadedModel | str | Path, calib_data: Any, chosen: named.Chosen, tokenizer: Any, topology: Any,
    device: str | torch.device, progress: Progress | None, work_dir: str | Path | None, accept_unused_weights: bool,
) -> _Begun:  # fmt: skip
    """Load, cut calibration windows, capture."""
    check_order(chosen.passes)
    where = devices.resolve(device)
    dtype = precision.resolve(chosen.settings.calibration_dtype, where)
    config = dataclasses.replace(chosen.settings, calibration_dtype=dtype)
    overrides = read_overrides(topology)
    memory.tune_allocator()
    if isinstance(model, CompiledModel):
        raise ModelError(f"model: already compiled ({model.options.scheme}); give the float model it was made from")
    loaded = open_model(model, accept_unused_weights=accept_unused_weights)
    loaded = dataclasses.replace(loaded, tokenizer=open_tokenizer(tokenizer) or loaded.tokenizer)
    report = progress or (lambda step, done, total: None)
    start_of_text = text_start(loaded.tokenizer, config.bos)
    windows = _calibration(loaded, calib_data, config, chosen.passes, report)
    compared = _compared(loaded, calib_data, windows, config)
    digest = _digest(loaded)
    work = None
    if work_dir is not None:
        work = _work_directory(work_dir, chosen.passes, config, digest, windows, overrides)
    about = _about(loaded, digest, calib_data, windows)
    start = time.perf_counter()
    report("capture", 0, 1)
    captured = capture_promised(loaded.skeleton, loaded.weights)
    report("capture", 1, 1)
    if isinstance(model, (str, Path)):
        vocabulary = loaded.skeleton.config.get_text_config().vocab_size
        check_causal_graph(captured.graph_module, vocabulary, loaded.where)
    del loaded, model
    memory.release(captured.graph_module)  # torch.export leaves the model in a reference cycle
    if work is None and graph_tools.promised_bytes(captured.graph_module) >= memory.LARGE_MODEL:
        work = workdir.temporary(captured.graph_module)
        log.info("finished work waits in %s until the result is gone", work.path)
    bos = about["config"].get_text_config().bos_token_id
    ctx = PassContext(
        captured.example_inputs, windows, overrides, work, None, bos, config.seed, config.calibration_dtype, config.basis_samples,
        config.hidden_dtype, progress=report,
    )  # fmt: skip
    if windows is not None:
        processes.current().part(ctx.statistics_windows)  # too few are an error before any work
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
        ctx.note(f"computed on {where} ({name}); codes may differ from those of a CPU by rounding")
    for name, count in captured.left_out.items():
        ctx.note(
            f"left out: {name} ({count:,} weights), which text does not reach; the compiled model takes text alone"
        )
    _note_calibration(ctx, config, start_of_text)
    seconds = time.perf_counter() - start
    return _Begun(chosen.passes, config, where, ctx, captured, about, compared, seconds)


def load(directory: str | Path, device: torch.device | str | None = None) -> CompiledModel:
    """Open a saved compiled model, from a directory or from the Hugging Face hub by its id.

    device: where it lies and runs: "cpu" (default), "cuda", "cuda:1", or "auto", a GPU where there is one.

    Raises ConfigError: no such device.
    Raises: CheckpointError: nothing there, not compiled by resq, written by a newer format, incomplete or damaged.
    """
    return CompiledModel.from_pretrained(directory, device_map=device)


def _digest(loaded: OpenedModel) -> str:
    """The digest of the weights, read one by one. Raises ModelError: one is not finite, or its file is cut off."""

    def finite(name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            check_finite_tensor(name, piece)
            yield piece

    return digest_of((name, shape, finite(name, pieces)) for name, shape, pieces in loaded.values())


def _provenance(loaded: OpenedModel, digest: str, calib_data: Any, windows: Tensor | None) -> Provenance:
    source = dataclasses.replace(loaded.source, weights=digest)
    return Provenance(source, None if windows is None else CalibrationSource.of(calib_data, windows), known=True)


def _about(loaded: OpenedModel, digest: str, calib_data: Any, windows: Tensor | None) -> dict[str, Any]:
    """What a result keeps of the float model beside its graph."""
    config = copy.deepcopy(loaded.skeleton.config)
    config._attn_implementation = (
        "sdpa"  # what the graph has; transformers refuses some others in a class that does not name them
    )
    config._experts_implementation = "eager"  # the same for experts, which the graph has
    return {
        "config": config,
        "generation_config": copy.deepcopy(loaded.skeleton.generation_config),
        "tokenizer": loaded.tokenizer,
        "provenance": _provenance(loaded, digest, calib_data, windows),
    }


def _compared(loaded: OpenedModel, calib_data: Any, windows: Tensor | None, config: CompileConfig) -> Tensor | str:
    """The tokens [1, n] that the compiled graph is compared with the float one on, or why there are none, as a note."""
    if windows is not None:
        return windows[:1, : guard.TOKENS]
    if calib_data is None:
        return (
            "nothing was compared with the float model: no pass of this recipe looks at text, and none was given; "
            "calibration data (calib_data=demo, --calibration demo) is enough for that"
        )
    length = min(config.calibration_length, guard.TOKENS, longest_text(loaded.skeleton) or guard.TOKENS)
    vocab_size = loaded.skeleton.config.get_text_config().vocab_size
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


def _note_calibration(ctx: PassContext, config: CompileConfig, start_of_text: Tensor) -> None:
    """Tell how calibration differs from what a user may expect."""
    windows, count = ctx.calibration, len(start_of_text)
    if windows is None:
        return
    if config.calibration_dtype != "float32":
        ctx.note(
            f"calibration: linears and second moments computed in {config.calibration_dtype}, sums in float32; "
            "calibration_dtype=float32 for all of it"
        )
    if windows.shape[1] < config.calibration_length:
        ctx.note(
            f"calibration: windows of {windows.shape[1]} tokens instead of {config.calibration_length}: there are no more positions"
        )
    if count and bool((windows[:, :count] == start_of_text).all()):
        ctx.note(
            f"calibration: windows begin as the tokenizer begins a text, with {start_of_text.tolist()} (bos=never for none)"
        )


def _checking_export(on_stage: Callable[[Stage], None], ctx: PassContext, backend: str) -> Callable[[Stage], None]:
    """`on_stage`, and, as soon as operators have their final names, whether the model will have an ONNX form, and kernels: a note if not.

    Raises BackendError, before calibration, where the backend needs what the model will not have.
    """

    def seen(stage: Stage) -> None:
        on_stage(stage)
        if stage.name != FindTopology.name or stage.failed is not None:
            return
        problem = export_problem(stage.graph)
        refused = kernel_problem(stage.graph) if backend == "triton" else None
        if problem is not None and backend in ("onnx", "cpu"):
            raise BackendError(f"backend {backend}: {problem}")
        if refused is not None:
            raise BackendError(f"backend {backend}: {refused}")
        if problem is not None:
            ctx.note(f"export: this model cannot be exported to ONNX: {problem}")

    return seen


def _checking_fit(on_stage: Callable[[Stage], None], begun: _Begun) -> Callable[[Stage], None]:
    """`on_stage`, and, as soon as the shapes of the blocks are known, whether there is memory for what is to come: ConfigError if not."""

    def seen(stage: Stage) -> None:
        on_stage(stage)
        if stage.name != FindTopology.name or stage.failed is not None:
            return
        shapes = forecast.Shapes.of(begun.captured.graph_module, begun.ctx.facts.get(Topology))
        found = forecast.forecast(shapes, begun.config, begun.passes, processes=processes.current().size)
        free = machine.free_memory()
        if free is not None:
            free = (free + machine.resident_memory()) // processes.on_this_machine()
        place = Path(tempfile.gettempdir()) if begun.ctx.work is None else begun.ctx.work.path
        aside = (found if free is None else forecast.in_memory(found, free)).aside
        problem = forecast.check_fits(found, free, devices.free_memory(begun.device)) or forecast.disk_problem(
            aside, machine.free_disk(place), str(place), "codes and hidden states that wait in files"
        )
        if problem:
            raise ConfigError(problem)

    return seen


def _run_guarded(
    pipeline: Pipeline, gm: GraphModule, passes: Sequence[Pass], compared: Tensor | str, on_float: Callable[[GraphModule], None] | None
) -> None:  # fmt: skip
    """Run the passes and note where the predictions of the result are far from those of the float graph, on the tokens `compared`."""
    ctx = pipeline.ctx
    if isinstance(compared, str) or any(t.is_meta for t in gm.state_dict().values()):
        _run_passes(pipeline, gm, passes, on_float)
        _settle(gm, ctx)
        if isinstance(compared, str):
            ctx.note(compared)
        return
    if ctx.calibration is None:
        ctx.note("calibration: the data given serves to compare predictions alone, no pass of this recipe looks at it")
    reference, choices = guard.predictions(gm, compared), routing.record(gm, compared)
    _run_passes(pipeline, gm, passes, on_float)
    routed = routing.findings(gm, compared, choices, ctx.facts.find(Topology))
    for note in (*guard.findings(gm, compared, reference), *routed):
        (log.warning if note.startswith("WARNING") else log.info)(note)
        ctx.notes.append(note)
    _settle(gm, ctx)


@memory.sparing()
def _settle(gm: GraphModule, ctx: PassContext) -> None:
    """Every tensor has its value: in memory, or, of a large model, in files of the work directory."""
    large = ctx.work is not None and graph_tools.promised_bytes(gm) >= memory.LARGE_MODEL / 4  # a byte for each code
    graph_tools.settle(gm, ctx.work.path if ctx.work is not None and large else None)


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
    path: str | Path, passes: Sequence[Pass], config: CompileConfig, weights: str, windows: Tensor | None,
    overrides: TopologyOverrides,
) -> WorkDirectory:  # fmt: skip
    settings = {"passes": to_text(passes), "options": named.run_options(config), "versions": versions()}
    return WorkDirectory(path, fingerprint(settings, weights, windows, overrides))


def _calibration(
    loaded: OpenedModel, calib_data: Any, config: CompileConfig, passes: Sequence[Pass], report: Progress
) -> Tensor | None:  # fmt: skip
    if not needs_calibration(passes):
        return None
    shared = processes.current()
    if calib_data is not None:
        return _cut_windows(loaded, calib_data, config, report)
    written = {"windows": _cut_windows(loaded, None, config, report)} if shared.is_first else None
    windows = shared.tensors_of_first(written)  # the first process writes for all
    return None if windows is None else windows["windows"]


def _cut_windows(loaded: OpenedModel, calib_data: Any, config: CompileConfig, report: Progress) -> Tensor:
    vocab_size = loaded.skeleton.config.get_text_config().vocab_size
    length = min(config.calibration_length, longest_text(loaded.skeleton) or config.calibration_length)
    model = loaded.whole() if calib_data is None else loaded.skeleton
    with runnable_attention(model):
        return calibration_windows(
            calib_data, model=model, tokenizer=loaded.tokenizer, samples=config.calibration_samples,
            sequence_length=length, seed=config.seed, bos=config.bos,
            vocab_size=vocab_size, progress=lambda done, total: report("write calibration text", done, total),
        )  # fmt: skip


def trace(model: PreTrainedModel | OpenedModel, topology: Any = None) -> tuple[GraphModule, PassContext]:
    """The named float graph of a model and its topology, nothing quantized. Works on meta weights. topology: as for compile().

    Of an opened model the graph holds promises of the weights.
    """
    if isinstance(model, OpenedModel):
        captured = capture_promised(model.skeleton, model.weights)
    else:
        captured = capture(model)
    ctx = PassContext(captured.example_inputs, overrides=read_overrides(topology))
    pipeline = Pipeline(ctx)
    pipeline.start(captured.graph_module)
    pipeline.run(captured.graph_module, [Canonicalize(), NameAttention(), SplitFused(), FindTopology()])
    return captured.graph_module, ctx
