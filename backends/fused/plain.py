"""The target "torch": the plainest formats, and the torch form of every operator.

activations, weights    a code a byte, as the quantized graph has them
cache                   [B, G, capacity, row] int8; a row holds a token and head: codes, zero points, scales as four bytes each
"""

from __future__ import annotations

from typing import ClassVar

import torch
from resq_compiler.backends.fused.formats import CacheFormat, CodeFormat, HeadParts, InputPart
from resq_compiler.backends.fused.target import ALL_SCORES, Target, takes_any
from resq_compiler.backends.fused.torch_kernels import TorchKernels
from torch import Tensor

from resq_compiler.numerics.quantized import QuantizedActivation, dequantize, quantize_activation


class PlainCodes(CodeFormat):
    """A code a byte, no padding."""

    def row_bytes(self, part: InputPart) -> int:
        return part.columns

    def pack_rows(self, codes: Tensor, part: InputPart) -> Tensor:
        return codes

    def unpack_rows(self, rows: Tensor, part: InputPart) -> Tensor:
        return rows

    def pack_weight(self, codes: Tensor, part: InputPart) -> Tensor:
        return codes

    def weight_shape(self, part: InputPart, out_features: int) -> tuple[int, ...]:
        return out_features, part.columns

    def unpack_weight(self, packed: Tensor, part: InputPart, start: int, stop: int) -> Tensor:
        return packed[start:stop]


class RowCache(CacheFormat):
    """Tokens one behind the other, in the order of the sequence; no table."""

    table_input: ClassVar[bool] = False

    def allocate(self, batch: int, heads: int, parts: HeadParts, tokens: int, device: torch.device) -> Tensor:
        row = parts.head_dim + 5 * len(parts.spans)
        return torch.empty(batch, heads, tokens, row, dtype=torch.int8, device=device)

    def capacity(self, cache: Tensor, batch: int) -> int:
        return cache.shape[2]

    def grown(self, cache: Tensor, batch: int, tokens: int) -> Tensor:
        _, heads, held, row = cache.shape
        larger = cache.new_empty(batch, heads, max(tokens, 2 * held), row)
        larger[:, :, :held] = cache
        return larger

    def selected(self, cache: Tensor, batch: int, index: Tensor) -> Tensor:
        return cache.index_select(0, index.to(cache.device))

    def table(self, batch: int, capacity: int, device: torch.device) -> Tensor | None:
        return None

    def write(
        self, cache: Tensor, table: Tensor | None, start: Tensor, x: Tensor, parts: HeadParts, clip: float
    ) -> None:
        pieces = [quantize_activation(x[..., a:b], bits, 1, clip) for bits, a, b in parts.spans]
        codes = [piece.qdata for piece in pieces]
        zero_points = [piece.zero_point.to(torch.int8) for piece in pieces]
        scales = torch.cat([piece.scale for piece in pieces], -1).view(torch.int8)
        rows = torch.cat([*codes, *zero_points, scales], -1).transpose(1, 2)  # [B, G, S, row]
        for b, first in enumerate(start.tolist()):
            cache[b, :, first : first + x.shape[1]] = rows[b]

    def read(self, cache: Tensor, table: Tensor | None, parts: HeadParts, total: int) -> Tensor:
        spans, d = parts.spans, parts.head_dim
        rows = cache[:, :, :total]
        zero_points = rows[..., d : d + len(spans)].int()
        scales = rows[..., d + len(spans) :].contiguous().view(torch.float32)
        pieces = []
        for i, (bits, first, last) in enumerate(spans):
            one = slice(i, i + 1)
            quantized = QuantizedActivation(rows[..., first:last], scales[..., one], zero_points[..., one], bits)
            pieces.append(dequantize(quantized))
        return torch.cat(pieces, -1)


TORCH = Target(
    "torch",
    PlainCodes(),
    RowCache(),
    TorchKernels(PlainCodes(), RowCache()),
    takes=ALL_SCORES,
    any_parts=True,
    why_not_entry=takes_any,
)
