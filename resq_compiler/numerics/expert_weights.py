"""Weights of experts as codes, expert by expert: [E, N, K], and scales [E, N]."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from resq_compiler.numerics.weights import QuantizedWeight, noise_of


def quantize_each(
    weights: Iterable[Tensor], quantize: Callable[[int, Tensor], list[QuantizedWeight]]
) -> list[QuantizedWeight]:
    """Quantize the weights [N, K] of one expert after the other; `quantize` takes an expert's number and its weight.

    Returns: a QuantizedWeight for each part, qdata [E, N, K_part], scale [E, N], of the most bits that an expert has.
    """
    each = [quantize(expert, weight) for expert, weight in enumerate(weights)]
    return [
        QuantizedWeight(
            torch.stack([part.qdata for part in parts]),
            torch.stack([part.scale for part in parts]),
            max(part.bits for part in parts),
            parts[0].group_size,
        )
        for parts in zip(*each, strict=True)
    ]


def relative_noise(part: QuantizedWeight, weights: Iterable[Tensor]) -> float:
    """Frobenius norm of what rounding changed, over that of the weights [N, K] of all experts; no more than one of them at a time."""
    return noise_of((part.qdata[i], part.scale[i], exact, part.group_size) for i, exact in enumerate(weights))
