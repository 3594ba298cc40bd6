"""RMSNorm (or LayerNorm, or nothing) + split + per-token quantization, one pass over the row.

    y        = x / sqrt(mean(x^2) + eps) * weight                  "rms"
             = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias  "layer"
             = x                                                    "none"
    low      = y[:, :K_low] quantized to <= 4 bits, packed;  high = y[:, K_low:] quantized to 5..8 bits; either may be absent
    code     = clamp(rint(y / scale) + zero_point),  scale and zero_point per row and part as in numerics/quantized.py
    groups   > 1: a part is cut into equal runs of columns with their own scale: [all low runs | all high runs]

The columns of x are [low | high] already (rotation and order are fused into the weights that write the residual stream), so
splitting costs nothing. Float arithmetic is float32 for every input type; y is not rounded to x's type in between.
Source: ResQ (arXiv 2412.14363) section 5.3, one call for both precisions; differs: the norm is inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.kernels import NORMS, Norm
from resq_compiler.backends.triton.device import store_runs
from resq_compiler.backends.triton.formats import PartLayout, next_power_of_two
from resq_compiler.backends.triton.launch import check_launch, run, tiles
from resq_compiler.backends.triton.shapes import LLAMA3_8B, SMOLLM2_135M, BlockShape, meta
from torch import Tensor

from resq_compiler.errors import BackendError

MAX_COLUMNS = 32768
NO_NORM = Norm()


@triton.jit
def _load_runs(p_x, RUNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """RUNS times WIDTH consecutive values as float32 [BLOCK_R, BLOCK], zeros beyond; where they are, and which of them are real."""
    o_r = tl.arange(0, BLOCK_R)[:, None]
    o_c = tl.arange(0, BLOCK)[None, :]
    mask = (o_r < RUNS) & (o_c < WIDTH)
    offsets = o_r * WIDTH + o_c
    return tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32), offsets, mask


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _normalize(y, inverse, p_weight, p_bias, offsets, mask, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = y * inverse
    if HAS_WEIGHT:
        y = y * tl.load(p_weight + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(p_bias + offsets, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _norm_quantize_kernel(
    p_x, p_weight, p_bias, p_low, p_high, p_scale, p_zp, stride_x, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    GROUPS_L: tl.constexpr, WIDTH_L: tl.constexpr, STRIDE_L: tl.constexpr, BITS_L: tl.constexpr, CLIP_L: tl.constexpr,
    GROUPS_H: tl.constexpr, WIDTH_H: tl.constexpr, STRIDE_H: tl.constexpr, BITS_H: tl.constexpr, CLIP_H: tl.constexpr,
    RUNS_L: tl.constexpr, BLOCK_L: tl.constexpr, RUNS_H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One row a program. A part of no groups is absent. RUNS, BLOCK: groups and their bytes, padded to powers of two."""
    i_m = tl.program_id(0).to(tl.int64)
    p_x += i_m * stride_x
    START_H: tl.constexpr = WIDTH_L * GROUPS_L
    b_l, o_l, m_l = _load_runs(p_x, GROUPS_L, WIDTH_L, RUNS_L, BLOCK_L)
    b_h, o_h, m_h = _load_runs(p_x + START_H, GROUPS_H, WIDTH_H, RUNS_H, BLOCK_H)
    if NORM > 0:
        K: tl.constexpr = START_H + WIDTH_H * GROUPS_H
        if NORM == 2:
            mean = (_total(b_l) + _total(b_h)) / K
            b_l = tl.where(m_l, b_l - mean, 0.0)
            b_h = tl.where(m_h, b_h - mean, 0.0)
        square = tl.div_rn(_total(b_l * b_l) + _total(b_h * b_h), 1.0 * K)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
        b_l = _normalize(b_l, inverse, p_weight, p_bias, o_l, m_l, HAS_WEIGHT, HAS_BIAS)
        b_h = _normalize(b_h, inverse, p_weight + START_H, p_bias + START_H, o_h, m_h, HAS_WEIGHT, HAS_BIAS)
    p_scale += i_m * (GROUPS_L + GROUPS_H)
    p_zp += i_m * (GROUPS_L + GROUPS_H)
    if GROUPS_L > 0:
        p_low += i_m * (STRIDE_L * GROUPS_L)
        store_runs(b_l, p_low, p_scale, p_zp, GROUPS_L, WIDTH_L, STRIDE_L, BITS_L, CLIP_L, True, RUNS_L, BLOCK_L)
    if GROUPS_H > 0:
        p_high += i_m * (STRIDE_H * GROUPS_H)
        p_scale += GROUPS_L
        p_zp += GROUPS_L
        store_runs(b_h, p_high, p_scale, p_zp, GROUPS_H, WIDTH_H, STRIDE_H, BITS_H, CLIP_H, False, RUNS_H, BLOCK_H)


