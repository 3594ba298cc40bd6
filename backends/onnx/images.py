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
from resq_compiler.backends.onnx.forms import FLT_MIN, CacheParts, low_and_scale
from resq_compiler.backends.onnx.plan import tiling_columns
from torch.fx import Node

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


def parts_image(low: Lowering, x: str, parts: CacheParts) -> str:
    """The image of x [..., D], each part (bits, start, stop) with a scale of its own; parts tile the D columns."""
    b = low.b
    with b.within("image"):
        if len(parts) > 1:
            sizes = [stop - start for _, start, stop in parts]
            pieces = b.op("Split", x, b.ints(*sizes), outputs=len(parts), axis=-1)
            scale = scale_columns(low, pieces, parts)
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
    return b.op(
        "Div", ranges, b.constant(np.repeat(np.array([2.0**bits - 1 for bits, *_ in parts], np.float32), sizes))
    )


def parts_of_heads(low: Lowering, sources: tuple[Node, ...]) -> tuple[Node, CacheParts] | None:
    """The value [B, H, S, D] whose columns the sources quantize head by head, and its parts; None when they are not that."""
    found: Node | None = None
    parts = []
    for node in sources:
        piece = columns_by_head(node)
        if piece is None or (found is not None and piece.args[0] is not found):
            return None
        found = piece.args[0]  # type: ignore[assignment]
        parts.append((int(node.args[1]), int(piece.args[1]), int(piece.args[2])))  # type: ignore[arg-type]
    width = int(found.meta["val"].shape[-1])  # type: ignore[union-attr]
    order = tiling_columns(found, width)  # type: ignore[arg-type]
    tiled = order is not None and [int(n.args[1]) for n in order] == [start for _, start, _ in parts]  # type: ignore[arg-type]
    return (found, tuple(parts)) if tiled else None  # type: ignore[return-value]


def columns_by_head(node: Node) -> Node | None:
    """c of quantize(merge_heads(c := columns(x, start, stop)), bits, groups = heads) when its whole range is kept."""
    if not is_call(node, ops.quantize):
        return None
    groups = node.args[2] if len(node.args) > 2 else node.kwargs.get("groups", 1)
    clip = node.args[3] if len(node.args) > 3 else node.kwargs.get("clip", 1.0)
    merged = node.args[0]
    if groups == 1 or clip != 1.0 or not is_call(merged, ops.merge_heads):
        return None
    piece = merged.args[0]  # type: ignore[union-attr]
    heads = int(piece.meta["val"].shape[1]) if is_call(piece, ops.columns) else 0  # type: ignore[union-attr]
    return piece if heads == groups else None  # type: ignore[return-value]
