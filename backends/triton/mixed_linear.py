"""One launch for a linear with a 4-bit and an 8-bit part: y = y_low + y_high (+ bias) (+ residual).

    acc[m, n]  = sum_k qx[m, k] * qw[n, k] - zp[m] * row_sum[n]            int32, exact
    y_part     = float32(acc) * (sx[m] * sw[n])                             one scale a token
    y_part     = sw[n] * sum_g float32(acc_g) * sx[m, g]                    one scale a token and group (o_proj)

Operands are packed as `formats` says; nibbles are unpacked in registers. Both nibbles of a byte hold neighbouring columns, in x
and in w alike, so the even and the odd columns are two dot products and nothing is shuffled. A nibble is left in the upper
half of its byte (16 times its value), which saves the sign extension; the accumulator is shifted right by 8 at the end, exactly.

q/k/v and gate/up are stacked along N by the caller and share the launch. M > 16: a tile of outputs per program. M <= 16: bound by
weight bytes, K is split over programs; partial sums are stored, and the program that finishes last adds them, in order.

Source: integer law in resq_compiler/numerics/quantized.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.formats import Codes, PackedWeight
from resq_compiler.backends.triton import expand
from resq_compiler.backends.triton.device import even_columns, odd_columns
from resq_compiler.backends.triton.formats import PartLayout, next_power_of_two
from resq_compiler.backends.triton.launch import arrival_counters, capability, check_launch, isa, processors, run, tiles
from resq_compiler.backends.triton.shapes import LLAMA3_8B, SMOLLM2_135M, meta, meta_activation, meta_weight
from torch import Tensor

from resq_compiler.errors import BackendError

STRIDES = ("STRIDE_L", "GROUPS_L", "STRIDE_H", "GROUPS_H")
DECODE_ROWS = 16
EXPANDED_ROWS = 1024  # from here on a weight is read so often that unpacking it once is cheaper, where `expands`
SM100_TILES = dict(BLOCK_M=64, BLOCK_N=128, num_warps=4)
MAX_PACKED_COLUMNS = 131071  # 256 * 8 * 8 * K must stay below 2^31


@triton.jit
def _tile_sum(acc, p_x, p_w, i_k, STRIDE: tl.constexpr, PACKED: tl.constexpr, ISA: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc [BM, BN] and the products of tile i_k."""
    o_run = i_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if STRIDE % BLOCK_K == 0:
        b_x = tl.load(p_x + o_run)  # [BM, BK]
        b_w = tl.load(p_w + o_run)  # [BN, BK]
    else:
        b_x = tl.load(p_x + o_run, mask=o_run < STRIDE, other=0)
        b_w = tl.load(p_w + o_run, mask=o_run < STRIDE, other=0)
    if PACKED:
        acc = tl.dot(even_columns(b_x, ISA), tl.trans(even_columns(b_w, ISA)), acc, out_dtype=tl.int32)
        acc = tl.dot(odd_columns(b_x, ISA), tl.trans(odd_columns(b_w, ISA)), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(b_x, tl.trans(b_w), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _part_sum(
    p_x, p_w, first, last,
    STRIDE: tl.constexpr, PACKED: tl.constexpr, ISA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 sum over the tiles [first, last) of a run of STRIDE bytes; packed bytes accumulate 256 times too large."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for i_k in tl.range(first, last):
        acc = _tile_sum(acc, p_x, p_w, i_k, STRIDE, PACKED, ISA, BLOCK_K)
    return (acc >> 8) if PACKED else acc


@triton.jit
def split_sum(
    p_x, p_w, p_sx, p_zp, p_sum, o_m, o_n, N, i_split, GROUPS_ALL,
    STRIDE: tl.constexpr, GROUPS: tl.constexpr, PACKED: tl.constexpr, ISA: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Share i_split of one part: raw int32 sums (one group), or float32 sums over groups of sx * (sum - zp * row_sum)."""
    p_x += o_m[:, None] * (STRIDE * GROUPS)
    p_w += o_n[:, None] * (STRIDE * GROUPS)
    TILES: tl.constexpr = (STRIDE + BLOCK_K - 1) // BLOCK_K
    if GROUPS == 1:
        y = _part_sum(p_x, p_w, i_split * TILES // SPLIT, (i_split + 1) * TILES // SPLIT,
                      STRIDE, PACKED, ISA, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    else:
        y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i_g in tl.range(i_split * GROUPS // SPLIT, (i_split + 1) * GROUPS // SPLIT):
            if TILES == 1:  # without a loop inside, tiles of the next groups are loaded while this one is computed
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
                acc = _tile_sum(acc, p_x + i_g * STRIDE, p_w + i_g * STRIDE, 0, STRIDE, PACKED, ISA, BLOCK_K)
                acc = (acc >> 8) if PACKED else acc
            else:
                acc = _part_sum(p_x + i_g * STRIDE, p_w + i_g * STRIDE, 0, TILES,
                                STRIDE, PACKED, ISA, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
            b_sx = tl.load(p_sx + o_m * GROUPS_ALL + i_g)  # [BM]
            b_zp = tl.load(p_zp + o_m * GROUPS_ALL + i_g)
            b_sum = tl.load(p_sum + i_g * N + o_n)  # [BN]
            y += (acc - b_zp[:, None] * b_sum[None, :]).to(tl.float32) * b_sx[:, None]
    return y


@triton.jit
def scale_part(acc, p_sx, p_zp, p_sw, p_sum, o_m, o_n, GROUPS_ALL, GROUPS: tl.constexpr):
    """Epilogue of one part: zero-points (when there is one group) and scales."""
    b_sw = tl.load(p_sw + o_n)[None, :]
    if GROUPS > 1:
        y = acc * b_sw
    else:
        b_sx = tl.load(p_sx + o_m * GROUPS_ALL)[:, None]
        b_zp = tl.load(p_zp + o_m * GROUPS_ALL)[:, None]
        y = (acc - b_zp * tl.load(p_sum + o_n)[None, :]).to(tl.float32) * (b_sx * b_sw)
    return y


@triton.jit
def sum_of_parts(
    p_xl, p_xh, p_sx, p_zp, p_wl, p_wh, p_sw, p_sum, o_m, o_n, N,
    STRIDE_L: tl.constexpr, GROUPS_L: tl.constexpr, STRIDE_H: tl.constexpr, GROUPS_H: tl.constexpr, PACKED: tl.constexpr, ISA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The scaled products of the low part (PACKED or a code a byte), if there is one, and of the high one: float32 [BM, BN]."""
    GROUPS: tl.constexpr = GROUPS_L + GROUPS_H
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GROUPS_L > 0:
        acc = split_sum(p_xl, p_wl, p_sx, p_zp, p_sum, o_m, o_n, N, 0, GROUPS,
                         STRIDE_L, GROUPS_L, PACKED, ISA, 1, BLOCK_M, BLOCK_N, BLOCK_L)  # fmt: skip
        y = scale_part(acc, p_sx, p_zp, p_sw, p_sum, o_m, o_n, GROUPS, GROUPS_L)
    if GROUPS_H > 0:
        p_sx += GROUPS_L
        p_zp += GROUPS_L
        p_sum += GROUPS_L * N
        acc = split_sum(p_xh, p_wh, p_sx, p_zp, p_sum, o_m, o_n, N, 0, GROUPS,
                         STRIDE_H, GROUPS_H, False, ISA, 1, BLOCK_M, BLOCK_N, BLOCK_H)  # fmt: skip
        p_sw += N if GROUPS_L > 0 else 0
        y += scale_part(acc, p_sx, p_zp, p_sw, p_sum, o_m, o_n, GROUPS, GROUPS_H)
    return y


@triton.jit
def _store_output(
    y, p_out, p_bias, p_res, stride_res, i_m, i_n, M, N,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, residual, store. The tile's corner is a 64-bit pointer and offsets inside it are 32-bit, to save registers."""
    o_m = tl.arange(0, BLOCK_M)[:, None]
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N - i_n
    m_out = (o_m < M - i_m) & m_n[None, :]
    if HAS_BIAS:
        y += tl.load(p_bias + i_n + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RES:
        p_res += i_m.to(tl.int64) * stride_res + i_n
        y += tl.load(p_res + o_m * stride_res + o_n[None, :], mask=m_out, other=0.0).to(tl.float32)
    p_out += i_m.to(tl.int64) * N + i_n
    tl.store(p_out + o_m * N + o_n[None, :], y.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def _mixed_linear_kernel(
    p_xl, p_xh, p_sx, p_zp, p_wl, p_wh, p_sw, p_sum, p_bias, p_res, p_out, M, N, stride_res,
    STRIDE_L: tl.constexpr, GROUPS_L: tl.constexpr, STRIDE_H: tl.constexpr, GROUPS_H: tl.constexpr, PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, ISA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of outputs; programs walk GROUP_M rows of tiles before the next column, for the L2 cache."""
    i_pid = tl.program_id(0)
    n_m = tl.cdiv(M, BLOCK_M)
    n_n = tl.cdiv(N, BLOCK_N)
    i_first = i_pid // (GROUP_M * n_n) * GROUP_M
    rows = tl.minimum(n_m - i_first, GROUP_M)
    i_m = (i_first + (i_pid % (GROUP_M * n_n)) % rows) * BLOCK_M
    i_n = ((i_pid % (GROUP_M * n_n)) // rows) * BLOCK_N
    # beyond the edge, rows and columns wrap around: the loads need no mask and the results are not stored
    o_x = ((i_m + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    o_w = ((i_n + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    y = sum_of_parts(p_xl, p_xh, p_sx, p_zp, p_wl, p_wh, p_sw, p_sum, o_x, o_w, N, STRIDE_L, GROUPS_L, STRIDE_H, GROUPS_H,
                     PACKED, ISA, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_H)  # fmt: skip
    _store_output(y, p_out, p_bias, p_res, stride_res, i_m, i_n, M, N, HAS_BIAS, HAS_RES, BLOCK_M, BLOCK_N)


@triton.jit
def _reduce_splits(
    p_ws, o_ws, slot, GROUPS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sum of the SPLIT stored partial sums, in order: int32 of one group, float32 (stored as its bits) of several."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if GROUPS > 1 else tl.int32)
    for i_s in tl.static_range(SPLIT):
        b_part = tl.load(p_ws + i_s * 2 * slot + o_ws, cache_modifier=".cg")
        total += b_part.to(tl.float32, bitcast=True) if GROUPS > 1 else b_part
    return total


@triton.jit
def _mixed_linear_decode_kernel(
    p_xl, p_xh, p_sx, p_zp, p_wl, p_wh, p_sw, p_sum, p_bias, p_res, p_out, p_ws, p_count, M, N, stride_res,
    STRIDE_L: tl.constexpr, GROUPS_L: tl.constexpr, STRIDE_H: tl.constexpr, GROUPS_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, ISA: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """M <= BLOCK_M rows, grid (N tiles, SPLIT): every program sums a share of K, the last to arrive writes the outputs."""
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    o_m = tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_x = (o_m % M).to(tl.int64)
    o_w = (o_n % N).to(tl.int64)
    GROUPS: tl.constexpr = GROUPS_L + GROUPS_H
    slot = M * N
    o_ws = (o_m % M)[:, None] * N + o_w[None, :]
    m_ws = (o_m < M)[:, None] & (o_n < N)[None, :]
    if GROUPS_L > 0:
        acc_l = split_sum(p_xl, p_wl, p_sx, p_zp, p_sum, o_x, o_w, N, i_split, GROUPS,
                           STRIDE_L, GROUPS_L, True, ISA, SPLIT, BLOCK_M, BLOCK_N, BLOCK_L)  # fmt: skip
        if SPLIT > 1:
            tl.store(p_ws + i_split * 2 * slot + o_ws, acc_l.to(tl.int32, bitcast=GROUPS_L > 1), mask=m_ws)
    if GROUPS_H > 0:
        acc_h = split_sum(p_xh, p_wh, p_sx + GROUPS_L, p_zp + GROUPS_L, p_sum + GROUPS_L * N, o_x, o_w, N, i_split, GROUPS,
                           STRIDE_H, GROUPS_H, False, ISA, SPLIT, BLOCK_M, BLOCK_N, BLOCK_H)  # fmt: skip
        if SPLIT > 1:
            tl.store(p_ws + (i_split * 2 + 1) * slot + o_ws, acc_h.to(tl.int32, bitcast=GROUPS_H > 1), mask=m_ws)
    if SPLIT > 1:
        tl.debug_barrier()
        arrived = tl.atomic_add(p_count + i_n, 1, sem="acq_rel")
        if arrived != SPLIT - 1:
            return
        tl.store(p_count + i_n, 0)
        if GROUPS_L > 0:
            acc_l = _reduce_splits(p_ws, o_ws, slot, GROUPS_L, SPLIT, BLOCK_M, BLOCK_N)
        if GROUPS_H > 0:
            acc_h = _reduce_splits(p_ws + slot, o_ws, slot, GROUPS_H, SPLIT, BLOCK_M, BLOCK_N)
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GROUPS_L > 0:
        y = scale_part(acc_l, p_sx, p_zp, p_sw, p_sum, o_x, o_w, GROUPS, GROUPS_L)
    if GROUPS_H > 0:
        p_sw += N if GROUPS_L > 0 else 0
        y += scale_part(acc_h, p_sx + GROUPS_L, p_zp + GROUPS_L, p_sw, p_sum + GROUPS_L * N, o_x, o_w, GROUPS, GROUPS_H)
    i_m = i_n * 0
    _store_output(y, p_out, p_bias, p_res, stride_res, i_m, i_n * BLOCK_N, M, N, HAS_BIAS, HAS_RES, BLOCK_M, BLOCK_N)


def mixed_linear(
    x: Codes,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The formula above, in one launch.

    Args:    x: packed activations of M rows.    weight: N stacked output rows.
             bias: [N].    residual: [M, N], added last; may be a column slice.
    Returns: [M, N] of out_dtype.
    Raises:  BackendError: shapes disagree, or operands that cannot be launched.
    """
    device = check_launch(
        "mixed_linear", low=x.low, high=x.high, scale=x.scale, weight=weight.scale, bias=bias, residual=residual
    )
    rows, n = x.scale.shape[0], weight.out_features
    layouts = tuple(PartLayout.of(part) for part in weight.parts)
    _check_operands(x, layouts)
    out = torch.empty(rows, n, dtype=out_dtype, device=device)
    if rows == 0:
        return out
    strides = strides_of(layouts)
    operands = [*x, weight.low, weight.high, weight.scale, weight.row_sum, bias, residual]
    pointers = [x.scale if p is None or not p.numel() else p for p in operands] + [out]
    flags = dict(HAS_BIAS=bias is not None, HAS_RES=residual is not None, ISA=isa(), **strides)
    stride_res = 0 if residual is None else residual.stride(0)
    if rows <= DECODE_ROWS:
        _launch_decode(pointers, rows, n, stride_res, flags, device)
    else:
        _launch_prefill(pointers, rows, n, stride_res, flags, device)
    return out


def strides_of(layouts: tuple[PartLayout, ...]) -> dict[str, int]:
    """Bytes of a run and runs of the low and the high part; zeros where there is none."""
    found = dict(STRIDE_L=0, GROUPS_L=0, STRIDE_H=0, GROUPS_H=0)
    for layout in layouts:
        suffix = "L" if layout.is_low else "H"
        found |= {f"STRIDE_{suffix}": layout.stride, f"GROUPS_{suffix}": layout.groups}
    return found


def _check_operands(x: Codes, layouts: tuple[PartLayout, ...]) -> None:
    groups, rows = sum(layout.groups for layout in layouts), x.scale.shape[0]
    if x.scale.shape[1] != groups or x.scale.stride(0) != groups:
        raise BackendError(
            f"mixed_linear: scale {tuple(x.scale.shape)}, the weight has {groups} groups; expected [M, {groups}]"
        )
    for layout in layouts:
        codes = x.of(layout)
        if codes.shape != (rows, layout.row_bytes) or codes.stride(0) != layout.row_bytes:
            raise BackendError(
                f"mixed_linear: {layout.bits}-bit activations {tuple(codes.shape)}, expected {(rows, layout.row_bytes)} contiguous; "
                "quantize with the parts the weight was packed with"
            )
        if layout.is_low and layout.columns > MAX_PACKED_COLUMNS:
            raise BackendError(
                f"mixed_linear: {layout.columns} columns can overflow int32, at most {MAX_PACKED_COLUMNS}"
            )


def block_bytes(stride: int, groups: int, most: int) -> int:
    """Bytes of K a tile takes: the largest power of two up to `most` that divides one group's run, or covers a short one."""
    if groups > 1:
        return min(max(next_power_of_two(stride), 32), most)
    return min(stride & -stride, most) if stride else 32


def prefill_tiles(rows: int, n: int, strides: dict[str, int], packed: bool, device: torch.device) -> dict:
    """Tiles of the large-M form."""
    if not packed:
        key = (rows, n, strides["STRIDE_L"], strides["STRIDE_H"])
        return tiles("mixed_linear_expanded", device, key, _expanded_tiles(strides))
    small = device.type == "cpu"
    # 128 x 128 outputs fill the registers of 8 warps without spills on sm_80 to sm_90
    default = dict(
        BLOCK_M=min(128, max(16, next_power_of_two(rows))) if small else 128,
        BLOCK_N=128,
        BLOCK_L=block_bytes(strides["STRIDE_L"], strides["GROUPS_L"], 64),
        BLOCK_H=block_bytes(strides["STRIDE_H"], strides["GROUPS_H"], 64),
        GROUP_M=8,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=False,
    )
    if max(strides["GROUPS_L"], strides["GROUPS_H"]) > 1:  # a float32 sum lives beside the int32 one
        default |= dict(BLOCK_N=64)
    elif capability(device) >= 100:
        default |= SM100_TILES
    return tiles("mixed_linear", device, (rows, n, strides["STRIDE_L"], strides["STRIDE_H"]), default)


def _expanded_tiles(strides: dict[str, int]) -> dict:
    """The fastest of those measured on an H100 (docs/results/triton.md)."""
    parts = {suffix: block_bytes(strides[f"STRIDE_{suffix}"], strides[f"GROUPS_{suffix}"], 128) for suffix in "LH"}
    default = dict(
        BLOCK_M=128, BLOCK_N=128, BLOCK_L=parts["L"], BLOCK_H=parts["H"], GROUP_M=8, num_warps=8, num_stages=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    if max(strides["GROUPS_L"], strides["GROUPS_H"]) > 1:
        default |= dict(BLOCK_M=64, num_warps=4, num_stages=3)
    elif not strides["STRIDE_H"]:  # nothing else is in registers beside one sum
        default |= dict(num_warps=4, num_stages=3)
    return default


def decode_tiles(rows: int, n: int, strides: dict[str, int], device: torch.device) -> dict:
    """Tiles of the M <= 16 form: K is split until there are up to four programs a processor, or no K tiles are left."""
    block_l = block_bytes(strides["STRIDE_L"], strides["GROUPS_L"], 128)
    block_h = block_bytes(strides["STRIDE_H"], strides["GROUPS_H"], 128)
    share = strides["GROUPS_L"] if strides["GROUPS_L"] > 1 else strides["STRIDE_L"] // block_l
    wanted = 4 * processors(device) / triton.cdiv(n, 64)
    split = max(1, min(16, 1 << int(wanted).bit_length() - 1 if wanted >= 1 else 1, share or 1))
    default = dict(
        SPLIT=split,
        BLOCK_M=16,
        BLOCK_N=64,
        BLOCK_L=block_l,
        BLOCK_H=block_h,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=False,
    )
    return tiles("mixed_linear_decode", device, (rows, n, strides["STRIDE_L"], strides["STRIDE_H"]), default)


def _launch_prefill(
    pointers: list[Tensor], rows: int, n: int, stride_res: int, flags: dict, device: torch.device
) -> None:
    packed = not (flags["GROUPS_L"] and rows >= EXPANDED_ROWS and expand.expands(device))
    if not packed:
        pointers[0], pointers[4] = expand.nibbles(pointers[0]), expand.nibbles(pointers[4])
        flags = {**flags, "STRIDE_L": 2 * flags["STRIDE_L"]}
    options = prefill_tiles(rows, n, {k: flags[k] for k in STRIDES}, packed, device)
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"]),)
    run(_mixed_linear_kernel, grid, *pointers, rows, n, stride_res, PACKED=packed, **flags, **options)


def _launch_decode(
    pointers: list[Tensor], rows: int, n: int, stride_res: int, flags: dict, device: torch.device
) -> None:
    options = decode_tiles(rows, n, {k: flags[k] for k in STRIDES}, device)
    split, blocks = options["SPLIT"], triton.cdiv(n, options["BLOCK_N"])
    workspace = torch.empty(split * 2 * rows * n if split > 1 else 1, dtype=torch.int32, device=device)
    counters = arrival_counters(device, blocks)
    run(
        _mixed_linear_decode_kernel,
        (blocks, split),
        *pointers,
        workspace,
        counters,
        rows,
        n,
        stride_res,
        **flags,
        **options,
    )


def _aot(features: int, layouts: tuple[PartLayout, ...], rows: int, residual: bool = False) -> object:
    extra = meta(rows, features) if residual else None
    return mixed_linear(meta_activation(rows, layouts), meta_weight(features, layouts), None, extra, torch.float16)


AOT_SIGNATURES = {
    "prefill_qkv_8b": lambda: _aot(LLAMA3_8B.qkv_features, LLAMA3_8B.parts(), 2048),
    "prefill_o_8b": lambda: _aot(LLAMA3_8B.hidden, LLAMA3_8B.head_parts(), 2048, True),
    "prefill_down_8b": lambda: _aot(LLAMA3_8B.hidden, LLAMA3_8B.down_parts(), 2048, True),
    "decode_qkv_8b": lambda: _aot(LLAMA3_8B.qkv_features, LLAMA3_8B.parts(), 1),
    "decode_o_8b": lambda: _aot(LLAMA3_8B.hidden, LLAMA3_8B.head_parts(), 1, True),
    "decode_gate_up_8b": lambda: _aot(2 * LLAMA3_8B.ffn, LLAMA3_8B.parts(), 1),
    "decode_down_8b": lambda: _aot(LLAMA3_8B.hidden, LLAMA3_8B.down_parts(), 1, True),
    "decode_qkv_smollm2": lambda: _aot(SMOLLM2_135M.qkv_features, SMOLLM2_135M.parts(), 1),
    "prefill_qkv_smollm2": lambda: _aot(SMOLLM2_135M.qkv_features, SMOLLM2_135M.parts(), 512),
}
