from __future__ import annotations

import operator

import pytest
from torch.fx import Graph

from resq_compiler.errors import TopologyError
from resq_compiler.ir import args, ops
from resq_compiler.ir.graph_tools import aten


@pytest.fixture
def graph() -> Graph:
    graph = Graph()
    for name in ("x", "y"):
        graph.placeholder(name)
    graph.get_attr("w")
    return graph


def inputs(graph):
    return list(graph.nodes)[:3]


@pytest.mark.parametrize("given", [lambda w: ((w,), {}), lambda w: ((), {"weight": w})], ids=["position", "name"])
def test_arguments_are_found_however_they_are_given(graph, given):
    x, _, w = inputs(graph)
    positional, named = given(w)
    node = graph.call_function(aten.linear.default, (x, *positional), named)
    assert args.node_arg(node, "input") is x and args.tensor_arg(node, "weight") is w
    assert args.optional_tensor_arg(node, "bias") is None


def test_defaults_are_those_of_the_operator(graph):
    x, y, _ = inputs(graph)
    assert args.argument(graph.call_function(aten.add.Tensor, (x, y)), "alpha") == 1
    assert args.argument(graph.call_function(aten.add.Tensor, (x, y), {"alpha": 2}), "alpha") == 2
    quantizer = graph.call_function(ops.quantize, (x, 4), {"clip": 0.5})
    assert args.int_arg(quantizer, "groups") == 1 and args.float_arg(quantizer, "clip") == 0.5
    assert args.optional_int_arg(graph.call_function(ops.causal_mask, (x, y)), "window") is None
    assert args.bool_arg(graph.call_function(ops.hadamard, (x,)), "transpose") is False


def test_what_is_missing_or_unknown_is_named(graph):
    x, _, _ = inputs(graph)
    node = graph.call_function(aten.linear.default, (x,))
    with pytest.raises(TopologyError, match="node linear.*: its argument weight is missing"):
        args.argument(node, "weight")
    with pytest.raises(
        TopologyError, match="node linear.*: aten.linear has no argument gain; it has input, weight, bias"
    ):
        args.argument(node, "gain")
    with pytest.raises(TopologyError, match="node x: expected a call with arguments, got"):
        args.argument(x, "bias")


@pytest.mark.parametrize(
    ("read", "name", "message"),
    [
        (args.node_arg, "groups", "expected a value of the graph, got 1"),
        (args.int_arg, "x", "expected a constant integer, got x"),
        (args.float_arg, "x", "expected a constant number, got x"),
        (args.bool_arg, "bits", "expected True or False, got 4"),
        (args.nodes_arg, "bits", "expected a list of values of the graph, got 4"),
        (args.tensor_arg, "x", "x is computed; expected a tensor of the model"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_kinds_are_checked(graph, read, name, message):
    node = graph.call_function(ops.quantize, (inputs(graph)[0], 4))
    with pytest.raises(TopologyError, match=f"node quantize.*{message}"):
        read(node, name)


def test_set_argument_fills_in_what_stands_before(graph):
    x, y, w = inputs(graph)
    node = graph.call_function(ops.quantize, (x, 4))
    args.set_argument(node, "clip", 0.5)
    assert node.args == (x, 4, 1, 0.5)
    args.set_argument(node, "bits", 8)
    assert node.args == (x, 8, 1, 0.5)
    named = graph.call_function(aten.linear.default, (x,), {"weight": w})
    args.set_argument(named, "weight", y)
    assert named.args == (x,) and named.kwargs == {"weight": y}
    scaled = graph.call_function(aten.add.Tensor, (x, y))
    args.set_argument(scaled, "alpha", 2)
    assert scaled.args == (x, y) and scaled.kwargs == {"alpha": 2}


def test_operands(graph):
    x, y, _ = inputs(graph)
    node = graph.call_function(aten.mul.Tensor, (x, y))
    assert args.operands(node) == (x, y)
    assert args.other_operand(node, x) is y and args.other_operand(node, y) is x
    assert args.argument(graph.call_function(operator.getitem, (x, 3)), "b") == 3
    assert args.nodes_arg(graph.call_function(aten.cat.default, ([x, y],)), "tensors") == (x, y)
