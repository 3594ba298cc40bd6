"""Write a compiled model as an ONNX directory that runs as it is: model, configuration, tokenizer, onnxruntime-genai settings."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler.backends.cpu import platforms as other_platforms

from resq_compiler.errors import BackendError
from resq_compiler.frontend.models import open_tokenizer
from resq_compiler.frontend.positions import longest_row_of_graph, longest_text_of_graph
from resq_compiler.util import memory, placement
from resq_compiler.util.install import install_command

if TYPE_CHECKING:
    import onnx
    from resq_compiler.backends.fused.lower import Lowered
    from resq_compiler.backends.onnx.builder import GraphBuilder
    from resq_compiler.backends.onnx.draft import Draft
    from torch.fx import Graph

    from resq_compiler.result import CompileResult

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
LAST_FILE = "config.json"  # put in place after all others: without it the directory is no model
EXTERNAL_DATA_ABOVE = 2**26  # bytes; ONNX Runtime maps data files instead of copying them, and protobuf ends at 2 GiB
LIBRARY_KEY = "resq.custom_ops_library"  # in the model's metadata: the file of custom operators in its directory
LONGEST_KEY = "resq.longest_text"  # in the metadata of a model whose table of positions ends: tokens
LONGEST_ROW_KEY = "resq.longest_row"  # of one whose table of biases ends: tokens, padding among them
EMBEDDINGS = ("float16", "float32", "int8", "lm_head")


def export_onnx(
    compiled: CompileResult, directory: str | Path, profile: str = "qdq", *, embedding: str = "float16", kv_cache: str = "float",
    overwrite: bool = False, tokenizer: Any = None, platforms: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write `compiled` to a directory.

    Args:    profile: "qdq" (standard INT4/INT8 QuantizeLinear/DequantizeLinear, any runtime), "ort" (integer products, fastest in
             ONNX Runtime without further libraries), "weight-only" (INT4 only in weights) or "native" (fused operators of the CPU
             kernels, whose library is put beside the model); see profiles.py for who can run each.
             embedding: how the embedding table is stored: "float16", "float32" (bit-equal to the reference) or "int8"; or not at all,
             "lm_head": with "native", tied tables and lm_head_bits=8, rows of lm_head stand for it (tied_embedding.py).
             kv_cache: "float" (clients understand it: float tensors that hold the image of 4/8-bit codes) or "packed" (uint8
             codes and scales, about a fifth of the memory; for this package's runtime). "native" is always packed, for all.
             overwrite: replace what is in the directory. tokenizer: default, the one the model came with.
             platforms: with "native", whose libraries are put into lib/PLATFORM too: names ("linux-aarch64") or wheels of resq_kernels.
    Returns: the directory, with model.onnx (its tensors in model.onnx.data above 64 MiB), config.json, generation_config.json,
             genai_config.json and the tokenizer's files.
    Raises:  BackendError, before anything is written: an operator without an ONNX form, an unknown choice, onnx missing,
             onnxruntime too old for the profile, no CPU kernels for "native", a target that is not empty, not writable or too small.
    """
    from resq_compiler.backends.onnx.profiles import find_profile

    target = Path(directory).expanduser()
    former = check_target(target, overwrite)
    native = find_profile(profile).native
    memory.tune_allocator()
    tokenizer = open_tokenizer(tokenizer) or compiled.tokenizer
    check_platforms(native, platforms)
    model = draft_model(compiled, profile, embedding=embedding, kv_cache=kv_cache)
    check_space(target, model.nbytes)
    try:
        with placement.replacing(target, former, last=LAST_FILE) as fresh:
            save_model(model, fresh)
            if native:
                from resq_compiler.backends.onnx.native import kernels_library

                shutil.copy(kernels_library(), fresh)
                other_platforms.add(fresh, platforms)
            write_settings(compiled, fresh, profile, kv_cache, tokenizer)
    except OSError as error:
        raise BackendError(f"export_onnx: writing to {target} failed: {error}; nothing was changed there") from error
    return target


