"""Flash attention over the packed paged cache, optionally quantizing its output for o_proj, one launch.

    s[m, t] = scale * q[m] . k[t]          k[t] = (codes - zero_point) * scale_k, part by part; softcap c: c tanh(s / c)
    p       = softmax over the visible t   visible: start - window < t <= own slot, t not padding
    o[m]    = sum_t p[m, t] v[t]
    out     = o, or its codes per head and part, laid out for `mixed_linear` with one group a head

Rows m of a tile are (query position, query head of the group): a key/value head is read once for its whole group. Keys are not
dequantized: codes are exact in float16, so q . k = scale_k (q . codes - zero_point sum(q)), two operations a score instead of
two a key element. Values are dequantized in registers. Long caches are split over programs; the last to finish adds up.
Source: FlashAttention-2 (arXiv 2307.08691), split as Flash-Decoding; ResQ keeps this in float16 kernels of others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.formats import HeadParts
from resq_compiler.backends.fused.kernels import LayerCache, Scores
from resq_compiler.backends.triton import expand
from resq_compiler.backends.triton.device import pack_pairs, quantization_parameters, quantize_block
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, PartLayout
from resq_compiler.backends.triton.launch import (
    arrival_counters,
    capability,
    check_launch,
    isa,
    precision,
    processors,
    run,
    tiles,
)
from resq_compiler.backends.triton.shapes import GEMMA2_2B, LLAMA3_8B, SMOLLM2_135M, BlockShape, meta, meta_cache
from torch import Tensor

from resq_compiler.errors import BackendError

EXPANDED_ROWS = (
    512  # from here on a cached token is read so often that dequantizing it once is cheaper, where `expand.expands`
)
EXPANDED_TILES = dict(BLOCK_M=128, BLOCK_N=64, SPLIT=1, num_warps=8, num_stages=2, enable_fp_fusion=False)
LOG2E = tl.constexpr(1.4426950408889634)
FourCodes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@triton.jit
def _load_codes(p_rows, o_b, m, PACKED: tl.constexpr):
    """int8 codes of the even and odd columns of packed rows (or twice the bytes themselves)."""
    packed = tl.load(p_rows + o_b, mask=m, other=0)
    return ((packed << 4) >> 4) if PACKED else packed, packed >> 4


@triton.jit
def _key_scores(
    q_e, q_o, q_h, sum_l, sum_h, p_page, o_j,
    LOW: tl.constexpr, HIGH: tl.constexpr, BYTES_L: tl.constexpr, BYTES_H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """q . k for the tokens o_j of one page: [BM, BN] float32, scale_k and zero-points applied to the product."""
    p_scale = (p_page + PAGE * (BYTES_L + BYTES_H)).to(tl.pointer_type(tl.float32)) + o_j * 2
    p_zp = p_page + PAGE * (BYTES_L + BYTES_H + 8) + o_j * 2
    s = tl.zeros((BLOCK_M, o_j.shape[0]), dtype=tl.float32)
    if LOW > 0:
        o_b = tl.arange(0, BLOCK_L)[None, :]
        k_e, k_o = _load_codes(p_page + o_j[:, None] * BYTES_L, o_b, o_b < BYTES_L, True)
        s = tl.dot(q_e, tl.trans(k_e.to(q_e.dtype)), input_precision=PRECISION)
        s = tl.dot(q_o, tl.trans(k_o.to(q_e.dtype)), s, input_precision=PRECISION)
        s = (s - sum_l[:, None] * tl.load(p_zp).to(tl.float32)[None, :]) * tl.load(p_scale)[None, :]
    if HIGH > 0:
        o_b = tl.arange(0, BLOCK_H)[None, :]
        p_high = p_page + PAGE * BYTES_L + o_j[:, None] * BYTES_H
        k_h = tl.load(p_high + o_b, mask=o_b < BYTES_H, other=0).to(q_h.dtype)
        s_h = tl.dot(q_h, tl.trans(k_h), input_precision=PRECISION)
        s += (s_h - sum_h[:, None] * tl.load(p_zp + 1).to(tl.float32)[None, :]) * tl.load(p_scale + 1)[None, :]
    return s


@triton.jit
def _image_scores(q_e, q_o, q_h, p_rows, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """q . k for keys that lie dequantized in rows p_rows [BN, 1] of even, odd and high columns: [BM, BN] float32."""
    o_l = tl.arange(0, BLOCK_L)[None, :]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    s = tl.dot(q_e, tl.trans(tl.load(p_rows + o_l)), input_precision=PRECISION)
    s = tl.dot(q_o, tl.trans(tl.load(p_rows + BLOCK_L + o_l)), s, input_precision=PRECISION)
    return tl.dot(q_h, tl.trans(tl.load(p_rows + 2 * BLOCK_L + o_h)), s, input_precision=PRECISION)


@triton.jit
def _add_images(o_e, o_o, o_h, p, p_rows, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """Accumulate p [BM, BN] times values that lie dequantized."""
    o_l = tl.arange(0, BLOCK_L)[None, :]
    o_x = tl.arange(0, BLOCK_H)[None, :]
    o_e = tl.dot(p, tl.load(p_rows + o_l), o_e, input_precision=PRECISION)
    o_o = tl.dot(p, tl.load(p_rows + BLOCK_L + o_l), o_o, input_precision=PRECISION)
    return o_e, o_o, tl.dot(p, tl.load(p_rows + 2 * BLOCK_L + o_x), o_h, input_precision=PRECISION)


@triton.jit
def _visible(o_t, o_slot, p_mask, T, WINDOW: tl.constexpr):
    """[BM, BN]: True where the query in slot o_slot sees token o_t."""
    visible = o_t[None, :] <= o_slot[:, None]
    if WINDOW > 0:
        visible &= o_t[None, :] > o_slot[:, None] - WINDOW
    visible &= (tl.load(p_mask + o_t, mask=o_t < T, other=0) != 0)[None, :]
    return visible


@triton.jit
def _add_values(
    o_e, o_o, o_h, p, p_page, o_j, m_j,
    LOW: tl.constexpr, HIGH: tl.constexpr, BYTES_L: tl.constexpr, BYTES_H: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate p [BM, BN] times the dequantized values of one page, as even, odd and high columns.

    Tokens not yet written (not m_j) have p = 0 but may hold any bytes: their scale is read as 0, or inf * 0 would be NaN.
    """
    p_scale = (p_page + PAGE * (BYTES_L + BYTES_H)).to(tl.pointer_type(tl.float32)) + o_j * 2
    p_zp = p_page + PAGE * (BYTES_L + BYTES_H + 8) + o_j * 2
    if LOW > 0:
        o_b = tl.arange(0, BLOCK_L)[None, :]
        v_e, v_o = _load_codes(p_page + o_j[:, None] * BYTES_L, o_b, o_b < BYTES_L, True)
        b_scale = tl.load(p_scale, mask=m_j, other=0.0)[:, None]
        b_zp = tl.load(p_zp).to(tl.float32)[:, None]
        o_e = tl.dot(p, ((v_e.to(tl.float32) - b_zp) * b_scale).to(p.dtype), o_e, input_precision=PRECISION)
        o_o = tl.dot(p, ((v_o.to(tl.float32) - b_zp) * b_scale).to(p.dtype), o_o, input_precision=PRECISION)
    if HIGH > 0:
        o_b = tl.arange(0, BLOCK_H)[None, :]
        p_high = p_page + PAGE * BYTES_L + o_j[:, None] * BYTES_H
        v_h = tl.load(p_high + o_b, mask=o_b < BYTES_H, other=0).to(tl.float32)
        v_h = (v_h - tl.load(p_zp + 1).to(tl.float32)[:, None]) * tl.load(p_scale + 1, mask=m_j, other=0.0)[:, None]
        o_h = tl.dot(p, v_h.to(p.dtype), o_h, input_precision=PRECISION)
    return o_e, o_o, o_h


