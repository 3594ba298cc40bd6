"""Codes of weights that are learned: values between codes, whose nearest codes the model computes with.

    q = rint(v), v held inside the range of codes; gradients pass rint and move v

At first v lies anywhere in the cell of its code, drawn at random: then every step changes some codes, and their mean moves as v does. All
in the middle, nothing would change for many steps, and then all codes at once.

Source: the straight-through estimator (arXiv 1308.3432), from the codes of GPTQ on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from resq_compiler.calibration import precision
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.views import CodedLinear
from resq_compiler.learning import straight_through as ste
from resq_compiler.learning.clipped_weights import key_of
from resq_compiler.numerics.quantized import QuantSpec
from resq_compiler.numerics.seeds import generator


class LearnedCodes(nn.Module):
    """A value for every code of some linears on codes; `tensor` gives the codes that a run asks for."""

    def __init__(self, gm: GraphModule, nodes: list[Node], seed: int):
        super().__init__()
        self.names: dict[str, str] = {}
        self.specs: dict[str, QuantSpec] = {}
        self.values = nn.ParameterDict()
        for node in nodes:
            coded = CodedLinear.require(node)
            target = str(coded.qdata.target)
            name = key_of(target)
            self.names[target], self.specs[name] = name, QuantSpec(meta.require(node, meta.LinearPart).weight_bits)
            inside = torch.rand(coded.codes(gm).shape, generator=generator(seed, f"codes of {target}")).sub_(0.5)
            self.values[name] = nn.Parameter(inside.mul_(0.9999).add_(coded.codes(gm)))

    @torch.no_grad()
    def begin(self) -> None:
        """Hold values inside the range of their codes."""
        for name, value in self.values.items():
            value.clamp_(self.specs[name].qmin, self.specs[name].qmax)

    def tensor(self, target: str, codes: Tensor) -> Tensor:
        """Codes as they are learned so far, in the dtype of linears, which holds them exactly; other tensors as they are."""
        return ste.codes(self.values[self.names[target]], precision.dtype()) if target in self.names else codes

    @torch.no_grad()
    def write(self, gm: GraphModule) -> None:
        """Put what was learned into the graph."""
        for target, name in self.names.items():
            graph_tools.set_tensor(gm, target, self.values[name].round().to(torch.int8))
