"""Which positions a model of profile `native` gives logits for: the last token of every sequence, or as many as a client asks for.

A prompt's logits are thrown away but for the last token's, and in small models they are a third of a prefill. So the graph has an
input with a default, which clients that do not know it leave out:

    logits_to_keep  int64 [1], 1 unless given: logits of the last so many tokens; 0: of all new tokens

The last token of a sequence is the last one that attention_mask has not masked: some clients pad on the right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.fused import operators
from torch.fx import Node

from resq_compiler.ir import values
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Linear

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering

KEEP = "logits_to_keep"
TO_THE_END = int(np.iinfo(np.int64).max)
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


def emit_kept(low: Lowering, hidden: str) -> str:
    """[B, S, H] to [B, positions, H]."""
    b = low.b
    keep = b.default_input(KEEP, np.array([1], np.int64))
    new, everything = low.size("input_ids", 1), b.op("Equal", keep, b.ints(0))
    seen = b.op("Slice", "attention_mask", b.op("Neg", new), b.ints(TO_THE_END), b.ints(1))
    last = b.op("ArgMax", b.op("Cast", seen, to=TensorProto.INT32), axis=1, keepdims=1, select_last_index=1)  # [B, 1]
    count = b.op("Where", everything, new, b.op("Min", keep, new))
    behind = b.op("Where", everything, new, b.op("Add", last, b.ints(1)))
    steps = b.op("Range", b.constant(np.int64(0)), b.op("Squeeze", count, b.ints(0)), b.constant(np.int64(1)))
    position = b.op("Max", b.op("Add", b.op("Sub", behind, count), steps), b.ints(0))  # [B, positions]
    return b.op("GatherND", hidden, b.op("Unsqueeze", position, b.ints(-1)), batch_dims=1)
