"""Embeddings out of lm_head's codes: a model whose two tables were one needs only one of them.

Gains and bases make two tables of a tied one; each is a linear image of the other still, token by token

    embedding[t] ~ (scale[t] codes[t]) M,      M [K, d] by least squares over all tokens

so that M undoes what lm_head has of the last norm's gain and of the basis. How far that is from the table is measured before it is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from resq_compiler.backends.cpu.formats import TILE, unpack_weight
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import LOW_BITS
from torch import Tensor
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.views import Embedding

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.native import NativeLowering

log = logging.getLogger("resq_compiler")

FROM_HEAD = "lm_head"
FURTHEST = 0.05
"""Relative error, Frobenius, from which on tables are not taken for tied: 8-bit codes of the table itself have 0.01 to 0.02."""
ROUNDING = 1e-10
"""Of the mean square of a column, added to all: columns of zeros must not make the equations singular."""


def embeds_tokens(node: Node, ids: Node) -> bool:
    """Whether a node looks up the model's input_ids."""
    view = Embedding.of(node)
    return view is not None and view.ids is ids


def rows_of_head(low: NativeLowering, node: Node, head: Node | None) -> str:
    """What to take for an embedding [B, S, d]; head: the linear that makes the logits.

    Raises BackendError: lm_head is not one linear on 8-bit codes, or its table is no linear image of the embedding's.
    """
    if head is None or head.target is not operators.mixed_linear:
        raise BackendError(
            f"{_named()}: lm_head has no codes to read rows of; compile with lm_head_bits=8, or say embedding='int8'"
        )
    weight, scale, weight_bits, widths, groups = (cast("tuple[Any, ...]", head.args)[i] for i in (5, 6, 11, 12, 13))
    assert isinstance(weight, Node) and isinstance(scale, Node)
    view = Embedding.require(node)
    vocabulary, count = graph_tools.held(low.gm, view.table).shape[0], values.width(head)
    if len(weight_bits) != 1 or weight_bits[0] <= LOW_BITS or list(groups) != [1] or count != vocabulary:
        raise BackendError(
            f"{_named()}: expected an lm_head of one part in 5 to 8 bits with a scale a row, for {vocabulary} tokens; got parts of "
            f"{tuple(weight_bits)} bits with {tuple(groups)} scales a row, for {count} tokens; say embedding='int8'"
        )
    tiles, scales = graph_tools.get_tensor(low.gm, weight), graph_tools.get_tensor(low.gm, scale)[0]

    def rows(start: int, stop: int) -> Tensor:
        first = start // TILE
        codes = unpack_weight(tiles[first : -(-stop // TILE)], stop - first * TILE, widths[0], weight_bits[0])
        return codes[start - first * TILE :] * scales[start:stop, None]

    projection, error = image(rows, (torch.from_numpy(piece) for piece in low.chunks(view.table)))
    if not error <= FURTHEST:
        raise BackendError(
            f"{_named()}: rows of lm_head give those of the embedding with a relative error of {error:.2g}, expected at most "
            f"{FURTHEST:g}: the two are not tied; say embedding='int8'"
        )
    log.info("embedding from the rows of lm_head: relative error %.2g", error)
    inputs = [low.exact(view.ids), low.tiles(weight), low.exact(scale)]
    (found,) = low.fused("Rows", inputs, [low.b.fresh("rows")], high_width=widths[0])
    return low.b.op("MatMul", found, low.b.constant(projection, name=f"{node.name}.from_{FROM_HEAD}"))


def image(rows: Callable[[int, int], Tensor], pieces: Iterable[Tensor]) -> tuple[np.ndarray, float]:
    """M [K, d] float32 that minimizes |rows M - table|, and the relative error. rows(i, j): [j - i, K]; pieces: the table [V, d], some
    rows at a time, as both are large."""
    start, size = 0, 0.0
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for piece in pieces:
        known, wanted = rows(start, start + len(piece)).double(), piece.double()
        gram, cross = gram + known.T @ known, cross + known.T @ wanted
        size += float(wanted.square().sum())
        start += len(piece)
    assert isinstance(gram, Tensor) and isinstance(cross, Tensor)
    gram.diagonal().add_(ROUNDING * gram.diagonal().mean())
    found = torch.linalg.solve(gram, cross)
    left = max(0.0, size - float((found * cross).sum()))
    return found.float().numpy(), (left / size) ** 0.5 if size else 0.0


def _named() -> str:
    return f"export_onnx: embedding={FROM_HEAD!r}"
