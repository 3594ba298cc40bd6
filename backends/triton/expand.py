"""Packed operands as whole bytes or floats, in scratch memory, for launches that read each of them many times.

On sm_90 matrix instructions read their operands from shared memory. A kernel that unpacks in registers writes what it unpacked back there,
every tile again; with thousands of rows it is cheaper to unpack once, and to let copies and products run by themselves. On an H100 that
takes attention of 2048 tokens from 923 to 248 us (docs/results/triton.md). What sm_100 would gain has not been measured.

    nibbles   4-bit codes, two a byte      -> int8, one a byte, columns in order
    images    pages of the cache           -> dequantized floats [B, pages, Hkv, PAGE, even | odd | high columns], each padded as tiles are
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.formats import HeadParts
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, next_power_of_two
from resq_compiler.backends.triton.launch import capability, run
from torch import Tensor

BYTES = 4096


def expands(device: torch.device) -> bool:
    """Whether it was measured to pay on such a device."""
    return capability(device) == 90


@triton.jit
def _nibbles_kernel(p_packed, p_out, COUNT, BLOCK: tl.constexpr):
    """BLOCK bytes a program."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    o_b = start + tl.arange(0, BLOCK)
    packed = tl.load(p_packed + o_b, mask=o_b < COUNT, other=0)
    o_c = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(p_out + o_c, tl.interleave((packed << 4) >> 4, packed >> 4), mask=o_c < 2 * COUNT)


def nibbles(packed: Tensor) -> Tensor:
    """int8 [rows, bytes] of two 4-bit codes each -> int8 [rows, 2 * bytes]."""
    out = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int8, device=packed.device)
    count = packed.numel()
    run(_nibbles_kernel, (triton.cdiv(count, BYTES),), packed, out, count, BLOCK=BYTES, num_warps=4)
    return out


@triton.jit
def _images_kernel(
    p_pages, p_out, p_table, p_start, S, stride_table, HK: tl.constexpr, PAGE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BYTES_L: tl.constexpr, BYTES_H: tl.constexpr, PAGE_BYTES: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Program (page of a sequence, sequence * HK + head). Tokens not yet written may hold any bytes: their scale is read as 0."""
    i_p = tl.program_id(0)
    i_b = tl.program_id(1) // HK
    i_k = tl.program_id(1) % HK
    o_j = tl.arange(0, PAGE)
    m_j = i_p * PAGE + o_j < tl.load(p_start + i_b) + S
    page = tl.load(p_table + i_b * stride_table + i_p).to(tl.int64) * HK + i_k
    p_page = p_pages + page * PAGE_BYTES
    p_scale = (p_page + PAGE * (BYTES_L + BYTES_H)).to(tl.pointer_type(tl.float32)) + o_j * 2
    p_zp = p_page + PAGE * (BYTES_L + BYTES_H + 8) + o_j * 2
    WIDTH: tl.constexpr = 2 * BLOCK_L + BLOCK_H
    own = (i_b.to(tl.int64) * tl.num_programs(0) + i_p) * HK + i_k
    p_row = p_out + (own * PAGE + o_j)[:, None] * WIDTH
    o_l = tl.arange(0, BLOCK_L)[None, :]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    even = tl.zeros((PAGE, BLOCK_L), dtype=tl.float32)
    odd = tl.zeros((PAGE, BLOCK_L), dtype=tl.float32)
    high = tl.zeros((PAGE, BLOCK_H), dtype=tl.float32)
    if LOW > 0:
        packed = tl.load(p_page + o_j[:, None] * BYTES_L + o_l, mask=m_j[:, None] & (o_l < BYTES_L), other=0)
        scale = tl.load(p_scale, mask=m_j, other=0.0)[:, None]
        zp = tl.load(p_zp, mask=m_j, other=0).to(tl.float32)[:, None]
        even = tl.where(2 * o_l < LOW, (((packed << 4) >> 4).to(tl.float32) - zp) * scale, 0.0)
        odd = tl.where(2 * o_l + 1 < LOW, ((packed >> 4).to(tl.float32) - zp) * scale, 0.0)
    if HIGH > 0:
        p_high = p_page + PAGE * BYTES_L + o_j[:, None] * BYTES_H
        codes = tl.load(p_high + o_h, mask=m_j[:, None] & (o_h < BYTES_H), other=0).to(tl.float32)
        scale = tl.load(p_scale + 1, mask=m_j, other=0.0)[:, None]
        zp = tl.load(p_zp + 1, mask=m_j, other=0).to(tl.float32)[:, None]
        high = tl.where(o_h < HIGH, (codes - zp) * scale, 0.0)
    tl.store(p_row + o_l, even.to(p_out.dtype.element_ty))
    tl.store(p_row + BLOCK_L + o_l, odd.to(p_out.dtype.element_ty))
    tl.store(p_row + 2 * BLOCK_L + o_h, high.to(p_out.dtype.element_ty))


def part_blocks(parts: HeadParts) -> tuple[int, int]:
    """Padded columns of the low part's even half, and of the high part."""
    return max(16, next_power_of_two((parts.low + 1) // 2)), max(16, next_power_of_two(parts.high))


def images(
    pages: Tensor, parts: HeadParts, table: Tensor, start: Tensor, new: int, total: int, dtype: torch.dtype
) -> Tensor:
    """Keys or values of the first `total` tokens of every sequence, dequantized.

    Args:    pages: [pages, Hkv, page_bytes].    table [B, n], start [B]: `new` tokens follow those before `start`.
    Returns: [B, ceil(total / PAGE), Hkv, PAGE, columns] of dtype.
    """
    batch, heads, used = len(start), pages.shape[1], triton.cdiv(total, PAGE)
    low, high = part_blocks(parts)
    out = torch.empty(batch, used, heads, PAGE, 2 * low + high, dtype=dtype, device=pages.device)
    constants = {n: v for n, v in HeadLayout.of(parts).constants("").items() if not n.startswith("BITS")}
    run(
        _images_kernel, (used, batch * heads), pages, out, table, start, new, table.stride(0),
        HK=heads, PAGE=PAGE, BLOCK_L=low, BLOCK_H=high, **constants, num_warps=4,
    )  # fmt: skip
    return out
