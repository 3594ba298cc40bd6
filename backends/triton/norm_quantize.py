"""RMSNorm (or LayerNorm, or nothing) + split + per-token quantization, one pass over the row.

    y        = x / sqrt(mean(x^2) + eps) * weight                  "rms"
             = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias  "layer"
             = x                                                    "none"
    low      = y[:, :K_low] quantized to <= 4 bits, packed;  high = y[:, K_low:] quantized to 5..8 bits; either may be absent
    code     = clamp(rint(y / scale) + zero_point),  scale and zero_point per row and part as in numerics/quantized.py
    groups   > 1: (norm "none") each part is cut into equal runs of columns with their own scale: [all low runs | all high runs]

The columns of x are [low | high] already (rotation and order are fused into the weights that write the residual stream), so
splitting costs nothing. Float arithmetic is float32 for every input type; y is not rounded to x's type in between.
Source: ResQ (arXiv 2412.14363) section 5.3, one call for both precisions; differs: the norm is inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.kernels import NORMS, Norm
from resq_compiler.backends.triton.device import pack_pairs, quantization_parameters, quantize_block
from resq_compiler.backends.triton.formats import PartLayout, next_power_of_two
from resq_compiler.backends.triton.launch import check_launch, run, tiles
from resq_compiler.backends.triton.shapes import LLAMA3_8B, SMOLLM2_135M, BlockShape, meta
from torch import Tensor

from resq_compiler.errors import BackendError

MAX_COLUMNS = 32768
NO_NORM = Norm()


@triton.jit
def _normalize(y, inverse, p_weight, p_bias, o_c, m_c, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    y = y * inverse
    if HAS_WEIGHT:
        y = y * tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return y


@triton.jit
def _quantize_run(
    y, p_codes, p_scale, p_zp, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    CLIP: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize one run of WIDTH values (zeros beyond) and write its codes, padding included, and its parameters."""
    m_c = tl.arange(0, BLOCK) < WIDTH
    lo = tl.minimum(tl.min(y, 0), 0.0)
    hi = tl.maximum(tl.max(y, 0), 0.0)
    scale, zero_point = quantization_parameters(lo, hi, CLIP, BITS)
    codes = tl.where(m_c, quantize_block(y, scale, zero_point, BITS), 0).to(tl.int8)  # [BLOCK]
    if PACKED:
        even, odd = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
        o_b = tl.arange(0, BLOCK // 2)
        tl.store(p_codes + o_b, pack_pairs(even, odd), mask=o_b < STRIDE)
    else:
        o_b = tl.arange(0, BLOCK)
        tl.store(p_codes + o_b, codes, mask=o_b < STRIDE)
    tl.store(p_scale, scale)
    tl.store(p_zp, zero_point.to(tl.int32))


@triton.jit
def _norm_quantize_kernel(
    p_x, p_weight, p_bias, p_low, p_high, p_scale, p_zp, stride_x, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH_L: tl.constexpr, STRIDE_L: tl.constexpr, BITS_L: tl.constexpr, CLIP_L: tl.constexpr,
    WIDTH_H: tl.constexpr, STRIDE_H: tl.constexpr, BITS_H: tl.constexpr, CLIP_H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (row, group). A part of width 0 is absent."""
    i_m = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1)
    o_l = tl.arange(0, BLOCK_L)
    o_h = tl.arange(0, BLOCK_H)
    m_l = o_l < WIDTH_L
    m_h = o_h < WIDTH_H
    p_x += i_m * stride_x
    START_H: tl.constexpr = WIDTH_L * GROUPS
    b_l = tl.load(p_x + i_g * WIDTH_L + o_l, mask=m_l, other=0.0).to(tl.float32)
    b_h = tl.load(p_x + START_H + i_g * WIDTH_H + o_h, mask=m_h, other=0.0).to(tl.float32)
    if NORM > 0:
        K: tl.constexpr = WIDTH_L + WIDTH_H
        if NORM == 2:
            mean = (tl.sum(b_l, 0) + tl.sum(b_h, 0)) / K
            b_l = tl.where(m_l, b_l - mean, 0.0)
            b_h = tl.where(m_h, b_h - mean, 0.0)
        square = tl.div_rn(tl.sum(b_l * b_l, 0) + tl.sum(b_h * b_h, 0), 1.0 * K)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
        b_l = _normalize(b_l, inverse, p_weight, p_bias, o_l, m_l, HAS_WEIGHT, HAS_BIAS)
        b_h = _normalize(b_h, inverse, p_weight + START_H, p_bias + START_H, o_h, m_h, HAS_WEIGHT, HAS_BIAS)
    PARTS: tl.constexpr = (WIDTH_L > 0) + (WIDTH_H > 0)
    p_scale += i_m * (PARTS * GROUPS) + i_g
    p_zp += i_m * (PARTS * GROUPS) + i_g
    if WIDTH_L > 0:
        p_low += i_m * (STRIDE_L * GROUPS) + i_g * STRIDE_L
        _quantize_run(b_l, p_low, p_scale, p_zp, WIDTH_L, STRIDE_L, BITS_L, CLIP_L, True, BLOCK_L)
    if WIDTH_H > 0:
        p_high += i_m * (STRIDE_H * GROUPS) + i_g * STRIDE_H
        p_scale += GROUPS if WIDTH_L > 0 else 0
        p_zp += GROUPS if WIDTH_L > 0 else 0
        _quantize_run(b_h, p_high, p_scale, p_zp, WIDTH_H, STRIDE_H, BITS_H, CLIP_H, False, BLOCK_H)


def norm_quantize(
    x: Tensor,
    layouts: tuple[PartLayout, ...],
    norm: Norm = NO_NORM,
    clips: tuple[float, ...] = (1.0, 1.0),
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The formula above, in one launch.

    Args:    x: [M, K] floating point, rows may be strided.    layouts: one packed and/or one int8 part, low first, same groups.
             clips: of each part.
    Returns: (low [M, row_bytes] | None, high [M, row_bytes] | None, scale [M, parts * groups], zero_point, same shape, int32).
    Raises:  BackendError: the parts do not cover K, too many columns, or groups under a norm.
    """
    device = check_launch("norm_quantize", x=x, weight=norm.weight, bias=norm.bias)
    rows, low, high = x.shape[0], *split_layouts(layouts, x.shape[1])
    groups = layouts[0].groups
    if groups > 1 and norm.kind != "none":
        raise BackendError(
            f"norm_quantize: {groups} groups under norm {norm.kind!r}; normalize first, then quantize with norm='none'"
        )
    scale = torch.empty(rows, len(layouts) * groups, dtype=torch.float32, device=device)
    zero_point = torch.empty(rows, len(layouts) * groups, dtype=torch.int32, device=device)
    codes = [
        None if la is None else torch.empty(rows, la.row_bytes, dtype=torch.int8, device=device) for la in (low, high)
    ]
    if rows == 0:
        return codes[0], codes[1], scale, zero_point
    shape = _shape_constants(low, high)
    options = tiles("norm_quantize", device, (x.shape[1],), norm_launch(shape))
    pointers = [x if t is None else t for t in (norm.weight, norm.bias, *codes)]
    run(
        _norm_quantize_kernel, (rows, groups), x, *pointers, scale, zero_point, x.stride(0), norm.eps,
        NORM=NORMS.index(norm.kind), HAS_WEIGHT=norm.weight is not None, HAS_BIAS=norm.bias is not None,
        CLIP_L=clips[0], CLIP_H=clips[len(layouts) - 1],
        GROUPS=groups, **shape, **options,
    )  # fmt: skip
    return codes[0], codes[1], scale, zero_point


def split_layouts(layouts: tuple[PartLayout, ...], columns: int) -> tuple[PartLayout | None, PartLayout | None]:
    """(packed part, int8 part) of a tuple of layouts.

    Raises: BackendError: two parts of one container, int8 before packed, different groups, or not `columns` columns.
    """
    order = [layout.is_low for layout in layouts]
    total = sum(layout.columns for layout in layouts)
    if order not in ([True], [False], [True, False]) or len({la.groups for la in layouts}) != 1 or total != columns:
        shown = [(la.bits, la.width, la.groups) for la in layouts]
        raise BackendError(
            f"norm_quantize: parts {shown} (bits, width, groups) cannot cover {columns} columns as [<= 4 | > 4 bits]"
        )
    if columns > MAX_COLUMNS:
        raise BackendError(f"norm_quantize: {columns} columns, one pass holds at most {MAX_COLUMNS}")
    return (layouts[0] if order[0] else None), (None if order[-1] else layouts[-1])


def _shape_constants(low: PartLayout | None, high: PartLayout | None) -> dict[str, int]:
    shape: dict[str, int] = {}
    for suffix, la in (("L", low), ("H", high)):
        shape |= {f"WIDTH_{suffix}": la.width if la else 0, f"STRIDE_{suffix}": la.stride if la else 0}
        shape |= {f"BITS_{suffix}": la.bits if la else 8}
    return shape | {
        "BLOCK_L": max(16, next_power_of_two(2 * shape["STRIDE_L"])),
        "BLOCK_H": max(16, next_power_of_two(shape["STRIDE_H"])),
    }


def norm_launch(shape: dict[str, int]) -> dict:
    """Launch options: about 16 values a thread."""
    warps = max(1, min(16, (shape["BLOCK_L"] + shape["BLOCK_H"]) // 512))
    return dict(num_warps=next_power_of_two(warps), num_stages=1, enable_fp_fusion=False)


def _aot(shape: BlockShape, rows: int, norm: str) -> object:
    return norm_quantize(meta(rows, shape.hidden), shape.parts(), Norm(norm))


AOT_SIGNATURES = {
    "llama3_8b": lambda: _aot(LLAMA3_8B, 2048, "rms"),
    "smollm2": lambda: _aot(SMOLLM2_135M, 2048, "rms"),
}
