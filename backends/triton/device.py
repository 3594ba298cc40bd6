"""Device functions shared by the kernels: rounding, quantization parameters, nibble packing."""

from __future__ import annotations

import triton
import triton.language as tl

FLT_MIN = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def round_half_even(x):
    """rint for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits, and the addition itself rounds half to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantization_parameters(lo, hi, CLIP: tl.constexpr, BITS: tl.constexpr):
    """(scale, zero_point as float) of a range that already includes 0; true division, as the integer law asks."""
    lo = lo * CLIP
    hi = hi * CLIP
    scale = tl.maximum(tl.div_rn(hi - lo, lo * 0.0 + (2.0**BITS - 1.0)), FLT_MIN)
    zero_point = round_half_even(tl.div_rn(0.0 - lo, scale)) - 2.0 ** (BITS - 1)
    return scale, zero_point


@triton.jit
def quantize_block(x, scale, zero_point, BITS: tl.constexpr):
    """float32 block -> int8 codes in [-2^(BITS-1), 2^(BITS-1) - 1]; scale and zero_point broadcast against x."""
    code = round_half_even(tl.div_rn(x, scale + x * 0.0)) + zero_point
    return tl.clamp(code, -(2.0 ** (BITS - 1)), 2.0 ** (BITS - 1) - 1.0).to(tl.int8)


@triton.jit
def pack_pairs(even, odd):
    """Even columns into the low nibble, odd columns into the high nibble of an int8."""
    return (odd << 4) | (even & 15)


@triton.jit
def store_runs(
    y, p_codes, p_scale, p_zp, RUNS: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    CLIP: tl.constexpr, PACKED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize runs of a row, y [BLOCK_R, BLOCK] with zeros beyond RUNS and WIDTH; write codes, padding included, and parameters."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < RUNS
    lo = tl.minimum(tl.min(y, 1), 0.0)
    hi = tl.maximum(tl.max(y, 1), 0.0)
    scale, zero_point = quantization_parameters(lo, hi, CLIP, BITS)  # [BLOCK_R]
    codes = quantize_block(y, scale[:, None], zero_point[:, None], BITS)
    codes = tl.where(tl.arange(0, BLOCK)[None, :] < WIDTH, codes, 0).to(tl.int8)
    if PACKED:
        even, odd = tl.split(tl.reshape(codes, (BLOCK_R, BLOCK // 2, 2)))
        codes = pack_pairs(even, odd)
    o_b = tl.arange(0, BLOCK // 2 if PACKED else BLOCK)[None, :]
    tl.store(p_codes + o_r[:, None] * STRIDE + o_b, codes, mask=m_r[:, None] & (o_b < STRIDE))
    tl.store(p_scale + o_r, scale, mask=m_r)
    tl.store(p_zp + o_r, zero_point.to(tl.int32), mask=m_r)


@triton.jit
def even_columns(packed, ISA: tl.constexpr):
    """16 times the low nibble of each byte, as int8: the even columns of a packed block.

    LLVM handles int8 element by element (measured: some seven instructions a byte, five times the loop), so on NVIDIA four bytes at
    a time are masked in one register. Elsewhere, the interpreter included, plain Triton says the same.
    """
    if ISA == "ptx":
        out = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r",
            [packed],
            tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        out = packed << 4
    return out


@triton.jit
def odd_columns(packed, ISA: tl.constexpr):
    """16 times the high nibble of each byte, as int8: the odd columns of a packed block."""
    if ISA == "ptx":
        out = tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    else:
        out = packed & -16
    return out
