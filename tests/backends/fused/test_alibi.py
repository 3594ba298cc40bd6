"""Slopes of ALiBi are found in masks, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.alibi import alibi_slopes

from resq_compiler.api import trace
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.views import Attention
from tests import families


def slopes_of(family):
    gm, _ = trace(families.small(family))
    (view, *_) = [Attention.require(n) for n in gm.graph.find_nodes(op="call_function", target=ops.attention)]
    return alibi_slopes(gm, view.mask, graph_tools.placeholders(gm.graph))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_slopes_of_four_heads_are_those_of_the_paper(family):
    """2^(-8 i / H); MPT's table ends at 256 positions."""
    torch.testing.assert_close(slopes_of(family), torch.tensor([2.0 ** (-2 * i) for i in range(1, 5)]))


def test_slopes_rounded_to_bfloat16_are_none():
    """Falcon rounds slope * position: beyond 256 that is a staircase, which no slope gives."""
    assert slopes_of("falcon-alibi") is None


def test_a_window_is_no_slope():
    gm, _ = trace(families.small("gemma3_text"))
    masks = gm.graph.find_nodes(op="call_function", target=ops.causal_mask)
    assert masks and all(alibi_slopes(gm, mask, graph_tools.placeholders(gm.graph)) is None for mask in masks)
