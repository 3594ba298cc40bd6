from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from resq_compiler.errors import VerifyError
from resq_compiler.ir import ops, verify
from resq_compiler.ir.graph_tools import aten
from resq_compiler.tiny import TINY_FAMILIES


def graph_module(build, **tensors) -> GraphModule:
    graph = Graph()
    build(graph)
    return GraphModule(tensors, graph)


def test_missing_tensors_are_named():
    gm = graph_module(lambda g: g.output((g.get_attr("w"),)), w=torch.ones(2))
    verify.check_graph(gm)
    del gm.w
    with pytest.raises(VerifyError, match=r"[Nn]ode w\b.* w .*(does not exist|nonexistent)"):
        verify.check_graph(gm)


def test_what_is_no_tensor_is_named():
    gm = graph_module(lambda g: g.output((g.get_attr("w"),)), w=torch.nn.Linear(2, 2))
    with pytest.raises(VerifyError, match="node w: w is a Linear, expected a tensor"):
        verify.check_graph(gm)


def test_use_before_definition():
    def build(graph):
        x = graph.placeholder("x")
        first = graph.call_function(aten.relu.default, (x,))
        second = graph.call_function(aten.relu.default, (first,))
        graph.output((second,))
        first.update_arg(0, second)

    with pytest.raises(VerifyError, match="malformed graph"):
        verify.check_graph(graph_module(build))


def test_shapes_that_do_not_fit_name_the_node():
    def build(graph):
        graph.output((graph.call_function(aten.add.Tensor, (graph.placeholder("x"), graph.get_attr("w"))),))

    gm = graph_module(build, w=torch.ones(3))
    with pytest.raises(VerifyError, match=r"node add\w*: its shape cannot be found"):
        verify.propagate_shapes(gm, (torch.ones(2, 4),))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_propagated_shapes_and_dtypes_are_those_of_a_run(family, build):
    """Every node of a fully quantized graph: what FakeTensor says against a real run."""
    built = build(family, weight_method="rtn")
    found: list = []

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, (torch.Tensor, ops.QuantizedActivation)) and n.op == "call_function":
                leaves = torch.utils._pytree.tree_leaves
                real = [(t.shape, t.dtype) for t in leaves(value) if isinstance(t, torch.Tensor)]
                fake = [(t.shape, t.dtype) for t in leaves(n.meta["val"]) if isinstance(t, torch.Tensor)]
                found.append((n.name, real, fake))
            return value

    with torch.no_grad():
        Recorder(built.gm).run(*built.ctx.example_inputs)
    assert len(found) > 50 and all(real == fake for _, real, fake in found)


def test_calls_that_differ_in_a_number_are_not_taken_for_one():
    """2 and 2.0 are equal, and make other types; a tensor that is transposed has other strides."""

    def build(graph):
        x = graph.placeholder("x")
        turned = graph.call_function(aten.transpose.int, (x, 0, 1))
        for number in (2, 2.0, True):
            graph.call_function(aten.mul.Scalar, (x, number))
        for value in (x, turned, x):
            graph.call_function(aten.clone.default, (value,))
        graph.output((x,))

    gm = graph_module(build)
    verify.propagate_shapes(gm, (torch.ones(3, 3, dtype=torch.int64),))
    found = [node.meta["val"] for node in gm.graph.nodes if node.op == "call_function"]
    assert [v.dtype for v in found[1:4]] == [torch.int64, torch.float32, torch.int64]
    assert [v.stride() for v in found[4:]] == [(3, 1), (1, 3), (3, 1)] and found[4] is found[6]
