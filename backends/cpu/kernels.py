"""The kernels on torch tensors: arguments are checked, results allocated, and the library called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.library import (
    MAX_COLUMNS,
    MAX_PARTS,
    CodesOut,
    HadamardQuantizeArgs,
    Library,
    LinearPart,
    MixedLinearArgs,
    NormQuantizeArgs,
    Part,
    Transform,
)
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import HadamardPlan, hadamard_plan
from resq_compiler.numerics.hadamard_orders import is_power_of_two

NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu", "clamped")


@dataclass(frozen=True)
class CodePart:
    """What a part of a row becomes: `groups` runs of `width` columns in codes of `bits` bits; clip as in numerics/quantized.py."""

    bits: int
    width: int
    groups: int = 1
    clip: float = 1.0


@dataclass(frozen=True)
class RowParts:
    """Quantized rows of one or more parts.

    rows: per part int8 [M, row bytes] (formats.pack_rows).    widths, groups, bits: of every part.
    scale: float32 [M, runs of all parts].    zero_point: int32, of the same shape.
    """

    rows: tuple[Tensor, ...]
    widths: tuple[int, ...]
    groups: tuple[int, ...]
    bits: tuple[int, ...]
    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True)
class LinearWeight:
    """Weights of one linear, or of several stacked along their outputs, packed for the kernels.

    tiles: per part uint8 (formats.pack_weight).    bits: of each part's weight codes.    scale: float32 [parts, N].
    row_sum: int32 [runs of rows that are not centred, N], sums of the codes.
    """

    tiles: tuple[Tensor, ...]
    bits: tuple[int, ...]
    scale: Tensor
    row_sum: Tensor

    @property
    def channels(self) -> int:
        return self.scale.shape[1]


def pack_linear(
    parts: Sequence[tuple[Tensor, Tensor, int]], groups: Sequence[int], row_bits: Sequence[int]
) -> LinearWeight:
    """Pack the parts of a linear: (qdata int8 [N, K_part], scale [N], bits), the runs of each, and the bits of the rows that meet it."""
    tiles = tuple(formats.pack_weight(q, bits, g) for (q, _, bits), g in zip(parts, groups, strict=True))
    scale = torch.stack([scale.float() for _, scale, _ in parts]).contiguous()
    sums = [scale.new_empty(0, scale.shape[1], dtype=torch.int32)]
    for (q, _, _), g, bits in zip(parts, groups, row_bits, strict=True):
        if bits > formats.CENTRED_BITS:
            sums.append(q.unflatten(-1, (g, -1)).sum(-1, dtype=torch.int32).T)
    return LinearWeight(tiles, tuple(bits for _, _, bits in parts), scale, torch.cat(sums).contiguous())


def mixed_linear(
    library: Library,
    x: RowParts,
    weight: LinearWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    threads: int = 1,
) -> Tensor:
    """All parts of a linear in one pass (formula in resq_kernels.h).

    Args:    x: M rows.    weight: N channels.    bias: float32 [N].    residual: float32 [M, N].
    Returns: float32 [M, N].
    Raises:  BackendError: operands that do not fit each other.
    """
    m, n = x.scale.shape[0], weight.channels
    parts = _linear_parts(library, x, weight)
    check_operand("mixed_linear", "scale", x.scale, torch.float32, (m, sum(x.groups)))
    check_operand("mixed_linear", "zero_point", x.zero_point, torch.int32, (m, sum(x.groups)))
    check_operand("mixed_linear", "weight scale", weight.scale, torch.float32, (len(x.rows), n))
    summed = sum(groups for groups, bits in zip(x.groups, x.bits, strict=True) if bits > formats.CENTRED_BITS)
    check_operand("mixed_linear", "weight row_sum", weight.row_sum, torch.int32, (summed, n))
    check_operand("mixed_linear", "bias", bias, torch.float32, (n,))
    check_operand("mixed_linear", "residual", residual, torch.float32, (m, n))
    y = torch.empty(m, n, dtype=torch.float32)
    arguments = MixedLinearArgs(
        m, n, len(x.rows), parts, address(x.scale), address(x.zero_point), address(weight.scale),
        address(weight.row_sum), address(bias), address(residual), n, address(y), n,
    )  # fmt: skip
    library.run("mixed_linear", arguments, threads)
    return y


def _linear_parts(library: Library, x: RowParts, weight: LinearWeight) -> ctypes.Array[LinearPart]:
    if not len(x.rows) == len(weight.tiles) <= MAX_PARTS:
        raise BackendError(
            f"mixed_linear: {len(x.rows)} parts of rows, {len(weight.tiles)} of weights; expected as many, at most {MAX_PARTS}"
        )
    m, tiles = x.scale.shape[0], -(-weight.channels // formats.TILE)
    parts = (LinearPart * MAX_PARTS)()
    for i, (rows, width, groups) in enumerate(zip(x.rows, x.widths, x.groups, strict=True)):
        bits = weight.bits[i]
        check_operand("mixed_linear", f"rows of part {i}", rows, torch.int8, (m, library.row_bytes(width, groups)))
        expected = (tiles, library.tile_bytes(width, groups, bits))
        check_operand("mixed_linear", f"weight of part {i}", weight.tiles[i], torch.uint8, expected)
        parts[i] = LinearPart(Part(width, groups, x.bits[i], 1.0), bits, address(rows), address(weight.tiles[i]))
    return parts


def norm_quantize(
    library: Library,
    x: Tensor,
    parts: Sequence[CodePart],
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    threads: int = 1,
) -> RowParts:
    """Normalize rows and quantize every part of them (formula in resq_kernels.h).

    Args:    x: float32 [M, K], K the columns of all parts.    norm: one of NORMS.    weight, bias: float32 [K].
    Raises:  BackendError: operands that do not fit each other, or more columns than MAX_COLUMNS.
    """
    rows, columns = x.shape[0], sum(p.width * p.groups for p in parts)
    check_operand("norm_quantize", "x", x, torch.float32, (rows, columns))
    check_operand("norm_quantize", "weight", weight, torch.float32, (columns,))
    check_operand("norm_quantize", "bias", bias, torch.float32, (columns,))
    result, out = codes_out("norm_quantize", library, rows, parts)
    arguments = NormQuantizeArgs(rows, address(x), columns, NORMS.index(norm), eps, address(weight), address(bias), out)
    library.run("norm_quantize", arguments, threads)
    return result


def hadamard_quantize(
    library: Library,
    gate: Tensor,
    up: Tensor | None,
    parts: Sequence[CodePart],
    activation: str = "none",
    transpose: bool | None = False,
    threads: int = 1,
    limit: float = 0.0,
    slope: float = 0.0,
) -> RowParts:
    """activation(gate) * up, a Hadamard transform of every part of the columns, and codes (formula in resq_kernels.h).

    Args:    gate, up: float32 [M, K], K the columns of all parts.    activation: one of ACTIVATIONS.    transpose: use Hᵀ; None: no
             transform.    limit, slope: of the activation `clamped`.
    Raises:  BackendError: operands that do not fit each other, or more columns than MAX_COLUMNS.
    """
    widths = [p.width * p.groups for p in parts]
    rows, columns = gate.shape[0], sum(widths)
    check_operand("hadamard_quantize", "gate", gate, torch.float32, (rows, columns))
    check_operand("hadamard_quantize", "up", up, torch.float32, (rows, columns))
    result, out = codes_out("hadamard_quantize", library, rows, parts)
    plans = [hadamard_plan(width) for width in widths]
    factors = [_dense_factors(plan, bool(transpose)) for plan in plans]
    transforms = (Transform * MAX_PARTS)(*map(_transform, plans, factors))
    if transpose is None:
        transforms = (Transform * MAX_PARTS)(*(Transform(width, 0) for width in widths))
    numbers = (columns, columns, ACTIVATIONS.index(activation), limit, slope)
    arguments = HadamardQuantizeArgs(rows, address(gate), address(up), *numbers, transforms, out)
    library.run("hadamard_quantize", arguments, threads)
    return result


def _dense_factors(plan: HadamardPlan, transpose: bool) -> list[Tensor | None]:
    """Matrices of the factors as the kernel takes them; None for those that it computes with butterflies."""
    matrices = [(f.T if transpose else f).float().contiguous() for f in plan.factors]
    return [None if is_power_of_two(order) else m for order, m in zip(plan.orders, matrices, strict=True)]


def _transform(plan: HadamardPlan, factors: list[Tensor | None]) -> Transform:
    transform = Transform(plan.blocks, len(factors))
    for i, factor in enumerate(factors):
        transform.order[i], transform.factor[i] = plan.orders[i], address(factor)
    return transform


def codes_out(kernel: str, library: Library, rows: int, parts: Sequence[CodePart]) -> tuple[RowParts, CodesOut]:
    columns, runs = sum(p.width * p.groups for p in parts), sum(p.groups for p in parts)
    if not 1 <= len(parts) <= MAX_PARTS or columns > MAX_COLUMNS:
        raise BackendError(
            f"{kernel}: {len(parts)} parts with {columns} columns; expected 1 to {MAX_PARTS} parts and at most {MAX_COLUMNS} columns"
        )
    codes = [torch.empty(rows, library.row_bytes(p.width, p.groups), dtype=torch.int8) for p in parts]
    scale, zero_point = torch.empty(rows, runs), torch.empty(rows, runs, dtype=torch.int32)
    out = CodesOut(len(parts), scale=address(scale), zero_point=address(zero_point))
    for i, part in enumerate(parts):
        out.part[i], out.rows[i] = Part(part.width, part.groups, part.bits, part.clip), address(codes[i])
    widths, groups, bits = zip(*((p.width, p.groups, p.bits) for p in parts), strict=True)
    return RowParts(tuple(codes), widths, groups, bits, scale, zero_point), out


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's values are; None for None."""
    return None if tensor is None else tensor.data_ptr()


def check_operand(kernel: str, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise BackendError unless the operand is absent, or contiguous on the CPU and of this dtype and shape."""
    if tensor is None:
        return
    if (
        tensor.dtype != dtype
        or tuple(tensor.shape) != shape
        or not tensor.is_contiguous()
        or tensor.device.type != "cpu"
    ):
        raise BackendError(
            f"{kernel}: {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}; "
            f"expected contiguous {dtype} {shape} on the CPU"
        )
