"""Tensors that a model fills piece by piece become their pieces, joined; what is not wholly filled stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resq_compiler.frontend.filled import join_filled
from resq_compiler.ir.graph_tools import aten


class Filled(nn.Module):
    """y[..., :3] = a; y[..., 3:] = b, or something that is nearly that."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, a, b):
        y = a.new_empty(2, 3 + b.shape[-1])
        if self.kind == "backwards":
            y[..., 3:].copy_(b)
            y[..., :3].copy_(a)
            return y + 1
        y[..., :3].copy_(a)
        early = y * 0 if self.kind == "read early" else 0
        y[..., 4 if self.kind == "gap" else 3 :].copy_(b[..., 1:] if self.kind == "gap" else b)
        return y + 1 + early


def exported(kind: str):
    example = torch.randn(2, 3), torch.randn(2, 5)
    return torch.export.export(Filled(kind), example, strict=False).module(check_guards=False), example


@pytest.mark.parametrize("kind", ["whole", "backwards"])
def test_joins_pieces_that_cover_the_columns(kind):
    gm, (a, b) = exported(kind)
    assert join_filled(gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    assert not gm.graph.find_nodes(op="call_function", target=aten.copy_.default)
    assert torch.equal(gm(a, b), torch.cat((a, b), -1) + 1)


@pytest.mark.parametrize("kind", ["gap", "read early"])
def test_leaves_the_others(kind):
    gm, _ = exported(kind)
    names = [node.name for node in gm.graph.nodes]
    assert join_filled(gm.graph) == 0
    assert [node.name for node in gm.graph.nodes] == names
