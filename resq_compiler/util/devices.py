"""Which device computes. Weights of a compile lie in the memory of the CPU, or in files; what works on one takes a copy to the device.

    with computing_on(resolve("cuda")):
        here(weight)          # on the GPU

Where nobody says so everything is computed where it lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from resq_compiler.errors import ConfigError

CPU = torch.device("cpu")

_current: torch.device | None = None


def resolve(name: str | int | torch.device | None) -> torch.device:
    """The device of a name, with its number: "cpu", "cuda", "cuda:1", or "auto", the first CUDA device where there is one.

    Raises ConfigError: no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None or name == "auto":
        return torch.device("cuda", 0) if count else CPU
    try:
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected cpu, cuda, cuda:N or auto; got {name!r}") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise ConfigError(f"device {name}: expected cpu, cuda, cuda:N or auto")
    index = device.index or 0
    if index >= count:
        raise ConfigError(f"device {name}: {_found(count)}; expected auto, cpu{', ' if count else ''}{_names(count)}")
    return torch.device("cuda", index)


def _found(count: int) -> str:
    if count:
        return f"this machine has {count} CUDA device{'s' if count > 1 else ''}"
    built = torch.version.cuda or torch.version.hip
    return "no CUDA device is found here" if built else f"this PyTorch ({torch.__version__}) is built without CUDA"


def _names(count: int) -> str:
    return ", ".join(f"cuda:{i}" for i in range(count))


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside, `here` brings tensors to a CUDA device; on the CPU everything lies already."""
    global _current
    before, _current = _current, None if device == CPU else device
    try:
        yield
    finally:
        _current = before


def current() -> torch.device | None:
    """The device that computes now; None where everything is computed where it lies."""
    return _current


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for the CPU."""
    return None if device.type != "cuda" else torch.cuda.mem_get_info(device)[0]


def here(tensor: Tensor) -> Tensor:
    """The tensor on the device that computes now."""
    return tensor if _current is None or tensor.device == _current else tensor.to(_current)
