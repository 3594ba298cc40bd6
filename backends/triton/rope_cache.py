"""Rotary embedding, U_C and quantize-and-append of keys and values to the packed paged cache, one launch for q, k and v.

    x'    = rms_norm(x) * weight           optional, per head (q/k norm)
    r     = x' * cos + rotate_half(x') * sin      columns beyond the rotary width pass through; values are not rotated
    q_out = r_q U,  k = r_k U              U [D, D] shared or [Hu, D, D]; absent: identity
    cache[b, head, start[b] + i] = codes, scales, zero-points of k and v, per token, head and part [low | high]

The cache layout is in `formats`. Source: ResQ sections 4.2 and 5.3 (keys are stored after RoPE, in the basis U_C); differs: U_C in
float, not int8, as the integer law of this project says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.kernels import LayerCache, Rotation
from resq_compiler.backends.triton.device import pack_pairs, quantization_parameters, quantize_block
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, next_power_of_two
from resq_compiler.backends.triton.launch import check_launch, precision, run, tiles
from resq_compiler.backends.triton.shapes import GEMMA2_2B, LLAMA3_8B, SMOLLM2_135M, BlockShape, meta, meta_cache
from torch import Tensor

from resq_compiler.errors import BackendError


@triton.jit
def _load_head(p_x, o_c, inverse, p_norm, D: tl.constexpr, R: tl.constexpr, HAS_NORM: tl.constexpr, p_cos, p_sin, m_t):
    """[BT, columns o_c] float32 of one head, normalized (inverse: 1 / rms) and rotated. p_x: row pointers [BT, 1]."""
    m_c = o_c < D
    y = tl.load(p_x + o_c, mask=m_t & m_c, other=0.0).to(tl.float32)
    if HAS_NORM:
        y = y * inverse * tl.load(p_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    if R > 0:
        m_r = o_c < R
        o_partner = tl.where(o_c < R // 2, o_c + R // 2, o_c - R // 2)
        partner = tl.load(p_x + o_partner, mask=m_t & m_r, other=0.0).to(tl.float32)
        if HAS_NORM:
            partner = partner * inverse * tl.load(p_norm + o_partner, mask=m_r, other=0.0).to(tl.float32)
        cos = tl.load(p_cos + o_c, mask=m_t & m_r, other=1.0).to(tl.float32)
        sin = tl.load(p_sin + o_c, mask=m_t & m_r, other=0.0).to(tl.float32)
        y = y * cos + tl.where(o_c < R // 2, -partner, partner) * sin
    return y


@triton.jit
def _turned_head(
    p_x, p_u, p_norm, eps, p_cos, p_sin, m_t, HU: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_NORM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A query or key head, normalized, rotated and times U: [BT, BD] float32.

    The product runs on tensor cores in the type of U (the model's): a float16 model rounds keys to float16 anyway. It takes BLOCK_K
    rows of U at a time, since all of it, at 256 columns, is more than the shared memory of most GPUs.
    """
    o_c = tl.arange(0, BLOCK_D)[None, :]
    inverse = 1.0
    if HAS_NORM:
        whole = tl.load(p_x + o_c, mask=m_t & (o_c < D), other=0.0).to(tl.float32)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(whole * whole, 1) / D + eps))[:, None]
    if HU == 0:
        y = _load_head(p_x, o_c, inverse, p_norm, D, R, HAS_NORM, p_cos, p_sin, m_t)
    else:
        y = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
        for first in tl.range(0, D, BLOCK_K):
            o_k = first + tl.arange(0, BLOCK_K)
            x = _load_head(p_x, o_k[None, :], inverse, p_norm, D, R, HAS_NORM, p_cos, p_sin, m_t)
            u = tl.load(p_u + o_k[:, None] * D + o_c, mask=(o_k[:, None] < D) & (o_c < D), other=0.0)
            y = tl.dot(x.to(u.dtype), u, y, input_precision=PRECISION)
    return y


