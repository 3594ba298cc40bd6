"""The quantized graph that a lowered one was made from, without a second copy of its weight codes.

A lowered graph holds every code once, packed. What else needs the quantized graph (saving, exporting, another backend, reports) gets
it back exactly: the codes are unpacked from the lowered graph's tensors when somebody asks, and belong to who asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from resq_compiler.backends.fused.experts import ExpertCodesAt
from resq_compiler.backends.fused.formats import CodeFormat, InputPart
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.ir import graph_tools


@dataclass(frozen=True)
class CodesAt:
    """Where the codes of one weight are: output rows start:stop of the packed tensor `tensor`."""

    tensor: str
    part: InputPart
    start: int
    stop: int

    def unpack(self, code_format: CodeFormat, packed: Tensor) -> Tensor:
        """The codes, int8."""
        return code_format.unpack_weight(packed, self.part, self.start, self.stop)


class QuantizedSource:
    """Graph and tensors of a quantized graph, except the weight codes that a lowered graph holds packed."""

    def __init__(self, gm: GraphModule, places: Mapping[str, CodesAt | ExpertCodesAt], codes: CodeFormat):
        names = {str(node.target): node for node in gm.graph.find_nodes(op="get_attr")}
        self.graph, self.codes = graph_tools.copy_graph(gm.graph), codes
        self.places = {name: at for name, at in places.items() if name in names}
        self.tensors = {n: graph_tools.get_tensor(gm, node) for n, node in names.items() if n not in self.places}

    def restored(self, lowered: GraphModule) -> GraphModule:
        """The quantized graph, on the device of the lowered one; equal to the one it was made from, bit for bit."""
        packed = {str(node.target): node for node in lowered.graph.find_nodes(op="get_attr")}
        tensors: dict[str, Tensor] = {}
        for name, at in self.places.items():
            tensor = graph_tools.get_tensor(lowered, packed[at.tensor])
            tensors[name] = at.unpack(self.codes, tensor).contiguous()
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        tensors |= {name: t.to(device) for name, t in self.tensors.items()}
        return GraphModule(tensors, graph_tools.copy_graph(self.graph))
