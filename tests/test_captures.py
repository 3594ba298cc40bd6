"""What the tests share between compiles is what each would have captured by itself."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.frontend.capture import capture_promised
from resq_compiler.frontend.models import open_model
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import tiny_model
from tests.captures import SharedCaptures, structure


def opened(**changes):
    return open_model(tiny_model("llama", **changes))


def test_a_second_compile_gets_its_own_weights_in_the_same_graph():
    shared, second = SharedCaptures(), opened(seed=1)
    first = opened()
    shared(first.skeleton, first.weights)
    got, own = shared(second.skeleton, second.weights), capture_promised(second.skeleton, second.weights)
    assert len(shared.made) == 1
    assert got.cache == own.cache and all(map(torch.equal, got.example_inputs, own.example_inputs))
    assert [n.format_node() for n in got.graph_module.graph.nodes] == [
        n.format_node() for n in own.graph_module.graph.nodes
    ]
    for node in own.graph_module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        assert torch.equal(graph_tools.made(got.graph_module, target), graph_tools.made(own.graph_module, target)), (
            target
        )


@pytest.mark.parametrize(
    "change",
    [{"tie_word_embeddings": False}, {"rope_theta": 500.0}, {"rms_norm_eps": 1e-3}, {"num_hidden_layers": 1}],
    ids=str,
)
def test_other_structures_are_captured_again(change):
    assert structure(opened(**change).skeleton) != structure(opened().skeleton)
    assert structure(opened(seed=1).skeleton) == structure(opened().skeleton)