@triton.jit
def _quantize_part(y, m_part, CLIP: tl.constexpr, BITS: tl.constexpr):
    """Codes of the columns m_part (0 elsewhere), scale and zero-point of each row."""
    inside = tl.where(m_part, y, 0.0)
    lo = tl.minimum(tl.min(inside, 1), 0.0)
    hi = tl.maximum(tl.max(inside, 1), 0.0)
    scale, zero_point = quantization_parameters(lo, hi, CLIP, BITS)
    codes = quantize_block(inside, scale[:, None], zero_point[:, None], BITS)
    return tl.where(m_part, codes, 0).to(tl.int8), scale, zero_point


@triton.jit
def _append(
    y, p_page, o_row, o_c, m_t, CLIP: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, BITS_L: tl.constexpr, BITS_H: tl.constexpr,
    BYTES_L: tl.constexpr, BYTES_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Quantize [BT, BD] and write each row to its page (p_page [BT], o_row [BT] the row inside the page)."""
    p_scale = (p_page + PAGE * (BYTES_L + BYTES_H)).to(tl.pointer_type(tl.float32)) + o_row * 2
    p_zp = p_page + PAGE * (BYTES_L + BYTES_H + 8) + o_row * 2
    if LOW > 0:
        codes, scale, zero_point = _quantize_part(y, o_c < LOW, CLIP, BITS_L)
        even, odd = tl.split(tl.reshape(codes, (BLOCK_T, BLOCK_D // 2, 2)))
        o_b = tl.arange(0, BLOCK_D // 2)[None, :]
        p_low = (p_page + o_row * BYTES_L)[:, None]
        tl.store(p_low + o_b, pack_pairs(even, odd), mask=m_t & (o_b < BYTES_L))
        tl.store(p_scale[:, None], scale[:, None], mask=m_t)
        tl.store(p_zp[:, None], zero_point.to(tl.int8)[:, None], mask=m_t)
    if HIGH > 0:
        codes, scale, zero_point = _quantize_part(y, (o_c >= LOW) & (o_c < LOW + HIGH), CLIP, BITS_H)
        p_high = (p_page + PAGE * BYTES_L + o_row * BYTES_H)[:, None]
        tl.store(p_high + (o_c - LOW), codes, mask=m_t & (o_c >= LOW) & (o_c < LOW + HIGH))
        tl.store(p_scale[:, None] + 1, scale[:, None], mask=m_t)
        tl.store(p_zp[:, None] + 1, zero_point.to(tl.int8)[:, None], mask=m_t)


@triton.jit
def _rope_cache_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_u, p_qnorm, p_knorm, p_out, p_keys, p_values, p_table, p_start,
    T, S, stride_q, stride_k, stride_v, stride_cos_b, stride_cos_s, stride_table, eps,
    HQ: tl.constexpr, HK: tl.constexpr, HU: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    HAS_NORM: tl.constexpr, CLIP: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    LOW_K: tl.constexpr, HIGH_K: tl.constexpr, BITS_L_K: tl.constexpr, BITS_H_K: tl.constexpr,
    BYTES_L_K: tl.constexpr, BYTES_H_K: tl.constexpr, PAGE_BYTES_K: tl.constexpr,
    LOW_V: tl.constexpr, HIGH_V: tl.constexpr, BITS_L_V: tl.constexpr, BITS_H_V: tl.constexpr,
    BYTES_L_V: tl.constexpr, BYTES_H_V: tl.constexpr, PAGE_BYTES_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (token block of the T = B * S rows, head): heads are HQ queries, then HK keys, then HK values."""
    i_t = tl.program_id(0)
    i_h = tl.program_id(1)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_row = o_t < T
    m_t = m_row[:, None]
    o_c = tl.arange(0, BLOCK_D)[None, :]
    o_b = o_t // S
    o_t64 = o_t.to(tl.int64)
    o_cos = (o_b * stride_cos_b + (o_t % S) * stride_cos_s)[:, None]
    slot = tl.load(p_start + o_b, mask=m_row, other=0) + o_t % S
    page = tl.load(p_table + o_b * stride_table + slot // PAGE, mask=m_row, other=0).to(tl.int64)
    if i_h < HQ:
        p_x = (p_q + o_t64 * stride_q + i_h * D)[:, None]
        p_own = p_u + (i_h // (HQ // HU) if HU > 0 else 0) * D * D
        y = _turned_head(p_x, p_own, p_qnorm, eps, p_cos + o_cos, p_sin + o_cos, m_t,
                         HU, D, R, HAS_NORM, PRECISION, BLOCK_T, BLOCK_D, BLOCK_K)  # fmt: skip
        tl.store(p_out + (o_t64 * HQ + i_h)[:, None] * D + o_c, y.to(p_out.dtype.element_ty), mask=m_t & (o_c < D))
    elif i_h < HQ + HK:
        i_k = i_h - HQ
        p_x = (p_k + o_t64 * stride_k + i_k * D)[:, None]
        p_own = p_u + (i_k // (HK // HU) if HU > 0 else 0) * D * D
        y = _turned_head(p_x, p_own, p_knorm, eps, p_cos + o_cos, p_sin + o_cos, m_t,
                         HU, D, R, HAS_NORM, PRECISION, BLOCK_T, BLOCK_D, BLOCK_K)  # fmt: skip
        _append(y, p_keys + (page * HK + i_k) * PAGE_BYTES_K, slot % PAGE, o_c, m_t, CLIP,
                LOW_K, HIGH_K, BITS_L_K, BITS_H_K, BYTES_L_K, BYTES_H_K, BLOCK_T, BLOCK_D, PAGE)  # fmt: skip
    else:
        i_v = i_h - HQ - HK
        p_x = (p_v + o_t64 * stride_v + i_v * D)[:, None]
        y = tl.load(p_x + o_c, mask=m_t & (o_c < D), other=0.0).to(tl.float32)
        _append(y, p_values + (page * HK + i_v) * PAGE_BYTES_V, slot % PAGE, o_c, m_t, CLIP,
                LOW_V, HIGH_V, BITS_L_V, BITS_H_V, BYTES_L_V, BYTES_H_V, BLOCK_T, BLOCK_D, PAGE)  # fmt: skip


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation,
    cache: LayerCache,
    clip: float = 1.0,
) -> Tensor:
    """The formula above, in one launch; writes the cache pages in place.

    Args:    q [B, S, Hq, D], k, v [B, S, Hkv, D]: last two dimensions contiguous, tokens may be strided (slices of one product).
             rotation: cos, sin [B or 1, S, R] (R = 0: no rotation).    cache: pages [pages, Hkv, page_bytes] int8, table [B, n] int32.
    Returns: q in the basis of the cached keys, [B, S, Hq, D], dtype of q.
    Raises:  BackendError: shapes that disagree, or operands that cannot be launched.
    """
    u = rotation.u if rotation.u is None else rotation.u.to(q.dtype).contiguous()
    cos, sin, table, start = rotation.cos, rotation.sin, cache.table, cache.start
    device = check_launch("rope_cache", q=q, k=k, v=v, cos=cos, sin=sin, u=u, keys=cache.keys, table=table, start=start)
    assert table is not None
    batch, new, heads, d = q.shape
    kv_heads = k.shape[2]
    _check_heads(q, k, v, u, cache)
    out = torch.empty(batch, new, heads, d, dtype=q.dtype, device=device)
    if out.numel() == 0:
        return out
    default = rope_launch(batch * new, d, q.element_size())
    options = tiles("rope_cache", device, (d, heads, default["BLOCK_T"]), default)
    grid = (triton.cdiv(batch * new, options["BLOCK_T"]), heads + 2 * kv_heads)
    optional = [q if t is None else t for t in (u, rotation.q_norm, rotation.k_norm)]
    run(
        _rope_cache_kernel, grid, q, k, v, cos, sin, *optional, out, cache.keys, cache.values, table, start,
        batch * new, new, _token_stride(q), _token_stride(k), _token_stride(v), 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1),
        table.stride(0), rotation.eps,
        HQ=heads, HK=kv_heads, HU=0 if u is None else u.shape[0], D=d, R=cos.shape[-1], HAS_NORM=rotation.q_norm is not None,
        CLIP=clip, PAGE=PAGE, PRECISION=precision(), **HeadLayout.of(cache.key_parts).constants("_K"),
        **HeadLayout.of(cache.value_parts).constants("_V"), **options,
    )  # fmt: skip
    return out


def _token_stride(x: Tensor) -> int:
    """Elements from one token of [B, S, H, D] to the next; the stride of a dimension of size 1 means nothing."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, u: Tensor | None, cache: LayerCache) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (
            x.dim() != 4
            or x.stride(2) != x.shape[3]
            or (min(x.shape[0] - 1, x.shape[1]) > 0 and x.stride(0) != x.shape[1] * _token_stride(x))
        ):
            raise BackendError(
                f"rope_cache: {name} {tuple(x.shape)} with strides {x.stride()}; expected [B, S, H, D] whose heads are contiguous "
                "and whose tokens are evenly spaced"
            )
    for name, pages, layout in (("key", cache.keys, cache.key_parts), ("value", cache.values, cache.value_parts)):
        page_bytes = HeadLayout.of(layout).page_bytes
        if layout.head_dim != q.shape[3] or pages.shape[1:] != (k.shape[2], page_bytes) or not pages.is_contiguous():
            raise BackendError(
                f"rope_cache: {name} pages {tuple(pages.shape)} for {k.shape[2]} heads of {q.shape[3]}, layout {layout}; "
                f"expected [pages, {k.shape[2]}, {page_bytes}]"
            )
    if u is not None and (k.shape[2] % u.shape[0] or u.shape[1:] != (q.shape[3], q.shape[3])):
        raise BackendError(f"rope_cache: basis {tuple(u.shape)} for {k.shape[2]} key heads of {q.shape[3]}")


def rope_launch(tokens: int, head_dim: int, item: int) -> dict:
    """Tile and launch options for elements of `item` bytes; at most 32 KiB of U are in shared memory at a time."""
    block_d = max(16, next_power_of_two(head_dim))
    return dict(
        BLOCK_T=16 if tokens <= 16 else 32, BLOCK_D=block_d, BLOCK_K=min(block_d, 32768 // (block_d * item)),
        num_warps=4 if head_dim <= 64 else 8, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def _aot(shape: BlockShape, new: int, norms: bool = False) -> object:
    d, tokens = shape.head_dim, 4096
    stacked = meta(1, new, shape.heads + 2 * shape.kv_heads, d)
    q, k, v = stacked.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=2)
    angles = meta(1, new, d, dtype=torch.float32)
    u, gain = meta(1, d, d, dtype=torch.float32), meta(d, dtype=torch.float32) if norms else None
    return rope_cache(q, k, v, Rotation(angles, angles, u, gain, gain), meta_cache(shape, 1, tokens))


AOT_SIGNATURES = {
    "prefill_8b": lambda: _aot(LLAMA3_8B, 2048),
    "decode_8b": lambda: _aot(LLAMA3_8B, 1),
    "prefill_smollm2": lambda: _aot(SMOLLM2_135M, 512),
    "prefill_gemma2": lambda: _aot(GEMMA2_2B, 2048),
    "decode_gemma2": lambda: _aot(GEMMA2_2B, 1),
    "prefill_256_wide_with_norms": lambda: _aot(GEMMA2_2B, 2048, norms=True),
    "decode_256_wide_with_norms": lambda: _aot(GEMMA2_2B, 1, norms=True),
}
