"""How hidden states of calibration windows are kept between two blocks: in float32 or bfloat16, and, where they do not fit into memory, in
mapped files of the work directory, which nobody has to remove."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resq_compiler.calibration.precision import DTYPES
from resq_compiler.calibration.workdir import WorkDirectory
from resq_compiler.errors import CheckpointError
from resq_compiler.util import machine, memory

SHARE = 0.25
"""Of the free memory: hidden states that need more lie in files."""

_dtype = torch.float32


@contextlib.contextmanager
def kept_in(dtype: str) -> Iterator[None]:
    """Inside, hidden states are kept in a dtype: "float32" or "bfloat16"."""
    global _dtype
    before, _dtype = _dtype, DTYPES[dtype]
    try:
        yield
    finally:
        _dtype = before


def narrow(value: Any) -> Any:
    """As a float32 tensor is kept; anything else as it is."""
    return value.to(_dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def wide(value: Any) -> Any:
    """As what was kept is worked with: a graph has no bfloat16 of its own."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def directory_for(size: int, work: WorkDirectory | None) -> Path | None:
    """Where hidden states of so many bytes lie; None for the memory: they fit, or there is no work directory."""
    free = machine.free_memory()
    if work is None or free is None or size <= SHARE * free:
        return None
    return work.path


def put_aside(value: Any, directory: Path | None) -> Any:
    """The same tensor in a file, whose pages come into memory when somebody looks; what is no large tensor of the CPU stays as it is.

    The file has no name any more, and goes with the tensor. Raises CheckpointError: there is no room for it.
    """
    if (
        directory is None
        or not isinstance(value, Tensor)
        or value.device.type != "cpu"
        or value.nbytes < memory.WORTH_A_FILE
    ):
        return value
    file = directory / f".hidden-{uuid.uuid4().hex}"
    try:
        with file.open("wb") as opened:
            opened.write(value.detach().contiguous().view(torch.uint8).numpy().data)
        mapped = torch.from_file(str(file), shared=True, size=value.numel(), dtype=value.dtype)
    except OSError as error:
        raise CheckpointError(
            f"work_dir {directory}: hidden states could not be written ({error}); make room, or ask for fewer calibration windows"
        ) from error
    finally:
        file.unlink(missing_ok=True)
    return mapped.reshape(value.shape)


def let_go(values: Iterable[Any]) -> None:
    """Let go of the pages of tensors in files that came into memory."""
    for value in values:
        if isinstance(value, Tensor):
            memory.page_out_tensor(value)
