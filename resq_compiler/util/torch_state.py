"""Switches of torch that change what is computed. Compiled models are defined without them, whatever a caller has on."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Iterator

import torch

_compiling = threading.RLock()


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, products are computed in the dtypes of their inputs."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, one thread compiles (torch.export and the default dtype are the process's), in float32, outside of inference mode.

    A second thread waits.
    """
    with _compiling, torch.inference_mode(False), without_autocast():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def flushes_denormals() -> bool:
    """True where this thread computes with denormal numbers as with zero."""
    return sys.float_info.min / 2 == 0


@contextlib.contextmanager
def denormals(flushed: bool | None = None) -> Iterator[None]:
    """Inside, this thread takes denormal numbers as zero, or not (None: as before); afterwards as before, whatever was set inside."""
    before = flushes_denormals()
    if flushed is not None:
        torch.set_flush_denormal(flushed)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Inside, an export that fails does not print the graph so far on stderr: its exception says what happened."""
    shapes, held = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    level = shapes.level
    shapes.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(held):
            yield
    finally:
        shapes.setLevel(level)
    sys.stderr.write(held.getvalue())
