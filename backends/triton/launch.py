"""What every kernel wrapper needs around a launch: availability, instruction set, processor count, tuned tiles, counters, recording."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from resq_compiler.backends.triton.gpus import Gpu

from resq_compiler.errors import BackendError
from resq_compiler.util.install import install_command

INTERPRETER_PROCESSORS = 4
_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}
_MAX_COUNTERS = 65536
_RECORDER: list[Recorder] = []
_REQUESTED: list[str] = []


def interpreted() -> bool:
    """True under TRITON_INTERPRET=1: kernels run in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """None if kernels can run here, else what is missing and what to do. Never raises."""
    if importlib.util.find_spec("triton") is None:
        return f"the package triton is not installed; run: {install_command('triton')}"
    if not interpreted() and not torch.cuda.is_available():
        return (
            "torch sees no CUDA or ROCm device; run on a machine with a GPU, use backend='onnx' on this one, or set TRITON_INTERPRET=1 "
            "before Python starts to test the kernels slowly on the CPU"
        )
    return None


def check_launch(kernel: str, **tensors: torch.Tensor | None) -> torch.device:
    """The one device of the operands.

    Raises: BackendError: operands on several devices, not contiguous in the last dimension, or on a CPU without the interpreter.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    devices = {t.device for t in present.values()}
    if len(devices) != 1:
        where = ", ".join(f"{name} on {t.device}" for name, t in present.items())
        raise BackendError(
            f"{kernel}: operands must share one device, got {where}; move the model and its inputs together"
        )
    for name, t in present.items():
        if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise BackendError(
                f"{kernel}: {name} {tuple(t.shape)} has strides {t.stride()}, expected 1 last; call .contiguous()"
            )
    device = devices.pop()
    if device.type == "cpu" and not interpreted():
        raise BackendError(
            f"{kernel}: operands are on the CPU; move the model with .to('cuda'), or use backend='reference' or 'onnx'"
        )
    return device


def isa() -> str:
    """Which inline assembly kernels use: "ptx", "gcn", or "generic" in the interpreter."""
    if _RECORDER:
        return _RECORDER[-1].target.isa
    if interpreted():
        return "generic"
    return "gcn" if torch.version.hip else "ptx"


def precision() -> str:
    """How float32 operands enter tensor cores: as three tf32 products on NVIDIA, which keeps float32 accuracy."""
    return "tf32x3" if isa() == "ptx" else "ieee"


def capability(device: torch.device) -> int:
    """Compute capability as in sm_86 -> 86; 0 for anything that is not NVIDIA."""
    if isa() != "ptx":
        return 0
    if _RECORDER:
        return int(_RECORDER[-1].target.arch)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    if _RECORDER:
        return _RECORDER[-1].target.processors
    return INTERPRETER_PROCESSORS if device.type == "cpu" else _device_processors(device)


@functools.cache
def _device_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, its positional arguments, its constants and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    options: dict


@dataclass
class Recorder:
    """What `recording` collects."""

    target: Gpu
    launches: list[Launch] = field(default_factory=list)


@contextlib.contextmanager
def recording(target: Gpu) -> Iterator[Recorder]:
    """Within it, wrappers called on meta tensors decide as on `target`, and record their launches instead of running them."""
    _RECORDER.append(Recorder(target))
    try:
        yield _RECORDER[-1]
    finally:
        _RECORDER.pop()


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the GPU of its first operand, which need not be the current one, or record the launch."""
    if _RECORDER:
        _RECORDER[-1].launches.append(Launch(kernel, grid, arguments, options))
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


def arrival_counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros that split kernels count arrivals in; kept for reuse, since the last arrival writes the zero back.

    One array for each device and stream: two launches that share it must not overlap.
    """
    if device.type == "meta":
        return torch.empty(_MAX_COUNTERS, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _COUNTERS:
        _COUNTERS[device, stream] = torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=device)
    if count > _MAX_COUNTERS:
        raise BackendError(
            f"split kernels count at most {_MAX_COUNTERS} tiles, got {count}; use fewer rows or columns a call"
        )
    return _COUNTERS[device, stream]


def tuning_file() -> Path:
    """Where `benchmarks/triton_kernels.py --tune` keeps its choices: $XDG_CACHE_HOME (or ~/.cache)/resq_compiler."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "resq_compiler" / "triton_tiles.json"


@functools.cache
def _tuned() -> dict[str, dict]:
    path = tuning_file()
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise BackendError(
            f"{path}: not readable as JSON ({e}); delete it or run benchmarks/triton_kernels.py --tune"
        ) from e


def tuning_key(kernel: str, device_name: str, *shape: int) -> str:
    """The name of a tuned choice: kernel, device and the shape that decides."""
    return "/".join([kernel, device_name, "x".join(map(str, shape))])


def tiles(kernel: str, device: torch.device, shape: tuple[int, ...], default: dict) -> dict:
    """Tile sizes and launch options: the tuned ones for this device and shape if there are any, else `default`."""
    if device.type != "cuda":
        return default
    key = tuning_key(kernel, _device_name(device), *shape)
    _REQUESTED.append(key)
    del _REQUESTED[:-64]
    return {**default, **_tuned().get(key, {})}


def requested_tiles(call: Callable[[], object]) -> list[str]:
    """The keys of the tiles that a call asks for, for tuning."""
    _REQUESTED.clear()
    call()
    return list(_REQUESTED)
