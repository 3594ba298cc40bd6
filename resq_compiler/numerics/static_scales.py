"""Static scales of activations: one scale and zero point for all tokens, from calibration, as chips take them that have no dynamic ones."""

from __future__ import annotations

import torch
from torch import Tensor

from resq_compiler.errors import DataError
from resq_compiler.numerics.clip import SHARES
from resq_compiler.numerics.quantized import FLT_MIN, QuantSpec, dequantize, quantize_static


class Range:
    """Least and largest value of each group of columns over all tokens, zero included: [groups]. site: name used in messages."""

    def __init__(self, site: str, groups: int) -> None:
        self.site, self.groups = site, groups
        self.low, self.high = torch.zeros(groups), torch.zeros(groups)

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., width]. Raises DataError: x is not finite."""
        rows = x.detach().float().unflatten(-1, (self.groups, -1)).movedim(-2, 0).flatten(1)
        self.low, self.high = torch.minimum(self.low, rows.amin(1)), torch.maximum(self.high, rows.amax(1))
        if not bool((self.low.isfinite() & self.high.isfinite()).all()):
            raise DataError(f"range of {self.site}: not finite on the calibration data; check the model and the text")


class StaticSearch:
    """The share of a range that codes should cover: errors of every candidate, for each group, over all tokens seen."""

    def __init__(self, bits: int, seen: Range) -> None:
        self.bits, self.seen = bits, seen
        self.errors = torch.zeros(len(SHARES), seen.groups, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        """Add the tokens of x [..., width]."""
        rows = x.detach().float()
        for i, share in enumerate(SHARES):
            gap = dequantize(quantize_static(rows, self.bits, *self.scales(share))) - rows
            self.errors[i] += (
                gap.unflatten(-1, (self.seen.groups, -1)).double().square().sum((*range(gap.dim() - 1), -1))
            )

    def scales(self, share: Tensor | float) -> tuple[Tensor, Tensor]:
        """Scale float32 [groups] and zero point int32 [groups] of codes that cover a share of the range, of each group or of all."""
        spec = QuantSpec(self.bits, symmetric=False)
        low, high = self.seen.low * share, self.seen.high * share
        scale = ((high - low) / spec.levels).clamp_min(FLT_MIN)
        return scale, ((-low / scale).round() + spec.qmin).int()

    def best(self) -> tuple[Tensor, Tensor]:
        """The scales with the least error."""
        shares = torch.tensor(SHARES)[self.errors.argmin(0)]
        return self.scales(shares)
