"""Which positions a model of profile `native` gives logits for: the last token of every sequence, or as many as a client asks for.

A prompt's logits are thrown away but for the last token's, and in small models they are a third of a prefill. So the graph has an
input with a default, which clients that do not know it leave out:

    logits_to_keep  int64 [1], 1 unless given: logits of the last so many tokens; 0: of all new tokens

The last token of a sequence is the last one that attention_mask has not masked: some clients pad on the right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from resq_compiler.backends.fused import operators
from torch.fx import Node

from resq_compiler.ir import values
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Linear

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.native import NativeLowering

KEEP = "logits_to_keep"
ELEMENTWISE = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.contiguous.default,
)


def head_reader(logits: Node) -> tuple[Node, Node] | None:
    """(node, the float input [B, S, H] of it that lm_head is about), as early as selecting positions saves the product; None: not found.

    Between lm_head and the result there may be elementwise operators, as a soft-cap.
    """
    node = head_of(logits)
    if node is None:
        return None
    if node.target is operators.mixed_linear:
        return _quantized_head(node)
    linear = Linear.require(node)
    return None if len(values.shape(linear.x)) != 3 else (node, linear.x)


def head_of(logits: Node) -> Node | None:
    """The linear that makes the logits, on codes or not; None: not found."""
    node = logits
    while node.target in ELEMENTWISE:
        tensors = node.all_input_nodes
        if len(tensors) != 1 or len(tensors[0].users) != 1:
            return None
        (node,) = tensors
    return node if node.target is operators.mixed_linear or Linear.of(node) is not None else None


def _quantized_head(linear: Node) -> tuple[Node, Node] | None:
    """The quantizer of an integer lm_head, where nothing else reads its codes."""
    makers = {maker for piece in linear.all_input_nodes for maker in piece.all_input_nodes}
    maker = makers.pop() if len(makers) == 1 else None
    if maker is None or maker.target is not operators.norm_quantize:
        return None
    only = all(user is linear for piece in maker.users for user in piece.users)
    return (maker, maker.all_input_nodes[0]) if only else None


def emit_kept(low: NativeLowering, hidden: str) -> str:
    """[B, S, H] to [B, positions, H]."""
    keep = low.b.default_input(KEEP, np.array([1], np.int64))
    return low.fused("Keep", [hidden, "attention_mask", keep], [low.b.fresh("kept")])[0]
