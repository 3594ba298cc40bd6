"""Attention with sinks, named and computed."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.api import trace
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import Attention, Rope
from tests.families import check_exact, small


def test_names_sinks_windows_and_rotary_embeddings_of_halves():
    gm, _ = trace(small("gpt_oss"))
    found = [Attention.require(node) for node in gm.graph.find_nodes(op="call_function", target=ops.attention)]
    assert [tuple(gm.get_buffer(str(view.sinks.target)).shape) for view in found] == [(4,), (4,)]
    assert all(Rope.of(view.q) is not None for view in found)
    assert not [n for n in gm.graph.find_nodes(op="call_function", target=aten.softmax.int) if n in found[0].node.users]


@pytest.mark.parametrize(("family", "with_sinks"), [("granite_swa", [True, True]), ("mimo_v2_flash", [False, True])])
def test_names_sinks_that_weigh_the_result_and_softmax_without_the_largest(family, with_sinks):
    """Granite: attention · sigmoid(logsumexp(scores) - sinks). MiMo: sinks in windows alone, softmax(scores - max) elsewhere."""
    gm, _ = trace(small(family))
    found = [Attention.require(n) for n in gm.graph.find_nodes(op="call_function", target=ops.attention)]
    assert [view.sinks is not None for view in found] == with_sinks
    check_exact(family)


def test_a_sink_takes_its_share_and_gives_nothing():
    torch.manual_seed(0)
    q, k, v, sinks = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(4)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool).tril(2)
    keys, held = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ keys.mT / 3).masked_fill(~mask, -torch.inf).exp()
    expected = scores @ held / (scores.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(ops.attention(q, k, v, mask, 1 / 3, None, sinks), expected)
