"""Rows of a weight, quantized by several processes: each takes as many, and all have the codes of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.weights import QuantizedWeight
from resq_compiler.util import processes


def quantize_shared(
    weight: Tensor, parts: Sequence[Part], group_size: int | None, quantize: Callable[[Tensor], list[QuantizedWeight]]
) -> list[QuantizedWeight]:
    """Codes of a weight [N, K], part by part; `quantize` takes any of its rows, each of which is quantized for itself."""
    shared = processes.current()
    if shared.size == 1:
        return quantize(weight)
    mine = shared.rows(len(weight))
    made = quantize(weight[mine]) if mine.stop > mine.start else []
    return [
        _joined(weight, part, group_size, made[i] if made else None, shared.join_rows) for i, part in enumerate(parts)
    ]


def _joined(
    weight: Tensor, part: Part, group_size: int | None, mine: QuantizedWeight | None, join: Callable[[Tensor], Tensor]
) -> QuantizedWeight:  # fmt: skip
    """The rows of all processes, from those of this one, if it has any."""
    groups = () if group_size is None else (-(-part.width // group_size),)
    qdata = weight.new_empty(len(weight), part.width, dtype=torch.int8)
    scale = weight.new_empty(len(weight), *groups, dtype=torch.float32)
    if mine is not None:
        here = processes.current().rows(len(weight))
        qdata[here], scale[here] = mine.qdata, mine.scale
    return QuantizedWeight(join(qdata), join(scale), part.bits, group_size)
