"""What folding the gain of a norm into the linears behind it costs: the value is then quantized before its gain, not behind it.

    before:   n = norm(x) without gain;   error e(n), which the linears see times the gain g
    behind:   n g;                        error e(n g)

Where a gain puts down channels that are far larger than the others, the range before the gain is theirs alone. Both errors are estimated as
a rotated basis leaves them: channels in two parts, the ones with most energy at 8 bits, the others at 4; inside a part all alike, each with
the part's mean energy times 4^-bits of error. The linears see every channel by the energy of the weights that read it.

Source of 4^-bits: the error of a uniform quantizer falls by 6 dB a bit (as in rate-distortion theory).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.topology import ReadGroup
from resq_compiler.ir import graph_tools
from resq_compiler.ir.expert_views import matrices
from resq_compiler.ir.views import Linear, Norm
from resq_compiler.util import devices

LOW_BITS, HIGH_BITS = 4, 8


@dataclass
class FoldingCost:
    """dB that folding costs at what a group of linears reads, mean over tokens; `see` takes the norm's input.

    weight: energy of the weights that read each channel [d]. high: share of columns at 8 bits.
    """

    gain: Tensor
    bias: Tensor | None
    subtracts_mean: bool
    weight: Tensor
    high: float
    tokens: int = 0
    total: float = 0.0

    @classmethod
    def of(cls, gm: GraphModule, group: ReadGroup, high: float) -> FoldingCost | None:
        """None where the group reads through no gain."""
        norm = Norm.of(group.norm)
        if norm is None or norm.gain is None:
            return None
        bias = None if norm.bias is None else devices.here(graph_tools.get_tensor(gm, norm.bias)).double()
        weights = (w for linear in group.linears for w in matrices(gm, Linear.require(linear)))
        read = [devices.here(weight).double().square().sum(0) for weight in weights]
        gain = devices.here(graph_tools.get_tensor(gm, norm.gain)).double()
        return cls(gain, bias, norm.subtracts_mean, torch.stack(read).sum(0), high)

    def see(self, x: Tensor) -> None:
        """Add the tokens of x [..., d]."""
        rows = x.flatten(0, -2).double()
        rows = rows - rows.mean(-1, keepdim=True) if self.subtracts_mean else rows
        tiny = torch.finfo(torch.float64).tiny
        bare = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(tiny)
        whole = bare * self.gain if self.bias is None else bare * self.gain + self.bias
        before = seen_error(bare, self.weight * self.gain.square(), self.high)
        behind = seen_error(whole, self.weight, self.high)
        self.total += float((10 * (before.clamp_min(tiny) / behind.clamp_min(tiny)).log10()).sum())
        self.tokens += len(rows)

    @property
    def lost(self) -> float:
        """dB that folding costs."""
        return self.total / max(1, self.tokens)


def seen_error(x: Tensor, weight: Tensor, high: float) -> Tensor:
    """Energy of the error of each row of x [tokens, d] at the outputs of linears that read channels with energies `weight` [d]."""
    order = x.square().sum(0).argsort(stable=True)
    border = x.shape[-1] - round(high * x.shape[-1])
    parts = ((order[:border], LOW_BITS), (order[border:], HIGH_BITS))
    errors = [4.0**-bits * x[:, part].square().mean(-1) * weight[part].sum() for part, bits in parts if len(part)]
    return torch.stack(errors).sum(0)
