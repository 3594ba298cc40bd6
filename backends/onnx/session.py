"""ONNX Runtime sessions of exported models, and running them on torch tensors without copies of the cache."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx.export import LIBRARY_KEY, require_runtime
from resq_compiler.backends.onnx.profiles import FLUSH_DENORMALS
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.util import memory
from resq_compiler.util.torch_state import denormals

MINIMUM = "1.20"
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def open_session(
    model: str | Path | bytes, *, threads: int | None = None, extra_options: dict[str, str] | None = None, library: Path | None = None,
    profile: Path | None = None,
) -> Any:  # fmt: skip
    """An InferenceSession on the CPU with the session options and the library of operators that the model's metadata asks for.

    threads: of one operator; default, torch's setting. extra_options: ONNX Runtime configuration entries that win over the model's.
    library: of custom operators; default, the one beside the model that its metadata names.
    profile: start of the name of the file that `end_profiling` writes, with every step of a chain apart; default, no profiling.
    """
    require_runtime(MINIMUM, "running an ONNX model")
    import onnxruntime

    source: str | bytes = model if isinstance(model, bytes) else str(model)
    described = metadata(source)
    options = session_options({**recommended_options(described), **(extra_options or {})}, threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if LIBRARY_KEY in described:
        options.register_custom_ops_library(
            str(library or checked_library(Path(str(model)).parent, described[LIBRARY_KEY]))
        )
    if profile is not None and isinstance(source, str):
        options.add_session_config_entry(EXTERNAL_FOLDER, str(Path(source).parent))
        source = without_chains(source)
    try:
        with denormals():  # the first session of a process sets them for the thread that opens it
            opened = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} cannot load the model: {text}; see the profiles for who can run each"
        ) from error
    memory.trim()  # INT4 weights are unpacked and repacked at load: a third of the heap is free by now
    return opened


def without_chains(path: str) -> bytes:
    """A model whose chains are nodes again, so that a profile tells their times apart; the rest of its tensors stays in its directory."""
    import onnx
    from resq_compiler.backends.onnx.chain import unchained

    model = onnx.load(path, load_external_data=False)
    nodes = list(unchained(model.graph.node))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def session_options(entries: dict[str, str], threads: int | None) -> Any:
    """SessionOptions with configuration entries."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    options.execution_order = (
        onnxruntime.ExecutionOrder.PRIORITY_BASED
    )  # consumers soon after producers: 5 % of a decode step
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def checked_library(directory: Path, name: str) -> Path:
    """The library of operators of a directory. Raises BackendError: it is not there, or cannot be used on this machine."""
    from resq_compiler.backends.cpu.library import Library
    from resq_compiler.backends.cpu.platforms import library_in, this_platform

    path = library_in(directory, name)
    if not path.is_file():
        raise BackendError(f"{path} does not exist; the model needs it: export again with profile native")
    try:
        return Library(path).path.resolve()
    except BackendError as error:
        reason = str(error).removeprefix("cpu kernels: ").partition("; install again")[0]
        raise BackendError(
            f"{reason}; export again with `--platform {this_platform()}`, or put the library of this package's kernels in its place"
        ) from error


def metadata(source: str | bytes) -> dict[str, str]:
    """The metadata of a model. Raises BackendError: not an ONNX model."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = (
            onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source, load_external_data=False)
        )
    except DecodeError as error:
        name = "the model" if isinstance(source, bytes) else source
        raise BackendError(
            f"{name} is no ONNX model or is damaged: {error}; write it again with export_onnx"
        ) from error
    return {entry.key: entry.value for entry in model.metadata_props}


def session_metadata(session: Any) -> dict[str, str]:
    """The metadata of the model of a session. Raises BackendError: it is no text."""
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError as error:
        raise BackendError(f"the metadata of the model is damaged: {error}; write it again with export_onnx") from error


def is_native(session: Any) -> bool:
    """Whether a session is of profile `native`: its cache can be written in place."""
    return session_metadata(session).get("resq.profile") == "native"


def recommended_options(described: dict[str, str]) -> dict[str, str]:
    """The session options in a model's metadata; {} for a model of another origin. Raises BackendError: they are none."""
    written = described.get("resq.session_options", "{}")
    try:
        options = json.loads(written)
    except ValueError as error:  # protobuf leaves bytes that are no text as they are
        raise _no_options(written) from error
    if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
        raise _no_options(written)
    return options


def _no_options(written: object) -> BackendError:
    return BackendError(
        f"resq.session_options in the metadata of the model: expected a JSON object of texts, got {str(written)[:80]!r}; "
        "it is damaged: write it again with export_onnx"
    )


def to_ort(tensor: Tensor) -> Any:
    """An OrtValue over the memory of a CPU tensor; the tensor must outlive it."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.detach().numpy()))


def to_torch(value: Any) -> Tensor:
    """A tensor over the memory of an OrtValue where onnxruntime allows it, else a copy."""
    shape = value.shape()
    if 0 in shape:  # an empty tensor has no memory to share
        return torch.from_numpy(value.numpy())
    try:
        return torch.utils.dlpack.from_dlpack(value._ortvalue)
    except (AttributeError, RuntimeError, TypeError):
        return torch.from_numpy(value.numpy())


def run(session: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name, as OrtValues, from inputs given as OrtValues."""
    names = [o.name for o in session.get_outputs()]
    with denormals_of(session):
        return dict(zip(names, session.run_with_ort_values(names, inputs), strict=True))


def denormals_of(session: Any) -> AbstractContextManager[None]:
    """Inside, the calling thread, which computes as well, takes denormal numbers as the threads of the session do."""
    return denormals(flushes(session))


def flushes(session: Any) -> bool:
    """Whether the threads of a session take denormal numbers as zero."""
    (name,) = FLUSH_DENORMALS
    try:
        return session.get_session_options().get_session_config_entry(name) == "1"
    except RuntimeError:  # not set
        return False