def build_model(
    compiled: CompileResult, profile: str = "qdq", *, embedding: str = "float16", kv_cache: str = "float"
) -> onnx.ModelProto:
    """The ONNX model in memory. Raises BackendError as `export_onnx`."""
    return draft_model(compiled, profile, embedding=embedding, kv_cache=kv_cache).whole()


def draft_model(
    compiled: CompileResult, profile: str = "qdq", *, embedding: str = "float16", kv_cache: str = "float"
) -> Draft:
    """The ONNX model before its large tensors are made. Raises BackendError as `export_onnx`."""
    require_onnx()
    from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes  # noqa: F401  (each registers its emitters)
    from resq_compiler.backends.onnx.lowering import Lowering, LoweringOptions
    from resq_compiler.backends.onnx.profiles import find_profile
    from resq_compiler.backends.onnx.registry import check_supported

    chosen = find_profile(profile)
    require_runtime(chosen.minimum_onnxruntime, f"profile {profile}", optional=True)
    check_choice("embedding", embedding, EMBEDDINGS)
    check_choice("kv_cache", kv_cache, ("float", "packed"))
    if embedding == "lm_head" and not chosen.native:
        raise BackendError(
            f"export_onnx: embedding='lm_head' is for profile native alone, whose library reads lm_head's codes; got profile {profile}; "
            "say embedding='int8'"
        )
    check_supported(compiled.graph_module)
    form = chosen.form()
    if chosen.native:
        builder = native_builder(compiled, embedding, later=True)[1]
        return builder.draft("resq_model", native_metadata(compiled, embedding), version())
    if kv_cache == "packed":
        from resq_compiler.backends.onnx.packed_cache import with_packed_cache

        form = with_packed_cache(form)
    lowering = Lowering(compiled.graph_module, tuple(compiled.cache_specs), form, LoweringOptions(embedding))
    return lowering.run().draft("resq_model", metadata(compiled, profile, embedding, kv_cache), version())


def native_builder(compiled: CompileResult, embedding: str, later: bool = False) -> tuple[Lowered, GraphBuilder]:
    """The lowered graph, and its ONNX form. later: weights are packed when they are written.

    Raises BackendError that names every node no kernel takes.
    """
    from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes  # noqa: F401  (each registers its emitters)
    from resq_compiler.backends.onnx.lowering import LoweringOptions
    from resq_compiler.backends.onnx.native import NativeLowering, lower_native

    lowered = lower_native(compiled.graph_module, later)
    return lowered, NativeLowering(lowered, LoweringOptions(embedding)).run()


def native_metadata(compiled: CompileResult, embedding: str) -> dict[str, str]:
    """What a model of profile `native` says of itself."""
    from resq_compiler.backends.onnx.native import kernels_library

    return {**metadata(compiled, "native", embedding, "packed"), LIBRARY_KEY: kernels_library().name}


def check_platforms(native: bool, platforms: Sequence[str]) -> None:
    """BackendError for platforms of a profile without a library, and for unknown ones."""
    if platforms and not native:
        raise BackendError(f"export_onnx: platforms {', '.join(platforms)}: only profile native has a library")
    other_platforms.check(platforms)


def export_problem(graph: Graph) -> str | None:
    """Why a float graph will not have an ONNX form once it is compiled; None where nothing is known against it.

    None also where the onnx package is missing, which `export_onnx` says itself.
    """
    try:
        from resq_compiler.backends.onnx import emit_aten, emit_ops, emit_shapes  # noqa: F401  (each registers its emitters)
        from resq_compiler.backends.onnx.registry import unsupported, without_form
    except ImportError:
        return None
    missing = without_form(graph)
    return unsupported(missing) if missing else None


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BackendError(f"export_onnx: {option} expected one of {', '.join(allowed)}; got {value!r}")


