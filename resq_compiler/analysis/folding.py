"""What folding the gain of a norm into the linears behind it costs: the value is then quantized before its gain, not behind it.

    before:   n = norm(x) without gain;   error e(n), which the linears see times the gain g
    behind:   n g;                        error e(n g)

Both are codes of 8 bits with one scale for a token, and both are measured as the linears see them: every channel counts by the energy of
the weights that read it. Where a gain puts down channels that are far larger than the others, the range before the gain is theirs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.topology import ReadGroup
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.expert_views import matrices
from resq_compiler.ir.views import Linear, Norm
from resq_compiler.util import devices

BITS = 8


@dataclass
class FoldingCost:
    """Signal to noise in dB, mean over tokens, of the values that a group of linears reads; `see` takes the norm's input."""

    gain: Tensor
    bias: Tensor | None
    subtracts_mean: bool
    weight: Tensor
    tokens: int = 0
    before: float = 0.0
    behind: float = 0.0

    @classmethod
    def of(cls, gm: GraphModule, group: ReadGroup) -> FoldingCost | None:
        """None where the group reads through no gain."""
        norm = Norm.of(group.norm)
        if norm is None or norm.gain is None:
            return None
        bias = None if norm.bias is None else devices.here(graph_tools.get_tensor(gm, norm.bias)).double()
        weights = (w for linear in group.linears for w in matrices(gm, Linear.require(linear)))
        read = [devices.here(weight).double().square().sum(0) for weight in weights]
        gain = devices.here(graph_tools.get_tensor(gm, norm.gain)).double()
        return cls(gain, bias, norm.subtracts_mean, torch.stack(read).sum(0))

    def see(self, x: Tensor) -> None:
        """Add the tokens of x [..., d]."""
        rows = x.flatten(0, -2).double()
        rows = rows - rows.mean(-1, keepdim=True) if self.subtracts_mean else rows
        bare = rows / rows.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        whole = bare * self.gain if self.bias is None else bare * self.gain + self.bias
        self.before += float(self._decibels(whole, error(bare) * self.gain).sum())
        self.behind += float(self._decibels(whole, error(whole)).sum())
        self.tokens += len(rows)

    def _decibels(self, signal: Tensor, noise: Tensor) -> Tensor:
        power, lost = (self.weight * signal.square()).sum(-1), (self.weight * noise.square()).sum(-1)
        tiny = torch.finfo(torch.float64).tiny
        return 10 * (power.clamp_min(tiny) / lost.clamp_min(tiny)).log10()

    @property
    def lost(self) -> float:
        """dB that folding costs."""
        return (self.behind - self.before) / max(1, self.tokens)


def error(x: Tensor) -> Tensor:
    """What quantizing rows changes."""
    return ops.quantize_dequantize(x, ((BITS, 0, x.shape[-1]),)) - x
