from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from resq_compiler.ir import graph_tools, meta, ops, verify
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.linears import linear_sums

SITE = meta.LinearSite("layer", "up", 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("before", ["quantize-weights", None])
def test_every_linear_of_a_model_is_one_sum(family, before, build):
    """Two parts each but for down projections, which have one; the bias where the model has one; all of them in order."""
    built = build(family, before, weight_method="rtn")
    sums = linear_sums(built.gm)
    names = [built_name(node) for node in built.gm.graph.nodes if meta.get(node, meta.LinearPart)]
    assert [s.site.name for s in sums] == list(dict.fromkeys(names))
    assert all(s.apart is None and [f.index for f in s.facts] == list(range(len(s.parts))) for s in sums)
    assert {(s.site.role, len(s.parts)) for s in sums if s.site.role in ("q", "o", "down")} == {
        ("q", 2),
        ("o", 2),
        ("down", 1),
    }
    biased = {
        "llama": set(),
        "qwen2": {"q", "k", "v"},
        "gemma2": set(),
        "gpt_neox": {"q", "k", "v", "o", "gate", "down"},
    }
    assert {s.site.role for s in sums if s.bias is not None} == biased[family]


def built_name(node) -> str:
    return meta.get(node, meta.LinearPart).site.name


def test_residuals(build):
    """What writes into the stream ends in an addition to it; the root holds the linear alone."""
    sums = linear_sums(build("llama", weight_method="rtn").gm)
    assert {s.site.role for s in sums if s.residual is not None} == {"o", "down"}
    for linear in sums:
        end = linear.total or linear.root
        assert (linear.residual is None) == (linear.total is None)
        assert linear.total is None or set(end.args) == {linear.root, linear.residual}


def test_linears_that_meet_in_one_addition_share_it_once(build):
    """gpt_neox adds attention and feed-forward: one is the residual of the other, which has none."""
    sums = [s for s in linear_sums(build("gpt_neox", weight_method="rtn").gm) if s.site.block == 0]
    writers = {s.site.role: s for s in sums if s.site.role in ("o", "down")}
    totals = [s.total for s in writers.values()]
    assert len(set(totals)) == 2
    first, second = sorted(writers.values(), key=lambda s: s.residual is None)
    assert first.residual in (second.root, second.total) or second.residual in (first.root, first.total)


def two_parts(combine) -> GraphModule:
    """Parts of one linear on 4 + 4 columns, put together by `combine`(graph, first, second)."""
    graph = Graph()
    x = graph.placeholder("x")
    parts = []
    for i in range(2):
        piece = graph.call_function(ops.columns, (x, 4 * i, 4 * i + 4))
        part = graph.call_function(aten.linear.default, (piece, graph.get_attr(f"w{i}")))
        parts.append(meta.put(part, meta.LinearPart(SITE, i, 4 * i, 4 * i + 4, 4, 4)))
    graph.output((combine(graph, *parts),))
    gm = GraphModule({"w0": torch.ones(6, 4), "w1": torch.ones(6, 4), "b": torch.ones(6)}, graph)
    verify.propagate_shapes(gm, (torch.ones(2, 3, 8),))
    return gm


def add(graph, a, b, **kwargs):
    return graph.call_function(aten.add.Tensor, (a, b), kwargs)


def test_a_sum_with_its_bias():
    gm = two_parts(lambda g, a, b: add(g, add(g, a, b), g.get_attr("b")))
    (linear,) = linear_sums(gm)
    (end,) = graph_tools.output_args(gm.graph)
    assert linear.root is end and linear.bias.target == "b" and linear.residual is None
    assert linear.inner == (linear.parts[0], end.args[0], linear.parts[1])
    assert [n.target for n in linear.inputs] == [ops.columns] * 2


@pytest.mark.parametrize(
    ("combine", "reason"),
    [
        (lambda g, a, b: g.call_function(aten.mul.Tensor, (a, b)), "expected the addition of another part, got"),
        (lambda g, a, b: add(g, a, b, alpha=2), "expected the addition of another part, got"),
        (lambda g, a, b: add(g, a, g.call_function(aten.relu.default, (b,))), "adds relu_default, expected another part"),
        (lambda g, a, b: add(g, add(g, a, b), a), "read by 2 nodes, expected only the addition of the other parts"),
    ],
)  # fmt: skip
def test_parts_that_do_not_meet_say_why(combine, reason):
    sums = linear_sums(two_parts(combine))
    assert [len(s.parts) for s in sums] == [1, 1]
    assert all(reason in s.apart for s in sums)