def norm_quantize(
    x: Tensor,
    layouts: tuple[PartLayout, ...],
    norm: Norm = NO_NORM,
    clips: tuple[float, ...] = (1.0, 1.0),
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The formula above, in one launch.

    Args:    x: [M, K] floating point, rows may be strided.    layouts: one packed and/or one int8 part, low first.
             clips: of each part.
    Returns: (low [M, row_bytes] | None, high [M, row_bytes] | None, scale [M, groups of all parts], zero_point, same shape, int32).
    Raises:  BackendError: the parts do not cover K, or too many columns.
    """
    device = check_launch("norm_quantize", x=x, weight=norm.weight, bias=norm.bias)
    rows, low, high = x.shape[0], *split_layouts(layouts, x.shape[1])
    groups = sum(layout.groups for layout in layouts)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=device)
    zero_point = torch.empty(rows, groups, dtype=torch.int32, device=device)
    codes = [
        None if la is None else torch.empty(rows, la.row_bytes, dtype=torch.int8, device=device) for la in (low, high)
    ]
    if rows == 0:
        return codes[0], codes[1], scale, zero_point
    shape = _shape_constants(low, high)
    options = tiles("norm_quantize", device, (x.shape[1],), norm_launch(shape))
    pointers = [x if t is None else t for t in (norm.weight, norm.bias, *codes)]
    run(
        _norm_quantize_kernel, (rows,), x, *pointers, scale, zero_point, x.stride(0), norm.eps,
        NORM=NORMS.index(norm.kind), HAS_WEIGHT=norm.weight is not None, HAS_BIAS=norm.bias is not None,
        CLIP_L=clips[0], CLIP_H=clips[len(layouts) - 1],
        **shape, **options,
    )  # fmt: skip
    return codes[0], codes[1], scale, zero_point


def split_layouts(layouts: tuple[PartLayout, ...], columns: int) -> tuple[PartLayout | None, PartLayout | None]:
    """(packed part, int8 part) of a tuple of layouts.

    Raises: BackendError: two parts of one container, int8 before packed, or not `columns` columns.
    """
    order = [layout.is_low for layout in layouts]
    total = sum(layout.columns for layout in layouts)
    if order not in ([True], [False], [True, False]) or total != columns:
        shown = [(la.bits, la.width, la.groups) for la in layouts]
        raise BackendError(
            f"norm_quantize: parts {shown} (bits, width, groups) cannot cover {columns} columns as [<= 4 | > 4 bits]"
        )
    if columns > MAX_COLUMNS:
        raise BackendError(f"norm_quantize: {columns} columns, one pass holds at most {MAX_COLUMNS}")
    return (layouts[0] if order[0] else None), (None if order[-1] else layouts[-1])


def _shape_constants(low: PartLayout | None, high: PartLayout | None) -> dict[str, int]:
    shape: dict[str, int] = {}
    for suffix, layout, codes in (("L", low, 2), ("H", high, 1)):
        la = layout or PartLayout(8, 0, 0)
        shape |= {f"GROUPS_{suffix}": la.groups, f"WIDTH_{suffix}": la.width, f"BITS_{suffix}": la.bits}
        shape |= {f"STRIDE_{suffix}": la.stride if la.groups else 0, f"RUNS_{suffix}": next_power_of_two(la.groups)}
        shape[f"BLOCK_{suffix}"] = max(16, next_power_of_two(codes * shape[f"STRIDE_{suffix}"]))
    return shape


def norm_launch(shape: dict[str, int]) -> dict:
    """Launch options: about 16 values a thread."""
    warps = max(1, min(16, (shape["RUNS_L"] * shape["BLOCK_L"] + shape["RUNS_H"] * shape["BLOCK_H"]) // 512))
    return dict(num_warps=next_power_of_two(warps), num_stages=1, enable_fp_fusion=False)


def _aot(shape: BlockShape, rows: int, norm: str) -> object:
    return norm_quantize(meta(rows, shape.hidden), shape.parts(), Norm(norm))


AOT_SIGNATURES = {
    "llama3_8b": lambda: _aot(LLAMA3_8B, 2048, "rms"),
    "llama3_8b_groups": lambda: norm_quantize(
        meta(2048, LLAMA3_8B.hidden), (PartLayout(4, 128, 28), PartLayout(8, 512)), Norm("rms")
    ),
    "smollm2": lambda: _aot(SMOLLM2_135M, 2048, "rms"),
}