@triton.jit
def _row_codes(o_0, o_1, m_0, m_1, CLIP: tl.constexpr, BITS: tl.constexpr):
    """Codes of rows held as two blocks of columns (valid where m_0, m_1), with their scale and zero-point."""
    v_0 = tl.where(m_0, o_0, 0.0)
    v_1 = tl.where(m_1, o_1, 0.0)
    lo = tl.minimum(tl.minimum(tl.min(v_0, 1), tl.min(v_1, 1)), 0.0)
    hi = tl.maximum(tl.maximum(tl.max(v_0, 1), tl.max(v_1, 1)), 0.0)
    scale, zero_point = quantization_parameters(lo, hi, CLIP, BITS)
    c_0 = tl.where(m_0, quantize_block(v_0, scale[:, None], zero_point[:, None], BITS), 0).to(tl.int8)
    c_1 = tl.where(m_1, quantize_block(v_1, scale[:, None], zero_point[:, None], BITS), 0).to(tl.int8)
    return c_0, c_1, scale, zero_point


@triton.jit
def _store_codes(
    o_e, o_o, o_h, p_low, p_high, p_scale, p_zp, o_token, o_head, m_row, HQ: tl.constexpr, CLIP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BITS_L: tl.constexpr, BITS_H: tl.constexpr,
    STRIDE_L: tl.constexpr, STRIDE_H: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The output as codes for o_proj: one group a head, [all heads' low | all heads' high]."""
    PARTS: tl.constexpr = (LOW > 0) + (HIGH > 0)
    o_param = o_token * (PARTS * HQ) + o_head
    o_run = o_token * HQ + o_head
    if LOW > 0:
        o_b = tl.arange(0, BLOCK_L)[None, :]
        even, odd, scale, zero_point = _row_codes(o_e, o_o, 2 * o_b < LOW, 2 * o_b + 1 < LOW, CLIP, BITS_L)
        m_store = m_row[:, None] & (o_b < STRIDE_L)
        tl.store(p_low + o_run[:, None] * STRIDE_L + o_b, pack_pairs(even, odd), mask=m_store)
        tl.store(p_scale + o_param, scale, mask=m_row)
        tl.store(p_zp + o_param, zero_point.to(tl.int32), mask=m_row)
    if HIGH > 0:
        o_b = tl.arange(0, BLOCK_H)[None, :]
        o_param += HQ if LOW > 0 else 0
        codes, _, scale, zero_point = _row_codes(o_h, o_h, o_b < HIGH, o_b < HIGH, CLIP, BITS_H)
        tl.store(p_high + o_run[:, None] * STRIDE_H + o_b, codes, mask=m_row[:, None] & (o_b < STRIDE_H))
        tl.store(p_scale + o_param, scale, mask=m_row)
        tl.store(p_zp + o_param, zero_point.to(tl.int32), mask=m_row)


@triton.jit
def _store_float(o_e, o_o, o_h, p_out, o_run, m_row, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    p_row = (p_out + o_run * D)[:, None]
    if LOW > 0:
        o_c = tl.arange(0, 2 * BLOCK_L)[None, :]
        low = tl.reshape(tl.join(o_e, o_o), (BLOCK_M, 2 * BLOCK_L)).to(p_out.dtype.element_ty)
        tl.store(p_row + o_c, low, mask=m_row[:, None] & (o_c < LOW))
    if HIGH > 0:
        o_c = tl.arange(0, BLOCK_H)[None, :]
        tl.store(p_row + LOW + o_c, o_h.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_c < HIGH))


@triton.jit
def _store_part(highest, total, o_e, o_o, o_x, p_parts, i_split,
                BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """What this split of the cache found, as rows [highest, total, even, odd, high] of the workspace."""
    p_own = p_parts + i_split * BLOCK_M * (2 * BLOCK_L + BLOCK_H + 2)
    o_l = tl.arange(0, BLOCK_L)[None, :]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    tl.store(p_own, highest)
    tl.store(p_own + 1, total)
    tl.store(p_own[:, None] + 2 + o_l, o_e)
    tl.store(p_own[:, None] + 2 + BLOCK_L + o_l, o_o)
    tl.store(p_own[:, None] + 2 + 2 * BLOCK_L + o_h, o_x)


@triton.jit
def _sum_of_parts(p_parts, SPLIT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr):
    """(total, even, odd, high) over all splits, brought to one highest score; read past the L1 cache, which others did not fill."""
    o_l = tl.arange(0, BLOCK_L)[None, :]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    highest = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o_e = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    o_o = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
    o_x = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for i_s in tl.range(SPLIT, loop_unroll_factor=4):
        p_part = p_parts + i_s * BLOCK_M * (2 * BLOCK_L + BLOCK_H + 2)
        b_high = tl.load(p_part, cache_modifier=".cg")
        new = tl.maximum(highest, b_high)
        shrink = tl.exp2(highest - new)
        grow = tl.exp2(b_high - new)
        total = total * shrink + grow * tl.load(p_part + 1, cache_modifier=".cg")
        p_part = p_part[:, None] + 2
        o_e = o_e * shrink[:, None] + grow[:, None] * tl.load(p_part + o_l, cache_modifier=".cg")
        o_o = o_o * shrink[:, None] + grow[:, None] * tl.load(p_part + BLOCK_L + o_l, cache_modifier=".cg")
        o_x = o_x * shrink[:, None] + grow[:, None] * tl.load(p_part + 2 * BLOCK_L + o_h, cache_modifier=".cg")
        highest = new
    return total, o_e, o_o, o_x


@triton.jit
def _attention_kernel(
    p_q, p_keys, p_values, p_table, p_start, p_mask, p_out, p_low, p_high, p_scale, p_zp, p_ws, p_count,
    S, T, stride_mask, stride_table, sm_scale, softcap,
    HQ: tl.constexpr, HK: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    QUANT: tl.constexpr, CLIP: tl.constexpr, BITS_OL: tl.constexpr, BITS_OH: tl.constexpr,
    STRIDE_OL: tl.constexpr, STRIDE_OH: tl.constexpr,
    LOW_K: tl.constexpr, HIGH_K: tl.constexpr, BYTES_L_K: tl.constexpr, BYTES_H_K: tl.constexpr, PAGE_BYTES_K: tl.constexpr,
    LOW_V: tl.constexpr, HIGH_V: tl.constexpr, BYTES_L_V: tl.constexpr, BYTES_H_V: tl.constexpr, PAGE_BYTES_V: tl.constexpr,
    BLOCK_LK: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_LV: tl.constexpr, BLOCK_HV: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, EXPANDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (row tile, sequence * HK + key head, split of the cache). EXPANDED: p_keys and p_values are images of the pages (`expand`),
    in the order of their sequence, and row tiles come last first: those of late queries take longest."""
    i_b = tl.program_id(1) // HK
    i_k = tl.program_id(1) % HK
    i_split = tl.program_id(2)
    GROUP: tl.constexpr = HQ // HK
    D: tl.constexpr = LOW_K + HIGH_K
    i_m = tl.num_programs(0) - 1 - tl.program_id(0) if EXPANDED else tl.program_id(0)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < S * GROUP
    start = tl.load(p_start + i_b)
    o_slot = start + o_m // GROUP  # [BM] cache slot of each query
    o_token = (i_b * S + o_m // GROUP).to(tl.int64)
    o_head = i_k * GROUP + o_m % GROUP
    p_row = (p_q + (o_token * HQ + o_head) * D)[:, None]
    o_l = 2 * tl.arange(0, BLOCK_LK)[None, :]
    o_h = LOW_K + tl.arange(0, BLOCK_HK)[None, :]
    q_e = tl.load(p_row + o_l, mask=m_row[:, None] & (o_l < LOW_K), other=0.0)  # [BM, BLOCK_LK]
    q_o = tl.load(p_row + o_l + 1, mask=m_row[:, None] & (o_l + 1 < LOW_K), other=0.0)
    q_h = tl.load(p_row + o_h, mask=m_row[:, None] & (o_h < D), other=0.0)
    sum_l = tl.sum(q_e.to(tl.float32), 1) + tl.sum(q_o.to(tl.float32), 1)
    sum_h = tl.sum(q_h.to(tl.float32), 1)

    last = tl.minimum(start + (tl.minimum((i_m + 1) * BLOCK_M, S * GROUP) - 1) // GROUP, T - 1)
    first = tl.maximum(start + i_m * BLOCK_M // GROUP - WINDOW + 1, 0) if WINDOW > 0 else 0
    n_blocks = last // BLOCK_N + 1 - first // BLOCK_N
    p_table += i_b * stride_table
    highest = tl.full((BLOCK_M,), -1.0e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    o_e = tl.zeros((BLOCK_M, BLOCK_LV), dtype=tl.float32)
    o_o = tl.zeros((BLOCK_M, BLOCK_LV), dtype=tl.float32)
    o_x = tl.zeros((BLOCK_M, BLOCK_HV), dtype=tl.float32)
    for i_n in tl.range(i_split * n_blocks // SPLIT, (i_split + 1) * n_blocks // SPLIT):
        o_t = (first // BLOCK_N + i_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_j = o_t % PAGE
        i_page = (first // BLOCK_N + i_n) * BLOCK_N // PAGE
        if EXPANDED:
            o_row = (((i_b * tl.cdiv(T, PAGE) + i_page).to(tl.int64) * HK + i_k) * PAGE + o_j)[:, None]
            s = _image_scores(q_e, q_o, q_h, p_keys + o_row * (2 * BLOCK_LK + BLOCK_HK), BLOCK_LK, BLOCK_HK, PRECISION)
        else:
            page = tl.load(p_table + i_page).to(tl.int64) * HK + i_k
            s = _key_scores(q_e, q_o, q_h, sum_l, sum_h, p_keys + page * PAGE_BYTES_K, o_j,
                            LOW_K, HIGH_K, BYTES_L_K, BYTES_H_K, BLOCK_LK, BLOCK_HK, PAGE, PRECISION, BLOCK_M)  # fmt: skip
        s = s * sm_scale
        if HAS_CAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
        visible = _visible(o_t, o_slot, p_mask + i_b * stride_mask, T, WINDOW)
        s = tl.where(visible, s * LOG2E, -1.0e30)
        new = tl.maximum(highest, tl.max(s, 1))
        shrink = tl.exp2(highest - new)
        p = tl.where(visible, tl.exp2(s - new[:, None]), 0.0)
        total = total * shrink + tl.sum(p, 1)
        highest = new
        o_e = o_e * shrink[:, None]
        o_o = o_o * shrink[:, None]
        o_x = o_x * shrink[:, None]
        p = p.to(q_e.dtype)
        if EXPANDED:
            p_rows = p_values + o_row * (2 * BLOCK_LV + BLOCK_HV)
            o_e, o_o, o_x = _add_images(o_e, o_o, o_x, p, p_rows, BLOCK_LV, BLOCK_HV, PRECISION)
        else:
            o_e, o_o, o_x = _add_values(o_e, o_o, o_x, p, p_values + page * PAGE_BYTES_V, o_j, o_t <= last,
                                        LOW_V, HIGH_V, BYTES_L_V, BYTES_H_V, BLOCK_LV, BLOCK_HV, PAGE, PRECISION)  # fmt: skip

    if SPLIT > 1:
        i_tile = i_m * tl.num_programs(1) + tl.program_id(1)
        p_parts = p_ws + (i_tile.to(tl.int64) * SPLIT * BLOCK_M + tl.arange(0, BLOCK_M)) * (2 * BLOCK_LV + BLOCK_HV + 2)
        _store_part(highest, total, o_e, o_o, o_x, p_parts, i_split, BLOCK_LV, BLOCK_HV, BLOCK_M)
        tl.debug_barrier()
        if tl.atomic_add(p_count + i_tile, 1, sem="acq_rel") != SPLIT - 1:
            return
        tl.store(p_count + i_tile, 0)
        total, o_e, o_o, o_x = _sum_of_parts(p_parts, SPLIT, BLOCK_LV, BLOCK_HV, BLOCK_M)
    # a padding query sees nothing: 0 instead of 0 / 0
    total = tl.where(total > 0.0, total, 1.0)[:, None]
    o_e = o_e / total
    o_o = o_o / total
    o_x = o_x / total
    if QUANT:
        _store_codes(o_e, o_o, o_x, p_low, p_high, p_scale, p_zp, o_token, o_head, m_row, HQ, CLIP,
                     LOW_V, HIGH_V, BITS_OL, BITS_OH, STRIDE_OL, STRIDE_OH, BLOCK_LV, BLOCK_HV)  # fmt: skip
    else:
        _store_float(o_e, o_o, o_x, p_out, o_token * HQ + o_head, m_row, D, LOW_V, HIGH_V, BLOCK_M, BLOCK_LV, BLOCK_HV)


def attention(q: Tensor, cache: LayerCache, scores: Scores) -> Tensor:
    """The formula above, in one launch.

    Args:    q: [B, S, Hq, D] contiguous, in the basis of the keys.    cache: as `rope_cache` left it, the S new tokens included.
             scores: mask [B, total], total: tokens in the cache including the new ones (of the longest sequence).
    Returns: [B, S, Hq, D] of q's dtype.
    Raises:  BackendError: shapes that disagree, or operands that cannot be launched.
    """
    out = torch.empty_like(q)
    _launch(q, cache, scores, out, (None, None, None, None), (), 1.0)
    return out


def attention_quantize(
    q: Tensor, cache: LayerCache, scores: Scores, layouts: tuple[PartLayout, ...], clip: float
) -> FourCodes:
    """The same, quantized: layouts are the parts of o_proj's input, one group a head, split as the values are.

    Returns: (low, high, scale, zero_point) as `norm_quantize` returns them for [B * S] rows.
    """
    rows, groups = q.shape[0] * q.shape[1], sum(la.groups for la in layouts)
    made = {la.is_low: torch.empty(rows, la.row_bytes, dtype=torch.int8, device=q.device) for la in layouts}
    scale = torch.empty(rows, groups, dtype=torch.float32, device=q.device)
    codes = made.get(True), made.get(False), scale, torch.empty_like(scale, dtype=torch.int32)
    _launch(q, cache, scores, None, codes, layouts, clip)
    return codes


def _launch(
    q: Tensor, cache: LayerCache, scores: Scores, out: Tensor | None, codes: FourCodes,
    layouts: tuple[PartLayout, ...], clip: float,
) -> None:  # fmt: skip
    """One launch that fills `out`, or `codes`."""
    table, start, mask = cache.table, cache.start, scores.mask
    device = check_launch("attention", q=q, keys=cache.keys, values=cache.values, table=table, start=start, mask=mask)
    assert table is not None
    (batch, new, heads, d), kv_heads, total = q.shape, cache.keys.shape[1], mask.shape[1]
    _check_shapes(q, cache, layouts)
    if batch * new == 0:
        return
    blocks = _part_blocks(cache)
    rows, programs = new * (heads // kv_heads), batch * kv_heads
    expanded = _expands(rows, d, q.element_size(), device)
    options = attention_tiles(rows, programs, total, d, expanded, q.element_size(), device)
    keys, values = cache.keys, cache.values
    if expanded:
        keys, values = (
            expand.images(pages, parts, table, start, new, total, q.dtype)
            for pages, parts in ((keys, cache.key_parts), (values, cache.value_parts))
        )
    n_tiles, split = triton.cdiv(rows, options["BLOCK_M"]), options["SPLIT"]
    floats = n_tiles * programs * split * options["BLOCK_M"] * (2 * blocks["BLOCK_LV"] + blocks["BLOCK_HV"] + 2)
    workspace = torch.empty(floats if split > 1 else 1, dtype=torch.float32, device=device)
    counters = arrival_counters(device, n_tiles * programs)
    pointers = [q if t is None else t for t in (out, *codes)]
    run(
        _attention_kernel, (n_tiles, programs, split),
        q, keys, values, table, start, mask, *pointers, workspace, counters,
        new, total, mask.stride(0), table.stride(0), scores.scale, scores.softcap or 1.0,
        HQ=heads, HK=kv_heads, WINDOW=scores.window or 0, HAS_CAP=scores.softcap is not None,
        QUANT=out is None, CLIP=clip, **_output_constants(layouts),
        **_cache_constants(cache.key_parts, "_K"), **_cache_constants(cache.value_parts, "_V"), **blocks,
        PAGE=PAGE, PRECISION=precision(), EXPANDED=expanded, **options,
    )  # fmt: skip


def _output_constants(layouts: tuple[PartLayout, ...]) -> dict[str, int]:
    """Bits and strides of the output's codes."""
    strides, bits = {la.is_low: la.stride for la in layouts}, {la.is_low: la.bits for la in layouts}
    values = dict(BITS_OL=bits.get(True, 4), BITS_OH=bits.get(False, 8))
    return values | dict(STRIDE_OL=strides.get(True, 0), STRIDE_OH=strides.get(False, 0))


def _cache_constants(parts: HeadParts, suffix: str) -> dict[str, int]:
    layout = HeadLayout.of(parts)
    return {name: value for name, value in layout.constants(suffix).items() if not name.startswith("BITS")}


def _part_blocks(cache: LayerCache) -> dict[str, int]:
    """Padded columns of the low part's even half and of the high part, for keys and values."""
    blocks = {}
    for suffix, parts in (("K", cache.key_parts), ("V", cache.value_parts)):
        blocks["BLOCK_L" + suffix], blocks["BLOCK_H" + suffix] = expand.part_blocks(parts)
    return blocks


def _check_shapes(q: Tensor, cache: LayerCache, layouts: tuple[PartLayout, ...]) -> None:
    (heads, d), kv_heads = q.shape[2:], cache.keys.shape[1]
    keys, values = cache.key_parts, cache.value_parts
    if not q.is_contiguous() or heads % kv_heads or keys.head_dim != d or values.head_dim != d:
        raise BackendError(
            f"attention: q {tuple(q.shape)} strides {q.stride()}, {kv_heads} key heads, parts {keys}, {values}; "
            "expected contiguous [B, S, H, D] with H a multiple of the key heads and D the parts' head_dim"
        )
    widths, expected = [(la.width, la.groups) for la in layouts], [(b - a, heads) for _, a, b in values.spans]
    if layouts and widths != expected:
        raise BackendError(f"attention: output parts {widths} (width, groups), the values are split as {expected}")


def attention_tiles(
    rows: int, heads: int, total: int, head_dim: int, expanded: bool, element_size: int, device: torch.device
) -> dict:
    """Tile and launch options; a long cache read by few programs is split until there are four programs a processor.

    element_size: bytes of an element of q; products of float32 are three of tf32, and take three times the registers.
    """
    if expanded:
        return tiles("attention_expanded", device, (heads, head_dim, element_size), EXPANDED_TILES)
    block_m = 16 if rows <= 16 else 64
    programs = triton.cdiv(rows, block_m) * heads
    hopper = capability(device) == 90
    split = max(1, min(16 if hopper else 32, 4 * processors(device) // programs, triton.cdiv(total, PAGE)))
    warps = 8 if head_dim > 64 and isa() != "gcn" else 4  # fewest spills; the slow ahead-of-time tests check them
    default = dict(BLOCK_M=block_m, BLOCK_N=32, SPLIT=split, num_warps=warps, num_stages=2, enable_fp_fusion=False)
    if block_m == 16:  # more warps repeat the same 16 rows, but hide each other's waiting: measured on an H100
        default |= dict(BLOCK_N=16, num_warps=4 if hopper else 2, num_stages=3 if capability(device) >= 100 else 2)
    elif head_dim > 128 and capability(device) in range(80, 90):
        default |= dict(BLOCK_M=16, BLOCK_N=16, num_warps=4)
    elif head_dim > 128 and capability(device) == 90:
        default |= dict(BLOCK_N=16, num_stages=1)
    if element_size == 4:
        default |= _float32_tiles(block_m, head_dim)
    return tiles("attention", device, (block_m, heads, head_dim, element_size), default)


def _expands(rows: int, head_dim: int, element_size: int, device: torch.device) -> bool:
    """Whether keys and values are dequantized before the launch. Tiles of wider heads faulted on an H100, with Triton 3.6."""
    return rows >= EXPANDED_ROWS and head_dim * element_size <= 256 and expand.expands(device)


def _float32_tiles(block_m: int, head_dim: int) -> dict:
    """The fewest spills of those tried."""
    if block_m == 16 or head_dim <= 128:
        return dict(BLOCK_N=16, num_warps=8, num_stages=2)
    return dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)


def _aot(shape: BlockShape, new: int, total: int, window: int | None = None, softcap: float | None = None) -> object:
    q = meta(1, new, shape.heads, shape.head_dim)
    scores = Scores(meta(1, total, dtype=torch.bool), 0.1, window, softcap)
    return attention_quantize(q, meta_cache(shape, 1, total), scores, shape.head_parts(), 1.0)


AOT_SIGNATURES = {
    "prefill_8b": lambda: _aot(LLAMA3_8B, 2048, 2048),
    "decode_8b": lambda: _aot(LLAMA3_8B, 1, 2048),
    "prefill_smollm2": lambda: _aot(SMOLLM2_135M, 512, 512),
    "decode_smollm2": lambda: _aot(SMOLLM2_135M, 1, 2048),
    "prefill_gemma2": lambda: _aot(GEMMA2_2B, 2048, 2048, window=1024, softcap=50.0),
    "decode_gemma2": lambda: _aot(GEMMA2_2B, 1, 2048, window=1024, softcap=50.0),
}
