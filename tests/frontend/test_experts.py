"""Mixtures of experts are named by dataflow, or refused with the node and what was expected there."""

from __future__ import annotations

import operator

import pytest
import torch
from resq_compiler.passes.canonicalize import drop_mutation, drop_noise

from resq_compiler.errors import TopologyError
from resq_compiler.frontend.capture import capture
from resq_compiler.frontend.experts import name_experts
from resq_compiler.ir import ops, verify
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.run import prefill_and_decode, relative_error
from tests.families import EXACT, small


def captured(name: str):
    """A captured graph, ready for its experts to be named, and its example inputs."""
    found = capture(small(name))
    gm, inputs = found.graph_module, found.example_inputs
    verify.propagate_shapes(gm, inputs)
    drop_noise(gm)
    drop_mutation(gm)
    return gm, inputs


def calls(gm, target) -> list[torch.fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(("name", "biases"), [("glm4_moe", 0), ("gpt_oss", 2)])
def test_names_experts(name, biases):
    """Sigmoid scores of groups, with a shared expert; biases, interleaved gate and up, a clamped activation, transposed weights."""
    gm, inputs = captured(name)
    before = prefill_and_decode(gm, inputs)
    layers = name_experts(gm, "test")
    assert len(calls(gm, ops.combine_experts)) == layers
    linears = calls(gm, ops.expert_linear)
    assert len(linears) == 2 * layers
    assert sum("bias" in n.kwargs or len(n.args) > 3 for n in linears) == biases * layers
    assert not calls(gm, aten.sort.default)
    gm.recompile()
    assert relative_error(prefill_and_decode(gm, inputs), before) <= EXACT


def test_leaves_a_model_without_experts_alone():
    gm, _ = captured("arcee")
    nodes = [n.name for n in gm.graph.nodes]
    assert name_experts(gm, "test") == 0
    assert [n.name for n in gm.graph.nodes] == nodes


def test_refuses_what_mixes_rows():
    """An operator between the products that is none of every row alone."""
    gm, _ = captured("mixtral")
    node = calls(gm, aten.silu.default)[0]
    node.target, node.args = aten.cumsum.default, (node.args[0], 0)
    with pytest.raises(
        TopologyError,
        match=rf"node {node.name} \(.*\): in a mixture of experts; expected an operator that works on every row",
    ):
        name_experts(gm, "test")


def test_refuses_dropped_tokens():
    """Token choice with a capacity: some rows are left out before the sum."""
    gm, _ = captured("mixtral")
    total = next(n for n in calls(gm, aten.sum.dim_IntList) if n.args[1] == [1])
    with gm.graph.inserting_before(total):
        kept = gm.graph.call_function(aten.slice.Tensor, (total.args[0], 1, 0, 1))
        kept.meta["val"] = total.args[0].meta["val"][:, :1]
    total.args = (kept, [1])
    with pytest.raises(TopologyError, match=r"in a mixture of experts; expected"):
        name_experts(gm, "test")


def test_refuses_a_product_of_experts_that_nothing_sorted():
    gm, _ = captured("mixtral")
    sort = calls(gm, aten.sort.default)[0]
    (order,) = [n for n in sort.users if n.target is operator.getitem and n.args[1] == 1]
    with gm.graph.inserting_before(sort):
        other = gm.graph.call_function(aten.argsort.default, (sort.args[0],))
        other.meta["val"] = order.meta["val"]
    order.replace_all_uses_with(other)
    with pytest.raises(TopologyError, match=r"node \w+ \(.*experts\)"):
        name_experts(gm, "test")


def test_refuses_weights_that_are_computed():
    """Experts of unequal shapes have no weight [experts, out, in]."""
    gm, _ = captured("mixtral")
    product = next(n for n in gm.graph.nodes if "grouped_mm" in str(n.target))
    turned = product.args[1]
    with gm.graph.inserting_before(turned):
        made = gm.graph.call_function(aten.neg.default, (turned.args[0],))
        made.meta["val"] = turned.args[0].meta["val"]
    turned.args = (made, *turned.args[1:])
    with pytest.raises(TopologyError, match=r"the same shape for all experts"):
        name_experts(gm, "test")
