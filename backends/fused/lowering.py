"""The state of one lowering: the graph, the inputs that layers share, what was replaced and what was left."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from resq_compiler.backends.fused.experts import ExpertCodesAt
from resq_compiler.backends.fused.formats import HeadParts, InputPart
from resq_compiler.backends.fused.patterns import part_of
from resq_compiler.backends.fused.source import CodesAt
from resq_compiler.backends.fused.target import Target
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.views import Quantize

aten = torch.ops.aten


@dataclass(frozen=True)
class CodesNodes:
    """Quantized activations in the graph: their parts and the four values of formats.Codes."""

    parts: tuple[InputPart, ...]
    values: tuple[Node, Node, Node, Node]


@dataclass(frozen=True)
class AttentionSite:
    """An attention that was replaced: arguments of its operator, and how its values are split."""

    arguments: tuple
    values: HeadParts


class Lowering:
    """reasons: quantized nodes that no operator takes.    left: float nodes that PyTorch computes though an operator could have.

    caches: key and value parts of each layer, None where its cache is float.    heads: heads and columns of each cache input.
    places: where weight codes went.    mixtures: why no operator takes the experts that these indices choose.
    weight_bits: of the widest weights that are multiplied with what a quantizer makes, where a target
    packs these apart.    later: weights are packed when somebody asks for them.
    """

    def __init__(self, gm: GraphModule, target: Target, dtype: torch.dtype, later: bool):
        self.gm, self.graph, self.target, self.dtype, self.later = gm, gm.graph, target, dtype, later
        self.made_by = f"lower-{target.name}"
        self.reasons: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.places: dict[str, CodesAt | ExpertCodesAt] = {}
        self.mixtures: dict[Node | None, str] = {}
        self.weight_bits: dict[Node, int] = {}
        self.codes: dict[object, list[CodesNodes]] = {}
        self.attention_sites: dict[Node, AttentionSite] = {}
        self.inputs = graph_tools.placeholders(gm.graph)
        self.ids, self.mask, self.positions, *self.cache_inputs = self.inputs
        shapes = [values.shape(node) for node in self.cache_inputs]
        self.heads = [(int(shape[1]), int(shape[3])) for shape in shapes]
        self.caches: list[tuple[HeadParts, HeadParts] | None] = [None] * (len(self.cache_inputs) // 2)
        self.start = self._input_after_positions("cache_start")
        self.table = self._input_after_positions("cache_table") if target.cache.table_input else None
        self._visible: Node | None = None
        self._replaced: dict[Node, Node] = {}

    def _input_after_positions(self, name: str) -> Node:
        with self.graph.inserting_after(self.positions):
            return self.graph.placeholder(name)

    def emit(self, target: Callable, args: tuple, like: Node) -> Node:
        """A new call at the insertion point."""
        return graph_tools.emit(self.graph, target, args, like, self.made_by)

    def codes_of(self, node: Node, parts: tuple[InputPart, ...]) -> CodesNodes:
        """The four results of a quantizing operator."""
        low, high, scale, zero_point = (self.emit(operator.getitem, (node, i), node) for i in range(4))
        return CodesNodes(parts, (low, high, scale, zero_point))

    def part_of(self, quantizer: Quantize) -> InputPart:
        """What a quantizer makes."""
        return part_of(quantizer, self.weight_bits.get(quantizer.node, 0))

    def tensor(self, target: str, value: Tensor) -> Node:
        """A new tensor of the graph."""
        return graph_tools.add_tensor(self.gm, target, value, self.made_by)

    def value_of(self, node: Node) -> Tensor:
        """The tensor behind a get_attr node."""
        return graph_tools.get_tensor(self.gm, node)

    def replace(self, old: Node, new: Node) -> None:
        """Put a node in the place of another of the same shape."""
        self._replaced[old] = graph_tools.replace(old, new)

    def current(self, node: Node | None) -> Node | None:
        """What a node is by now: it may have been replaced."""
        return None if node is None else self._replaced.get(node, node)

    def visible(self) -> Node:
        """attention_mask != 0, made once."""
        if self._visible is None:
            last = graph_tools.placeholders(self.graph)[-1]
            with self.graph.inserting_after(last):
                self._visible = self.emit(aten.ne.Scalar, (self.mask, 0), last)
        return self._visible
