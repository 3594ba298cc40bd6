"""In what precision linears and second moments of calibration runs are computed: bfloat16 where the processor or the GPU has it.

Calibration measures second moments, and 4-bit codes are 100 times coarser than bfloat16's relative error of 2^-9: what is lost is less than
what another draw of rotations changes (docs/results). Rounded are linears (inputs, weights, results) and the products of second moments,
but for loud tokens (numerics/basis.py); sums inside a product are float32, and so is everything else: residual stream, norms, attention and
GPTQ. Nothing of this is left in the compiled model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakTensorKeyDictionary

from resq_compiler.ir import ops, promises
from resq_compiler.ir.args import argument, parameters_of
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.numerics.quantized import column_scales
from resq_compiler.util.devices import CPU

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NATIVE = ("avx512_bf16", "amx_bf16")
"""Instruction sets, as torch.cpu.get_capabilities() names them; elsewhere bfloat16 is emulated, and slower than float32."""

ROUNDED = (aten.linear.default, ops.weight_only_linear)
"""Their first arguments are an input, and a weight or its codes."""

_dtype = torch.float32


def resolve(
    dtype: Literal["auto", "float32", "bfloat16"], device: torch.device = CPU
) -> Literal["float32", "bfloat16"]:  # fmt: skip
    """The dtype that "auto" stands for on a device of this machine: recorded with the result, it repeats it elsewhere."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if any(capabilities.get(name) for name in NATIVE) else "float32"


@contextlib.contextmanager
def linears_in(dtype: str) -> Iterator[None]:
    """Inside, `substitutes` are those of a value of `calibration_dtype`; "auto" that nobody resolved is float32."""
    global _dtype
    before, _dtype = _dtype, DTYPES.get(dtype, torch.float32)
    try:
        yield
    finally:
        _dtype = before


def dtype() -> torch.dtype:
    """What linears, and second moments of their inputs, are computed in here."""
    return _dtype


def substitutes() -> Mapping[object, Callable]:
    """Operators to call instead of a node's own, in one calibration run."""
    if _dtype == torch.float32:
        return {}
    linears = _Rounded(_dtype)
    return dict(zip(ROUNDED, (linears.linear, linears.weight_only_linear), strict=True))


def rounded(node: Node, value: Any) -> Any:
    """The value of a node, or the tensor of the model that it is, in the dtype of linears where these are all that reads it."""
    if _dtype == torch.float32 or not isinstance(value, Tensor) or isinstance(value, promises.Promised):
        return value
    return value.to(_dtype) if all(_rounds(user, node) for user in node.users) else value


def _rounds(user: Node, node: Node) -> bool:
    """Whether a node that reads another one is a linear in another dtype, and reads it as its input, its weight or its codes."""
    if not is_call(user, *ROUNDED):
        return False
    names = list(parameters_of(user))
    return not any(argument(user, name) is node for name in names[2:])


class _Rounded:
    """Linears in another dtype; a value that several of them read is rounded once, and forgotten with the value."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x not in self.values:
            self.values[x] = x.to(self.dtype)
        if promises.is_table(weight):
            y = weight.promise.times(self.values[x]).to(x.dtype)
        else:
            y = F.linear(self.values[x], weight.to(self.dtype)).to(x.dtype)
        return y if bias is None else y.add_(bias)

    def weight_only_linear(self, x: Tensor, qdata: Tensor, scale: Tensor, group_size: int | None = None) -> Tensor:
        """The codes are exact in bfloat16; scales of rows stay float32, those of groups are rounded with the weight."""
        if group_size is not None:
            return self.linear(x, qdata * column_scales(scale, qdata.shape[1], group_size))
        return self.linear(x, qdata).mul_(scale)
