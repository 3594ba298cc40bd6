"""Weights of experts as codes, expert by expert: [E, N, K], and scales [E, N]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resq_compiler.numerics.quantized import column_scales
from resq_compiler.numerics.weights import QuantizedWeight


def quantize_each(
    weights: Sequence[Tensor], quantize: Callable[[int, Tensor], list[QuantizedWeight]]
) -> list[QuantizedWeight]:
    """Quantize expert by expert the rows of several linears [E, N, K] stacked; `quantize` takes an expert's number and its rows [N, K].

    Returns: a QuantizedWeight for each part, qdata [E, N, K_part], scale [E, N].
    """
    result: list[QuantizedWeight] = []
    for expert in range(len(weights[0])):
        parts = quantize(expert, torch.cat([weight[expert] for weight in weights]))
        result = result or [_empty(part, len(weights[0])) for part in parts]
        for whole, part in zip(result, parts, strict=True):
            whole.qdata[expert], whole.scale[expert] = part.qdata, part.scale
    return result


def _empty(part: QuantizedWeight, experts: int) -> QuantizedWeight:
    return QuantizedWeight(
        part.qdata.new_empty(experts, *part.qdata.shape),
        part.scale.new_empty(experts, *part.scale.shape),
        part.bits,
        part.group_size,
    )


def relative_noise(part: QuantizedWeight, weight: Tensor) -> float:
    """Frobenius norm of what rounding changed, over that of the weight [E, N, K]; no more than one expert at a time in float64."""
    lost = kept = 0.0
    for codes, scale, exact in zip(part.qdata, part.scale, weight, strict=True):
        wide = exact.to(codes.device).double()
        lost += float((codes * column_scales(scale, codes.shape[1], part.group_size) - wide).square().sum())
        kept += float(wide.square().sum())
    return (lost / max(kept, torch.finfo(torch.float64).tiny)) ** 0.5
