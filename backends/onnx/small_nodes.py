"""The small standard nodes around the blocks of a model, as operators of the domain `resq` that can be steps of a chain (chain.py): what
such a node computes takes less time than ONNX Runtime needs to come to it. Nodes of another form stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper, numpy_helper
from resq_compiler.backends.onnx.chain import DOMAIN

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.builder import GraphBuilder

Made = tuple[str, list[str]]
"""An operator and its inputs."""


def joined(b: GraphBuilder) -> list[onnx.NodeProto]:
    """The nodes of a graph, small ones as operators of the domain; what nobody reads any more is still among them."""
    return list(Joining(b).run())


class Joining:
    """The walk over the nodes of a graph."""

    def __init__(self, b: GraphBuilder):
        self.nodes = b.nodes
        self.constants = {tensor.name: tensor for tensor in b.initializers}
        self.makers = {name: node for node in b.nodes for name in node.output}
        self.same: dict[str, str] = {}  # what to read in place of a value

    def run(self) -> Iterator[onnx.NodeProto]:
        """All nodes in order."""
        for node in self.nodes:
            inputs = [self.same.get(name, name) for name in node.input]
            node.input[:] = inputs
            before = self.unsqueezed(node)
            if before is not None:
                self.same[node.output[0]] = before
            made = self.seen(node) or self.angles(node) or self.embedding(node)
            yield node if made is None else helper.make_node(*made, node.output, name=node.name, domain=DOMAIN)

    def maker(self, name: str, kind: str, **attributes: Any) -> onnx.NodeProto | None:
        """The standard node of that kind, with these attributes and no others, that makes a value."""
        node = self.makers.get(name)
        if node is None or node.op_type != kind or node.domain:
            return None
        return node if {a.name: helper.get_attribute_value(a) for a in node.attribute} == attributes else None

    def number(self, name: str) -> list[int] | int | None:
        """The value of a small integer constant."""
        tensor = self.constants.get(name)
        if not isinstance(tensor, onnx.TensorProto) or tensor.data_type != TensorProto.INT64:
            return None
        return numpy_helper.to_array(tensor).tolist()

    def element(self, name: str, rank: int) -> int | None:
        """The element type of a constant of that rank."""
        tensor = self.constants.get(name)
        if tensor is None or len(tensor.dims) != rank:
            return None
        return tensor.data_type if isinstance(tensor, onnx.TensorProto) else tensor.element

    def unsqueezed(self, node: onnx.NodeProto) -> str | None:
        """x of Squeeze(Unsqueeze(x)) on the same one axis, if not negative."""
        if self.maker(node.output[0], "Squeeze") is None or len(node.input) != 2:
            return None
        before, axes = self.maker(node.input[0], "Unsqueeze"), self.number(node.input[1])
        if before is None or not isinstance(axes, list) or len(axes) != 1 or axes[0] < 0:
            return None
        return before.input[0] if self.number(before.input[1]) == axes else None

    def seen(self, node: onnx.NodeProto) -> Made | None:
        """Not(Equal(attention_mask, 0))."""
        equal = self.maker(node.input[0], "Equal") if self.maker(node.output[0], "Not") is not None else None
        if equal is None or equal.input[0] != "attention_mask" or self.number(equal.input[1]) != 0:
            return None
        return "Seen", ["attention_mask"]

    def angles(self, node: onnx.NodeProto) -> Made | None:
        """Twice position_ids times the frequencies [R / 2], side by side."""
        if self.maker(node.output[0], "Concat", axis=-1) is None or len(node.input) != 2 or len(set(node.input)) != 1:
            return None
        product = self.maker(node.input[0], "Mul")
        cast = product and self.maker(product.input[0], "Cast", to=TensorProto.FLOAT)
        column = cast and self.maker(cast.input[0], "Unsqueeze")
        if product is None or column is None or column.input[0] != "position_ids":
            return None
        usual = self.number(column.input[1]) in ([2], [-1]) and self.element(product.input[1], 1) == TensorProto.FLOAT
        return ("Angles", ["position_ids", product.input[1]]) if usual else None

    def embedding(self, node: onnx.NodeProto) -> Made | None:
        """Rows of 8-bit codes times their scales."""
        if self.maker(node.output[0], "Mul") is None:
            return None
        cast, scale = (
            self.maker(node.input[0], "Cast", to=TensorProto.FLOAT),
            self.maker(node.input[1], "Gather", axis=0),
        )
        codes = cast and self.maker(cast.input[0], "Gather", axis=0)
        if not codes or not scale or {codes.input[1], scale.input[1]} != {"input_ids"}:
            return None
        fits = (
            self.element(codes.input[0], 2) == TensorProto.INT8 and self.element(scale.input[0], 2) == TensorProto.FLOAT
        )
        return ("Embed", ["input_ids", codes.input[0], scale.input[0]]) if fits else None
