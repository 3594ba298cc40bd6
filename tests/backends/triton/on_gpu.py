"""The kernel tests on a GPU: operands and results stay on the CPU, every launch computes on copies of their memory there.

So one set of tests holds for the interpreter and for the real thing: TRITON_INTERPRET=0 chooses.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from resq_compiler.backends.triton import (
    attention,
    expand,
    grouped_linear,
    hadamard_quantize,
    launch,
    mixed_linear,
    norm_quantize,
    rope_cache,
)
from torch import Tensor

KERNELS = (attention, expand, grouped_linear, hadamard_quantize, mixed_linear, norm_quantize, rope_cache)
GPU = torch.device("cuda")


def wanted() -> bool:
    """True where kernels are compiled for a GPU that is there."""
    return torch.cuda.is_available() and not launch.interpreted()


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch on copies of the arguments' memory, strides and offsets kept, and copy everything back."""
    if launch._RECORDER:
        return launch.run(kernel, grid, *arguments, **options)
    memory: dict[int, tuple[Tensor, Tensor]] = {}

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.is_cuda:
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            own = torch.zeros(0, dtype=torch.uint8).set_(storage)
            memory[storage.data_ptr()] = own, own.to(GPU)
        copy = memory[storage.data_ptr()][1].untyped_storage()
        return torch.zeros(0, dtype=x.dtype, device=GPU).set_(copy, x.storage_offset(), x.size(), x.stride())

    kernel[grid](*[there(x) for x in arguments], **options)
    for own, copy in memory.values():
        own.copy_(copy)
    return None


def checked(kernel: str, **tensors: Tensor | None) -> torch.device:
    """launch.check_launch, which refuses operands on a CPU."""
    with mock.patch.object(launch, "interpreted", lambda: True):
        return launch.check_launch(kernel, **tensors)


def launch_there(monkeypatch: Any) -> None:
    """Until the test ends: what kernels are compiled for, and where they run, is the GPU."""
    for module in KERNELS:
        monkeypatch.setattr(module, "run", run)
        if hasattr(module, "check_launch"):
            monkeypatch.setattr(module, "check_launch", checked)
        for name in ("capability", "processors", "prefill_tiles", "attention_tiles"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _decided_there(getattr(module, name)))


def _decided_there(choose: Any) -> Any:
    return lambda *arguments: choose(*arguments[:-1], GPU if arguments[-1].type == "cpu" else arguments[-1])
