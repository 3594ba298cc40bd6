"""Gate x up, Hadamard transform and quantization of the down projection's input, one pass over the row.

    h    = act(gate) * up                     act: "silu", "gelu", "gelu_tanh", "relu" or "none"; up may be absent
    y    = h H / sqrt(n),  H = f0 (x) f1 (x) f2   Kronecker factors of +-1 from numerics/hadamard.py, any orders
    code = clamp(rint(y / scale) + zero_point)   one scale a row, or one for every group of its columns

The row is a block [A, B, C] padded to powers of two, which stays on the chip; each factor multiplies along its own axis. Tensor
cores take float16, so h is scaled by a power of two, cut into an upper and a lower float16 half, and both halves are multiplied
(+-1 is exact): relative error 2^-22 of the row's largest value, accumulated in float32. The block is not in the order of the
row: to find the columns of a group it is written as a row of floats and read again, by the same program.
Source: ResQ section 5.3 (U_D by a separate fast-hadamard-transform call there).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.kernels import ACTIVATIONS
from resq_compiler.backends.triton.device import pack_pairs, quantization_parameters, quantize_block, store_runs
from resq_compiler.backends.triton.formats import PartLayout, next_power_of_two
from resq_compiler.backends.triton.launch import check_launch, run, tiles
from resq_compiler.backends.triton.shapes import LLAMA3_8B, SMOLLM2_135M, meta
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import HadamardPlan, hadamard_plan

MAX_PADDED = 16384
MAX_ORDER = 128
MIN_ORDER = 16


@triton.jit
def _activate(g, ACT: tl.constexpr):
    if ACT == 1:
        h = g / (1.0 + tl.exp(-g))
    elif ACT == 2:
        h = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACT == 3:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        h = g * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh z) = sigmoid(2 z)
    elif ACT == 4:
        h = tl.maximum(g, 0.0)
    else:
        h = g
    return h


@triton.jit
def _halves(x):
    """float32 -> two float16 blocks whose sum is x to 2^-22."""
    upper = x.to(tl.float16)
    return upper, (x - upper.to(tl.float32)).to(tl.float16)


@triton.jit
def _factor(x, p_factor, N: tl.constexpr):
    """x [N, R] float32 -> factor transposed times x, as two float16 products."""
    o_n = tl.arange(0, N)
    factor = tl.load(p_factor + o_n[None, :] * N + o_n[:, None])
    upper, lower = _halves(x)
    return tl.dot(factor, lower) + tl.dot(factor, upper)


@triton.jit
def _hadamard_rows(x, p_f0, p_f1, p_f2, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """x [C, A * B] -> the unscaled transform as [B, A * C], or [A, C] without a middle factor.

    Every factor multiplies from the left, so that products are wide: their columns are what warps share. From the right, a factor
    of 16 gave the 8 warps of a program 16 columns, each computed four times over, and spilled the copies.
    """
    x = _factor(x, p_f2, C)
    if A > 1:
        x = tl.permute(tl.reshape(x, (C, A, B)), (1, 2, 0))
        x = _factor(tl.reshape(x, (A, B * C)), p_f0, A)
    else:
        x = tl.reshape(x, (1, C))
    if B > 1:
        x = tl.permute(tl.reshape(x, (A, B, C)), (1, 0, 2))
        x = _factor(tl.reshape(x, (B, A * C)), p_f1, B)
    return x


@triton.jit
def _row_offsets(o_a, o_b, o_c, RA: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr):
    """(column of the row, is it one) of the element (a, b, c) of the padded block."""
    return (o_a * RB + o_b) * RC + o_c, (o_a < RA) & (o_b < RB) & (o_c < RC)


@triton.jit
def _place(o_r, o_x, WIDTH: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, B: tl.constexpr):
    """(place in the row, is it one) of what stands at (o_r, o_x) of [B, A * WIDTH] or [A, WIDTH], where a row has RC of each WIDTH."""
    if B > 1:
        o_row, m_row = _row_offsets(o_x // WIDTH, o_r, o_x % WIDTH, RA, RB, RC)
    else:
        o_row, m_row = _row_offsets(o_r, 0, o_x, RA, RB, RC)
    return o_row, m_row


@triton.jit
def _store_row(codes, p_codes, PACKED: tl.constexpr,
               RA: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Codes [B, A * C] (or [A, C]) at their places in the row."""
    ROWS: tl.constexpr = B if B > 1 else A
    COLUMNS: tl.constexpr = A * B * C // ROWS
    if PACKED:
        even, odd = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
        stored = pack_pairs(even, odd)
    else:
        stored = codes
    WIDTH: tl.constexpr = C // 2 if PACKED else C
    REAL: tl.constexpr = (RC + 1) // 2 if PACKED else RC
    o_r = tl.arange(0, ROWS)[:, None]
    o_x = tl.arange(0, A * B * WIDTH // ROWS)[None, :]
    o_row, m_row = _place(o_r, o_x, WIDTH, RA, RB, REAL, B)
    tl.store(p_codes + o_row, stored, mask=m_row)


@triton.jit
def _in_order(y, p_row, RA: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
              GROUPS: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y [B, A * C] (or [A, C]) as the groups of the row, [RUNS, BLOCK]; p_row: memory for it."""
    ROWS: tl.constexpr = B if B > 1 else A
    o_r = tl.arange(0, ROWS)[:, None]
    o_x = tl.arange(0, A * B * C // ROWS)[None, :]
    o_row, m_row = _place(o_r, o_x, C, RA, RB, RC, B)
    tl.store(p_row + o_row, y, mask=m_row)
    tl.debug_barrier()
    WIDTH: tl.constexpr = RA * RB * RC // GROUPS
    o_g = tl.arange(0, RUNS)[:, None]
    o_c = tl.arange(0, BLOCK)[None, :]
    return tl.load(p_row + o_g * WIDTH + o_c, mask=(o_g < GROUPS) & (o_c < WIDTH), other=0.0)


@triton.jit
def _hadamard_quantize_kernel(
    p_gate, p_up, p_f0, p_f1, p_f2, p_row, p_codes, p_scale, p_zp, stride_gate, stride_up, stride_codes, root,
    ACT: tl.constexpr, HAS_UP: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, CLIP: tl.constexpr,
    RA: tl.constexpr, RB: tl.constexpr, RC: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    GROUPS: tl.constexpr, STRIDE: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program. RA, RB, RC: orders of the factors; A, B, C: the same padded to powers of two. RUNS, BLOCK: groups of columns and
    their codes, padded so too. p_row: a row of floats for each program, where there are several groups."""
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, C)[:, None]
    o_ab = tl.arange(0, A * B)[None, :]
    o_x, m_x = _row_offsets(o_ab // B, o_ab % B, o_c, RA, RB, RC)  # [C, A * B]
    h = _activate(tl.load(p_gate + i_m * stride_gate + o_x, mask=m_x, other=0.0).to(tl.float32), ACT)
    if HAS_UP:
        h = h * tl.load(p_up + i_m * stride_up + o_x, mask=m_x, other=0.0).to(tl.float32)
    # the row's largest exponent as a power of two: dividing by it is exact and keeps every sum inside float16
    largest = tl.max(tl.max(tl.abs(h), 1), 0)
    power = tl.maximum((largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 1.2e-38)
    y = _hadamard_rows(h * tl.div_rn(1.0, power), p_f0, p_f1, p_f2, A, B, C) * (power * root)
    p_codes += i_m * stride_codes
    p_scale += i_m * GROUPS
    p_zp += i_m * GROUPS
    if GROUPS > 1:
        y = _in_order(y, p_row + i_m * (RA * RB * RC), RA, RB, RC, A, B, C, GROUPS, RUNS, BLOCK)
        store_runs(y, p_codes, p_scale, p_zp, GROUPS, RA * RB * RC // GROUPS, STRIDE, BITS, CLIP, PACKED, RUNS, BLOCK)
    else:
        lo = tl.minimum(tl.min(tl.min(y, 1), 0), 0.0)
        hi = tl.maximum(tl.max(tl.max(y, 1), 0), 0.0)
        scale, zero_point = quantization_parameters(lo, hi, CLIP, BITS)
        codes = quantize_block(y, scale, zero_point, BITS)
        _store_row(codes, p_codes, PACKED, RA, RB, RC, A, B, C)
        tl.store(p_scale, scale)
        tl.store(p_zp, zero_point.to(tl.int32))


def hadamard_quantize(
    gate: Tensor,
    up: Tensor | None,
    layout: PartLayout,
    activation: str = "silu",
    transpose: bool = False,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above, in one launch.

    Args:    gate, up: [M, n] floating point, rows may be strided (two slices of one stacked product).
             layout: of n columns.    transpose: multiply by the transposed factors.
    Returns: codes [M, row_bytes] int8 (padding bytes are not written: they meet zero weights), scale [M, groups]
             float32, zero_point [M, groups] int32.
    Raises:  BackendError: a width `why_not_fused` rejects, or shapes that disagree.
    """
    device = check_launch("hadamard_quantize", gate=gate, up=up)
    rows, n = gate.shape
    reason = why_not_fused(n)
    if reason or layout.columns != n or (up is not None and up.shape != gate.shape):
        raise BackendError(
            f"hadamard_quantize: gate {tuple(gate.shape)}, layout {layout}: {reason or 'shapes disagree'}"
        )
    codes = torch.empty(rows, layout.row_bytes, dtype=torch.int8, device=device)
    scale = torch.empty(rows, layout.groups, dtype=torch.float32, device=device)
    zero_point = torch.empty(rows, layout.groups, dtype=torch.int32, device=device)
    if rows == 0:
        return codes, scale, zero_point
    shape = transform_shape(n)
    factors = padded_factors(n, transpose, device)
    row = torch.empty(rows, n, dtype=torch.float32, device=device) if layout.groups > 1 else scale
    options = tiles("hadamard_quantize", device, (n,), transform_launch(shape))
    other = gate if up is None else up
    run(
        _hadamard_quantize_kernel, (rows,),
        gate, other, *factors, row, codes, scale, zero_point, gate.stride(0), other.stride(0), codes.stride(0), n**-0.5,
        ACT=ACTIVATIONS.index(activation), HAS_UP=up is not None, BITS=layout.bits, PACKED=layout.is_low, CLIP=clip,
        **shape, **runs_of(layout), **options,
    )  # fmt: skip
    return codes, scale, zero_point


def why_not_fused(n: int) -> str | None:
    """None when one program can transform a row of n columns, else the reason."""
    plan = hadamard_plan(n)
    if not plan.full_width:
        return f"the Hadamard transform of {n} columns is block diagonal ({plan.reason})"
    if len(_orders(plan)) > 3:
        return f"{n} columns need {len(plan.orders)} Kronecker factors, one program applies at most 3"
    shape = transform_shape(n)
    padded = shape["A"] * shape["B"] * shape["C"]
    if max(shape["A"], shape["B"], shape["C"]) > MAX_ORDER:
        return (
            f"{n} columns have a Kronecker factor of order {max(plan.orders)}, shared memory holds one of {MAX_ORDER}"
        )
    if padded > MAX_PADDED:
        return f"{n} columns pad to {padded}, one program holds at most {MAX_PADDED}"
    return None


def _orders(plan: HadamardPlan) -> tuple[int, ...]:
    return plan.orders or (1,)


def transform_shape(n: int) -> dict[str, int]:
    """Orders RA, RB, RC of the factors and their padded sizes A, B, C; A and B are 1 where there are fewer than three."""
    orders = _orders(hadamard_plan(n))
    ra, rb, rc = {1: (1, 1, *orders), 2: (orders[0], 1, orders[-1])}.get(len(orders), orders[:3])
    a, b, c = (max(MIN_ORDER, next_power_of_two(order)) for order in (ra, rb, rc))
    return dict(RA=ra, RB=rb, RC=rc, A=a if ra > 1 else 1, B=b if rb > 1 else 1, C=c)


def runs_of(layout: PartLayout) -> dict[str, int]:
    """Groups of a row, bytes of each, and both padded to powers of two."""
    codes = layout.stride * (2 if layout.is_low else 1)
    padded = dict(RUNS=next_power_of_two(layout.groups), BLOCK=max(16, next_power_of_two(codes)))
    return dict(GROUPS=layout.groups, STRIDE=layout.stride, **padded)


@lru_cache(maxsize=64)
def padded_factors(n: int, transpose: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The three factors as float16, zero padded to the sizes of `transform_shape`; [[1]] where there is none."""
    shape = transform_shape(n)
    matrices = iter(hadamard_plan(n).factors)
    padded = []
    for order, size in zip((shape["RA"], shape["RB"], shape["RC"]), (shape["A"], shape["B"], shape["C"]), strict=True):
        factor = next(matrices) if order > 1 else torch.ones(1, 1, dtype=torch.float64)
        factor = factor.T if transpose else factor
        full = torch.zeros(size, size, dtype=torch.float16)
        full[:order, :order] = factor
        padded.append(full.to(device))
    return padded[0], padded[1], padded[2]


def transform_launch(shape: dict[str, int]) -> dict:
    """Launch options: up to 32 values a thread."""
    warps = max(4, min(16, shape["A"] * shape["B"] * shape["C"] // 1024))
    return dict(num_warps=warps, num_stages=1, enable_fp_fusion=False)


def _aot(n: int, rows: int, groups: int = 1) -> object:
    stacked = meta(rows, 2 * n)
    return hadamard_quantize(stacked[:, :n], stacked[:, n:], PartLayout(4, n // groups, groups))


AOT_SIGNATURES = {
    "llama3_8b": lambda: _aot(LLAMA3_8B.ffn, 2048),
    "llama3_8b_groups": lambda: _aot(LLAMA3_8B.ffn * 7 // 8, 2048, 98),
    "smollm2": lambda: _aot(SMOLLM2_135M.ffn, 2048),
    "qwen2_5_1_5b": lambda: _aot(8960, 2048),
}
