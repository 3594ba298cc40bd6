"""A CUDA device that is not there: tensors on it hold values in CPU memory, so that whole compiles run, and mixed devices fail.

    with FakeCuda() as gpu:
        x = torch.ones(3, device="cuda")        # x.device is cuda:0
        x + torch.ones(3)                       # RuntimeError, as on a machine with a GPU
    gpu.calls                                   # how often each operator ran there

It is a FakeTensorMode, which PyTorch lets make CUDA tensors without a driver; beside each fake tensor stands a real one, and operators
compute with the real ones. What never meets the device is left to PyTorch as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
CROSSING = {aten.copy_.default, aten._to_copy.default}  # what may read one device and write another


class FakeCudaTensor(FakeTensor):
    """A tensor of the device; held: its values, in CPU memory."""

    held: Tensor

    @property
    def is_cuda(self) -> bool:  # a PyTorch without CUDA says no
        return True

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # PyTorch's own believes that the tensor is on the CPU
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device == CUDA:
            return super().to(dtype or self.dtype)
        return aten._to_copy(self, device=device, dtype=dtype)

    def cpu(self) -> Tensor:
        return self.to(CPU)


class FakeCuda(FakeTensorMode):
    """The device, as a context. calls: how often each operator ran there."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.calls: Counter[str] = Counter()

    @property
    def avoid_device_init(self) -> bool:
        return True

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        flat, spec = tree_flatten((args, kwargs or {}))
        inputs = [x for x in flat if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) and not isinstance(x, FakeCudaTensor) for x in inputs):
            return super().dispatch(func, types, args, kwargs)  # of another mode
        asked = next((x for x in flat if isinstance(x, torch.device)), None)
        if func is torch.ops.prim.device.default:
            return CPU  # asked by PyTorch's own code, which would look for a driver
        here = [x for x in inputs if isinstance(x, FakeCudaTensor)]
        if not here and (asked is None or asked.type == "cpu"):
            return func(*args, **(kwargs or {}))
        device = asked or device_of(func, inputs)
        check_generator(flat, device)
        self.calls[str(func)] += 1
        held = {id(x.held): x for x in here}
        real = [CPU if isinstance(x, torch.device) else x.held if isinstance(x, FakeCudaTensor) else x for x in flat]
        real_args, real_kwargs = tree_unflatten(real, spec)
        result = func(*real_args, **real_kwargs)
        return tree_map(lambda x: self.shown(x, held, device) if isinstance(x, Tensor) else x, result)

    def shown(self, value: Tensor, held: dict[int, Tensor], device: torch.device) -> Tensor:
        """The tensor on `device` that stands for a real one: an operand that was written to, or a new one."""
        if id(value) in held:
            return held[id(value)]
        if device.type != "cuda":
            return value
        shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        fake = FakeCudaTensor(self, shape, CUDA)
        fake.held = value
        return fake


def device_of(func: Any, inputs: list[Tensor]) -> torch.device:
    """Where the result of an operator is. Raises RuntimeError: operands on different devices; scalars of the CPU may join any."""
    devices = {x.device for x in inputs if x.dim() or x.device.type == "cuda"} or {x.device for x in inputs}
    if func in CROSSING:
        return inputs[0].device
    if len(devices) > 1:
        raise RuntimeError(f"{func}: operands on {' and '.join(sorted(map(str, devices)))}")
    return CUDA if any(x.device.type == "cuda" for x in inputs) else CPU


def check_generator(flat: list[Any], device: torch.device) -> None:
    """Raise RuntimeError for a draw on one device from a generator of another."""
    for x in flat:
        if isinstance(x, torch.Generator) and x.device.type != device.type:
            raise RuntimeError(f"expected a generator of {device}, got one of {x.device}")