def require_onnx() -> None:
    """BackendError when the onnx package is missing."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise BackendError(f"onnx export needs the onnx package; run: {install_command('onnx')}") from error


def require_runtime(minimum: str, what: str, *, optional: bool = False) -> None:
    """BackendError when onnxruntime is older than `minimum`, or missing (unless optional)."""
    try:
        installed = importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError as error:
        if optional:
            return
        raise BackendError(
            f"{what} needs onnxruntime {minimum} or newer, which is not installed; run: {install_command('onnx')}"
        ) from error
    if number(installed) < number(minimum):
        raise BackendError(
            f"{what} needs onnxruntime {minimum} or newer, found {installed}; run: {install_command('onnx')}"
        )


def number(text: str) -> tuple[int, ...]:
    """(1, 31) of "1.31.1"."""
    return tuple(int(p) for p in text.split(".")[:2] if p.isdigit())


def check_target(target: Path, overwrite: bool) -> set[str]:
    """Names there that the export replaces. BackendError when it cannot be written there, before any work."""
    if target.exists() and not target.is_dir():
        raise BackendError(f"export_onnx: {target} is a file; expected a directory")
    try:
        former = placement.contents(target) if target.is_dir() else set()
        placement.check(target)
    except OSError as error:
        raise BackendError(f"export_onnx: {target} is not writable ({error}); choose another directory") from error
    if former and not overwrite:
        raise BackendError(f"export_onnx: {target} is not empty; choose another directory or pass overwrite=True")
    return former


def check_space(target: Path, size: int) -> None:
    """BackendError when the disk is too full for a model of that size."""
    place = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < size + 2**24:
        raise BackendError(
            f"export_onnx: {place} has {free / 2**20:.0f} MiB free, the model needs {size / 2**20:.0f} MiB"
        )


def save_model(model: Draft, directory: Path) -> None:
    """model.onnx, with its tensors beside it where they are large."""
    if model.nbytes > EXTERNAL_DATA_ABOVE:
        model.save_apart(directory / MODEL_FILE, DATA_FILE)
    else:
        model.save(directory / MODEL_FILE)


def write_settings(compiled: CompileResult, directory: Path, profile: str, kv_cache: str, tokenizer: Any) -> None:
    """config.json, generation_config.json, the tokenizer and genai_config.json."""
    from resq_compiler.backends.onnx.genai import genai_config, genai_takes
    from resq_compiler.backends.onnx.profiles import PROFILES

    config = copy.deepcopy(compiled.config)
    if hasattr(config, "quantization_config"):  # it describes safetensors, which are not here
        del config.quantization_config
    config.save_pretrained(directory)
    compiled.generation_config.to_json_file(
        directory / "generation_config.json"
    )  # save_pretrained refuses what models come with
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if (PROFILES[profile].native or kv_cache == "float") and genai_takes(compiled):
        settings = genai_config(compiled, profile)
        (directory / "genai_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def metadata(compiled: CompileResult, profile: str, embedding: str, kv_cache: str) -> dict[str, str]:
    """What was exported and by what: recipe, options, versions, and the session options that go with it."""
    from resq_compiler.backends.onnx.profiles import PROFILES

    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx")}
    lengths = {
        LONGEST_KEY: longest_text_of_graph(compiled.graph_module.graph, compiled.config),
        LONGEST_ROW_KEY: longest_row_of_graph(compiled.graph_module.graph, compiled.config),
    }
    return {
        **{key: str(longest) for key, longest in lengths.items() if longest is not None},
        "resq.version": version(), "resq.profile": profile, "resq.recipe": compiled.options.recipe, "resq.scheme": compiled.options.scheme,
        "resq.options": json.dumps(compiled.options.to_dict()), "resq.embedding": embedding, "resq.kv_cache": kv_cache,
        "resq.packages": json.dumps(packages), "resq.source": compiled.source,
        "resq.session_options": json.dumps(PROFILES[profile].session_options),
    }  # fmt: skip


def version() -> str:
    import resq_compiler

    return resq_compiler.__version__
