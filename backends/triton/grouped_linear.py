"""The linears of all experts of a mixture in one launch: every row times the weights of its expert, integers exact as in `mixed_linear`.

Rows are put into blocks of one expert each; a program computes a tile of outputs of a block. Rows stay where they are: a block is a list
of row numbers, filled up with one that is none. How many blocks there are is known only on the GPU, so there are as many programs as
there can be blocks, and those that have none end at once. Weights of all experts lie behind each other (fused.experts.PackedExperts).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from resq_compiler.backends.fused.experts import PackedExperts
from resq_compiler.backends.fused.formats import Codes
from resq_compiler.backends.triton.formats import PartLayout, next_power_of_two
from resq_compiler.backends.triton.launch import check_launch, isa, run, tiles
from resq_compiler.backends.triton.mixed_linear import block_bytes, strides_of, sum_of_parts
from resq_compiler.backends.triton.shapes import meta, meta_activation
from torch import Tensor

MOST_ROWS = 64  # of a block


@dataclass(frozen=True)
class RowBlocks:
    """Rows in blocks of one expert. expert: int32 [blocks], the number of experts where a block is not used.
    rows: int32 [blocks, size], the number of rows where a place is empty."""

    expert: Tensor
    rows: Tensor


def row_blocks(indices: Tensor, experts: int) -> RowBlocks:
    """Blocks of rows by expert, of indices int64 [M]; without waiting for the GPU."""
    count = indices.shape[0]
    size = min(MOST_ROWS, max(16, next_power_of_two(count // experts)))
    rows_of = torch.zeros(experts, dtype=torch.int64, device=indices.device)
    rows_of = rows_of.scatter_add(0, indices, torch.ones_like(indices))
    blocks_of = (rows_of + size - 1) // size
    blocks = count // size + min(experts, count)
    order = indices.argsort(stable=True)
    expert = indices[order]
    stops = blocks_of.cumsum(0)
    inside = torch.arange(count, device=indices.device) - (rows_of.cumsum(0) - rows_of)[expert]
    rows = torch.full((blocks * size,), count, dtype=torch.int32, device=indices.device)
    rows = rows.scatter(0, (stops - blocks_of)[expert] * size + inside, order.to(torch.int32))
    numbers = torch.arange(blocks, device=indices.device)
    return RowBlocks(torch.searchsorted(stops, numbers, right=True).to(torch.int32), rows.view(blocks, size))


@triton.jit
def _grouped_linear_kernel(
    p_xl, p_xh, p_sx, p_zp, p_w, p_sw, p_sum, p_bias, p_out, p_expert, p_rows, M, N, EXPERTS, CHOICES,
    STRIDE_L: tl.constexpr, GROUPS_L: tl.constexpr, STRIDE_H: tl.constexpr, GROUPS_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, ISA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of outputs of a block, grid (blocks, N tiles)."""
    i_b = tl.program_id(0)
    i_n = tl.program_id(1) * BLOCK_N
    i_e = tl.load(p_expert + i_b)
    if i_e >= EXPERTS:
        return
    o_row = tl.load(p_rows + i_b * BLOCK_M + tl.arange(0, BLOCK_M))
    m_row = o_row < M
    o_x = (tl.where(m_row, o_row, 0) // CHOICES).to(tl.int64)
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_w = (o_n % N).to(tl.int64)  # beyond the edge columns wrap around: no mask, and the results are not stored
    i_e = i_e.to(tl.int64)
    p_w += i_e * N * (STRIDE_L + STRIDE_H)
    p_sw += i_e * N * (GROUPS_L + GROUPS_H)
    p_sum += i_e * N * (GROUPS_L + GROUPS_H)
    y = sum_of_parts(p_xl, p_xh, p_sx, p_zp, p_w, p_w + N * STRIDE_L, p_sw, p_sum, o_x, o_w, N, STRIDE_L, GROUPS_L, STRIDE_H, GROUPS_H,
                     True, ISA, BLOCK_M, BLOCK_N, BLOCK_L, BLOCK_H)  # fmt: skip
    if HAS_BIAS:
        y += tl.load(p_bias + i_e * N + o_w)[None, :]
    p_out += tl.where(m_row, o_row, 0).to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, y, mask=m_row[:, None] & (o_n < N)[None, :])


def grouped_linear(x: Codes, weight: PackedExperts, blocks: RowBlocks, choices: int, count: int) -> Tensor:
    """The formula above, in one launch.

    Args:    x: packed activations, a row for every `choices` rows of the result; a run for each part.    weight: of E experts.
             blocks: of `count` rows.
    Returns: float32 [count, N].
    Raises:  BackendError: operands that cannot be launched.
    """
    device = check_launch(
        "grouped_linear", low=x.low, high=x.high, scale=x.scale, weight=weight.codes, rows=blocks.rows
    )
    n, experts = weight.out_features, weight.scale.shape[0]
    out = torch.empty(count, n, dtype=torch.float32, device=device)
    if count == 0:
        return out
    strides = strides_of(tuple(PartLayout.of(part) for part in weight.parts))
    operands = [*x, weight.codes, weight.scale, weight.row_sum, weight.bias]
    pointers = [x.scale if p is None or not p.numel() else p for p in operands] + [out, blocks.expert, blocks.rows]
    default = dict(
        BLOCK_N=64,
        BLOCK_L=block_bytes(strides["STRIDE_L"], strides["GROUPS_L"], 64),
        BLOCK_H=block_bytes(strides["STRIDE_H"], strides["GROUPS_H"], 64),
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    block_count, size = blocks.rows.shape
    options = tiles("grouped_linear", device, (size, n, strides["STRIDE_L"], strides["STRIDE_H"]), default)
    grid = (block_count, triton.cdiv(n, options["BLOCK_N"]))
    flags = dict(HAS_BIAS=weight.bias is not None, ISA=isa(), BLOCK_M=size, **strides)
    run(_grouped_linear_kernel, grid, *pointers, count, n, experts, choices, **flags, **options)
    return out


def _aot(tokens: int, choices: int, experts: int, hidden: int, features: int) -> object:
    parts = (PartLayout(4, hidden * 7 // 8), PartLayout(8, hidden // 8))
    size = experts * features * sum(part.row_bytes for part in parts)
    scale = meta(experts, 2, features, dtype=torch.float32)
    sums, bits = meta(experts, 2, features, dtype=torch.int32), meta(experts, 2, dtype=torch.int32)
    weight = PackedExperts(meta(size, dtype=torch.int8), scale, sums, bits, None, parts)
    count = tokens * choices
    blocks = row_blocks(meta(count, dtype=torch.int64), experts)
    return grouped_linear(meta_activation(tokens, parts), weight, blocks, choices, count)


AOT_SIGNATURES = {
    "decode_gate_up_30b": lambda: _aot(1, 8, 128, 2048, 1536),
    "prefill_gate_up_30b": lambda: _aot(2048, 8, 128, 2048, 1536),
}
"""Qwen3-30B-A3B: 128 experts of 768 hidden channels, 8 for each token."""
