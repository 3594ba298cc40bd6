"""Weights whose scales are learned: shares of the range of every row, or of every group of its columns, and of both parts.

    scale = sigmoid(p) · max|w| / (2^(b-1) - 1)

Source: learnable weight clipping of OmniQuant, arXiv 2308.13137, section 3.2. Differs: weights are symmetric, so one share for both ends,
and it starts where the search of scale_search.py ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from resq_compiler.ir import meta
from resq_compiler.ir.views import Linear
from resq_compiler.learning import straight_through as ste
from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec
from resq_compiler.numerics.weights import QuantizedWeight, part_scale, round_to_codes


@dataclass(frozen=True)
class CodedPart:
    """A part of a linear that gets codes."""

    node: Node
    bits: int
    group_size: int | None

    @property
    def target(self) -> str:
        """The name of its weight."""
        return str(Linear.require(self.node).weight.target)


class ClippedWeights(nn.Module):
    """Shares for the parts of some linears; `tensor` gives the float image of the codes of a weight that a run asks for."""

    def __init__(self, gm: GraphModule, parts: list[CodedPart]):
        super().__init__()
        self.parts = {part.target: part for part in parts}
        self.shares = nn.ParameterDict()
        for part in parts:
            weight = Linear.require(part.node).weight_tensor(gm)
            whole = largest(weight, part.group_size).clamp_min(FLT_MIN) / QuantSpec(part.bits).qmax
            share = part_scale(weight, part.bits, part.group_size) / whole
            self.shares[key_of(part.target)] = nn.Parameter(share.clamp(0.1, 0.99).logit())

    def scale(self, target: str, weight: Tensor) -> Tensor:
        """Scales of a weight [N], or [N, groups]."""
        part = self.parts[target]
        share = self.shares[key_of(target)].sigmoid()
        return (share * largest(weight, part.group_size) / QuantSpec(part.bits).qmax).clamp_min(FLT_MIN)

    def tensor(self, target: str, weight: Tensor) -> Tensor:
        """The image of a weight's codes; other tensors as they are."""
        if target not in self.parts:
            return weight
        part = self.parts[target]
        return ste.weight_image(weight, self.scale(target, weight), part.bits, part.group_size)

    @torch.no_grad()
    def codes(self, target: str, weight: Tensor) -> QuantizedWeight:
        """What was learned, as codes."""
        part = self.parts[target]
        scale = self.scale(target, weight)
        return QuantizedWeight(
            round_to_codes(weight, scale, part.bits, part.group_size), scale, part.bits, part.group_size
        )


def largest(weight: Tensor, group_size: int | None) -> Tensor:
    """The largest magnitude of every row [N], or of every group of its columns [N, groups]."""
    if group_size is None:
        return weight.abs().amax(1)
    return torch.stack([piece.abs().amax(1) for piece in weight.split(group_size, 1)], 1)


def key_of(target: str) -> str:
    """A name that torch takes for a parameter."""
    return target.replace(".", "/")


def coded_parts(nodes: list[Node], group_size: int | None) -> list[CodedPart]:
    """The parts of linears with float weights that are to have codes."""
    found = []
    for node in nodes:
        fact = meta.get(node, meta.LinearPart)
        if fact is not None and fact.weight_bits < 16 and Linear.of(node) is not None:
            found.append(CodedPart(node, fact.weight_bits, group_size))
    return found
