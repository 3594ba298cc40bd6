"""Slopes of ALiBi, found by what a mask computes: it adds slope * (position of the key - position of the query) to each head's scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.frontend.capture import concrete_example
from resq_compiler.ir import graph_tools, ops, values

LONG = (
    (3, 300),
    (3, 120),
)  # new tokens, past: a slope that was rounded to bfloat16 shows beyond 256, where a model has as many positions
SHORT = ((5, 7), (6, 0))
UNSEEN = -1e4


@torch.no_grad()
def alibi_slopes(gm: GraphModule, mask: Node, inputs: list[Node]) -> Tensor | None:
    """The slope of every head [H] float32 when `mask` is a causal mask with these; None when it is anything else.

    Args:    inputs: of the graph: input_ids, attention_mask, position_ids, then the cache's.
    """
    found = next((probe for size in LONG if (probe := _probe(gm, mask, inputs, *size)) is not None), None)
    probes = [found, *(_probe(gm, mask, inputs, *size) for size in SHORT)]
    if found is None or any(probe is None for probe in probes):
        return None
    last = found.value[-1, :, -1]  # no padding in this row, and it sees everything
    slopes = (last[:, -1] - last[:, 0]) / (last.shape[-1] - 1)
    return slopes if all(probe is not None and probe.agrees(slopes) for probe in probes) else None


@dataclass(frozen=True)
class _Probe:
    """A mask's value [B, H, S, T] on two rows, one of them padded, and the keys that are visible [B, 1, S, T]."""

    value: Tensor
    visible: Tensor

    def agrees(self, slopes: Tensor) -> bool:
        """Whether it is, up to a number for each query, slope * distance where a key is visible, and very low elsewhere."""
        new, total = self.value.shape[-2:]
        distance = torch.arange(total) - torch.arange(total - new, total)[:, None]
        own = self.value.diagonal(total - new, -2, -1)[..., None]
        difference = (self.value - own - slopes[:, None, None] * distance).masked_fill(~self.visible, 0.0)
        hidden = self.value.masked_fill(self.visible, UNSEEN)
        return bool((hidden <= UNSEEN).all()) and float(difference.abs().max()) <= 1e-5 * total * float(
            slopes.abs().max()
        )


def _probe(gm: GraphModule, mask: Node, inputs: list[Node], new: int, past: int) -> _Probe | None:
    """None when the mask has no value of float32 for each head here."""
    ids, attention_mask, positions = concrete_example(2, (), new=new, past=past)
    shapes = [values.shape(node) for node in inputs[3:]]
    entries = [torch.zeros(1).expand(2, int(s[1]), past, int(s[3])) for s in shapes]
    env: dict[Node, Any] = dict(zip(inputs, (ids, attention_mask, positions, *entries), strict=True))
    visible = ops.causal_mask(attention_mask, ids)
    try:
        value = graph_tools.evaluate(gm, mask, env)
    except RuntimeError:
        return None
    fits = value.dim() == 4 and value.dtype == torch.float32 and value.shape[2:] == visible.shape[2:]
    return _Probe(value.expand(2, -1, -1, -1), visible) if fits else None
