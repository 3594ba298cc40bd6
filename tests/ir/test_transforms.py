"""Transforms in a graph: calls compute what the transform does, products become chains, and graphs read back what they hold."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.transforms import TARGETS, Placing, Transforms, read
from resq_compiler.numerics.transforms import Product
from tests.numerics.test_transforms import EACH, HEADS, KINDS, ROTATION, WIDTH

aten = torch.ops.aten
FACT = meta.Projection("U_A")


def graph_of_one_value():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.relu.default, (x,))
    graph.output((y,))
    return GraphModule({}, graph), x, y


def place(transform):
    gm, x, y = graph_of_one_value()
    known = Transforms()
    placing = Placing(gm, transform, "T", torch.zeros(1, dtype=torch.float64), "test", known)
    forward = placing.forward(x, [y], FACT)
    inverse = placing.inverse(forward, [y], meta.Projection("U_A", inverse=True))
    gm.recompile()
    return gm, forward, inverse, known


def values_of(gm, x, *nodes):
    env = {graph_tools.placeholders(gm.graph)[0]: x}
    return [graph_tools.evaluate(gm, node, env) for node in nodes]


@EACH
def test_calls_compute_the_transform(transform):
    gm, forward, inverse, _ = place(transform)
    heads = transform is HEADS
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64) if heads else torch.randn(2, 3, WIDTH, dtype=torch.float64)
    turned, back = values_of(gm, x, forward, inverse)
    expected = (
        transform.forward(x.transpose(1, 2).flatten(-2)).unflatten(-1, (4, 6)).transpose(1, 2)
        if heads
        else transform.forward(x)
    )
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


@EACH
def test_a_graph_reads_back_what_it_holds(transform):
    gm, forward, *_ = place(transform)
    nodes = [n for n in gm.graph.nodes if n.target in TARGETS and not meta.get(n, meta.Projection).inverse]
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for node in nodes:
        node.meta["val"] = x
    found = Product(tuple(read(gm, node) for node in nodes))
    torch.testing.assert_close(found.forward(x), transform.forward(x), rtol=1e-12, atol=1e-12)


def test_tensors_are_made_once_and_facts_kept():
    gm, forward, inverse, known = place(ROTATION)
    assert [n.target for n in gm.graph.find_nodes(op="get_attr")] == ["resq.T"]
    assert known.exact == {forward: ROTATION, inverse: ROTATION}
    assert known.of(gm, forward) is ROTATION


def test_factors_of_a_product_have_names_of_their_own():
    gm, *_ = place(KINDS[-1])
    names = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    assert names == {"resq.T.0", "resq.T.1", "resq.T.1_order", "resq.T.2"}


def test_what_is_no_transform_says_so():
    gm, _, y = graph_of_one_value()
    with pytest.raises(TopologyError, match="node relu_default: expected a transform, got"):
        read(gm, y)
