"""How often a compiled mixture routes otherwise."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.api import trace
from resq_compiler.inspection import routing
from resq_compiler.tiny import tiny_tokens
from tests.families import small


def test_counts_choices_and_not_their_order():
    gm, ctx = trace(small("mixtral"))
    topology = ctx.facts.get(routing.Topology)
    ids = tiny_tokens(2, 16)
    before = routing.record(gm, ids)
    (_, _, experts), *_ = topology.mixtures
    assert before[experts.indices].shape == (32, 2)
    assert routing.findings(gm, ids, before, topology)[0].startswith("routing: 0.0 % of the choices")
    flipped = {node: value.flip(1) for node, value in before.items()}
    assert routing.findings(gm, ids, flipped, topology)[0].startswith("routing: 0.0 %")
    one, other = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 1]])
    assert routing.share_moved(one, other, experts) == pytest.approx(1 / 4)


def test_says_nothing_without_experts():
    gm, ctx = trace(small("arcee"))
    assert routing.record(gm, tiny_tokens(1, 8)) == {}
    assert routing.findings(gm, tiny_tokens(1, 8), {}, ctx.facts.get(routing.Topology)) == []
