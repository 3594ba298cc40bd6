"""Backends by name. Loaders import on first use: a missing optional package matters only to those who ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from resq_compiler.backends.base import Backend

from resq_compiler.errors import BackendError


def _reference() -> type[Backend]:
    from resq_compiler.backends.reference import ReferenceBackend

    return ReferenceBackend


def _onnx() -> type[Backend]:
    from resq_compiler.backends.onnx.backend import OnnxBackend

    return OnnxBackend


def _triton() -> type[Backend]:
    from resq_compiler.backends.triton.backend import TritonBackend

    return TritonBackend


def _cpu() -> type[Backend]:
    from resq_compiler.backends.onnx.cpu_backend import CpuBackend

    return CpuBackend


BACKENDS: dict[str, Callable[[], type[Backend]]] = {
    "reference": _reference,
    "onnx": _onnx,
    "cpu": _cpu,
    "triton": _triton,
}


def backends_for(device: str) -> tuple[str, ...]:
    """What "auto" tries for a model whose tensors are on a device of that type, best first."""
    return ("triton", "reference") if device == "cuda" else ("cpu", "reference")


def load_backend(name: str, **options: Any) -> Backend:
    """The backend of that name, made with its options.

    Raises BackendError if there is no such backend or option, or if it cannot run here (with what to install).
    """
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, auto; got {name!r}")
    kind = BACKENDS[name]()
    known = [] if kind.__init__ is object.__init__ else list(inspect.signature(kind).parameters)
    if not set(options) <= set(known):
        raise BackendError(f"backend {name}: options {sorted(options)}; it takes {', '.join(known) or 'none'}")
    backend = kind(**options)
    missing = backend.unavailable()
    if missing is not None:
        raise BackendError(f"backend {name}: {missing}; use backend='reference', which runs everywhere")
    return backend
