from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule

from resq_compiler.errors import VerifyError
from resq_compiler.ir import graph_tools, ops, values, verify
from resq_compiler.ir.graph_tools import aten


@pytest.fixture
def gm() -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.linear.default, (x, graph.get_attr("w"))),))
    module = GraphModule({"w": torch.ones(6, 8)}, graph)
    verify.propagate_shapes(module, (torch.ones(2, 3, 8),))
    return module


def test_values_of_new_nodes_are_found_when_asked_for(gm):
    (y,) = graph_tools.output_args(gm.graph)
    with gm.graph.inserting_after(y):
        wide = graph_tools.add_tensor(gm, "u", torch.ones(6, 4, dtype=torch.float64), "test")
        narrow = graph_tools.emit(gm.graph, aten.to.dtype, (wide, torch.float32), y, "test")
        new = graph_tools.emit(gm.graph, ops.project, (y, narrow), y, "test")
        codes = graph_tools.emit(gm.graph, ops.quantize, (new, 4), y, "test")
    assert "val" not in new.meta
    assert values.shape(new) == (2, 3, 4) and values.width(new) == 4 and values.dtype(wide) == torch.float64
    assert isinstance(new.meta["val"], FakeTensor) and isinstance(values.value(codes), ops.QuantizedActivation)
    with pytest.raises(VerifyError, match="node quantize.*: expected one tensor, got QuantizedActivation"):
        values.shape(codes)


def test_a_graph_without_values_says_what_to_do():
    graph = Graph()
    x = graph.placeholder("x")
    with pytest.raises(VerifyError, match="node x: its value is not known; propagate_shapes was not run"):
        values.value(x)


def test_values_hold_no_weights(gm):
    (w,) = gm.graph.find_nodes(op="get_attr")
    del w.meta["val"]
    assert values.shape(w) == (6, 8) and isinstance(w.meta["val"], FakeTensor)


def test_replace_keeps_the_value_and_takes_all_other_users(gm):
    (old,) = graph_tools.output_args(gm.graph)
    shape = values.value(old)
    with gm.graph.inserting_after(old):
        new = graph_tools.emit(gm.graph, aten.relu.default, (old,), old, "test")
    graph_tools.replace(new, old)  # back to the old one: the output read the old one all along
    assert graph_tools.output_args(gm.graph) == (old,)
    new = graph_tools.rewrite(old, aten.matmul.default, (*old.args,), "test")
    assert graph_tools.output_args(gm.graph) == (new,) and new.meta["val"] is shape
    assert old not in gm.graph.nodes


def test_replace_leaves_the_new_node_its_operand(gm):
    x = graph_tools.placeholders(gm.graph)[0]
    (old,) = graph_tools.output_args(gm.graph)
    with gm.graph.inserting_after(old):
        twice = graph_tools.emit(gm.graph, aten.add.Tensor, (old, old), old, "test")
        result = graph_tools.emit(gm.graph, aten.relu.default, (x,), old, "test")
    graph_tools.replace(old, result)
    assert twice.args == (result, result)
