"""Float images of codes that no integer product reads: cache entries, and inputs with one scale for each head.

    image = rint(x / scale) scale,   all parts of all heads in one division, rounding and multiplication

The law's image is (clamp(rint(x / scale) + zp, 0, 2^b - 1) - zp) scale. The zero point cancels wherever the clamp does nothing. With the
whole range kept (clip 1) that is everywhere but at one place: where hi / scale and -lo / scale are both odd multiples of 1/2, or
round to one, both round up, and the largest value of the row gets one step more than the law gives. That takes a range symmetric to
the last bit or a coincidence of about one in two million.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from resq_compiler.backends.onnx.forms import FLT_MIN, low_and_scale
from resq_compiler.backends.onnx.plan import tiling_columns
from torch.fx import Node

from resq_compiler.ir import values
from resq_compiler.ir.views import CacheParts, Columns, MergeHeads, Quantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


def parts_image(low: Lowering, x: str, parts: CacheParts) -> str:
    """The image of x [..., D], each part (bits, start, stop) with a scale of its own; parts tile the D columns."""
    b = low.b
    with b.within("image"):
        if len(parts) > 1:
            scale = scale_columns(low, b.split(x, [stop - start for _, start, stop in parts]), parts)
        else:
            _, scale = low_and_scale(low, x, parts[0][0], 1.0)
        return b.op("Mul", b.op("Round", b.op("Div", x, scale)), scale)


def scale_columns(low: Lowering, pieces: list[str], parts: CacheParts) -> str:
    """The scale of every column, [..., D]: hi - lo of each part, spread over its columns by one product with -1, 0 and 1."""
    b, count = low.b, len(parts)
    ends = [b.op(kind, piece, b.ints(-1), keepdims=1) for kind in ("ReduceMin", "ReduceMax") for piece in pieces]
    floor = (2.0 ** max(bits for bits, *_ in parts) - 1) * FLT_MIN
    most = b.constant(np.array([0.0] * count + [np.inf] * count, np.float32))
    least = b.constant(np.array([-np.inf] * count + [floor] * count, np.float32))
    ends_joined = b.op("Max", b.op("Min", b.op("Concat", *ends, axis=-1), most), least)
    sizes = [stop - start for _, start, stop in parts]
    spread = np.repeat(np.eye(count, dtype=np.float32), sizes, axis=1)
    ranges = b.op("MatMul", ends_joined, b.constant(np.concatenate([-spread, spread])))
    levels = np.array([2.0**bits - 1 for bits, *_ in parts], np.float32)
    return b.op("Div", ranges, b.constant(np.repeat(levels, sizes)))


def parts_of_heads(low: Lowering, sources: tuple[Node, ...]) -> tuple[Node, CacheParts] | None:
    """The value [B, H, S, D] whose columns the sources quantize head by head, and its parts; None when they are not that."""
    quantizers = [Quantize.of(node) for node in sources]
    pieces = [None if quantizer is None else columns_by_head(quantizer) for quantizer in quantizers]
    found = pieces[0].x if pieces and pieces[0] is not None else None
    parts: list[tuple[int, int, int]] = []
    for quantizer, piece in zip(quantizers, pieces, strict=True):
        if quantizer is None or piece is None or piece.x is not found:
            return None
        parts.append((quantizer.bits, piece.start, piece.stop))
    if found is None:
        return None
    order = tiling_columns(found, values.width(found))
    tiled = order is not None and [piece.start for piece in order] == [start for _, start, _ in parts]
    return (found, tuple(parts)) if tiled else None


def columns_by_head(quantizer: Quantize) -> Columns | None:
    """c of quantize(merge_heads(c := columns(x, start, stop)), bits, groups = heads) when its whole range is kept."""
    merged = MergeHeads.of(quantizer.x)
    if quantizer.groups == 1 or quantizer.clip != 1.0 or merged is None:
        return None
    piece = Columns.of(merged.x)
    return piece if piece is not None and int(values.shape(piece.node)[1]) == quantizer.groups else None
