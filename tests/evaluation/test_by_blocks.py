"""Models that are run block by block: their logits and figures are those of a run of the whole graph, to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resq_compiler.calibration import executor
from resq_compiler.calibration.cuts import cuts
from resq_compiler.errors import TopologyError
from resq_compiler.evaluation import by_blocks, comparison
from resq_compiler.evaluation.by_blocks import ByBlocks
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import tiny_tokens

WINDOWS = tiny_tokens(5, 24)


def figures(result):
    """All but times."""
    return dataclasses.replace(result, seconds=0, tokens_per_second=0)


def whole(gm):
    """The graph as a model: called with token ids."""

    def call(ids):
        with torch.no_grad():
            return by_blocks.Logits(gm(*executor.first_tokens(gm, ids).values())[0])

    return call


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("room", [1, by_blocks.ROOM])
def test_a_compiled_model_and_its_reference(compiled, captured, monkeypatch, batch_size, room):
    monkeypatch.setattr(by_blocks, "ROOM", room)
    model, graph = compiled("llama"), captured("llama").graph_module
    expected = evaluate(model, WINDOWS, whole(graph), batch_size)
    found = evaluate(ByBlocks(model.graph_module, model), WINDOWS, ByBlocks(graph), batch_size)
    assert figures(found) == figures(expected)


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt_neox"])
def test_captured_graphs(captured, family):
    graph = captured(family).graph_module
    assert figures(evaluate(ByBlocks(graph), WINDOWS, batch_size=3)) == figures(
        evaluate(whole(graph), WINDOWS, batch_size=3)
    )


def test_a_block_has_its_own_weights_and_no_others(captured):
    graph = captured("llama-untied").graph_module
    runner = ByBlocks(graph)
    runner.prepare([WINDOWS])
    stops = [*cuts(graph), graph_tools.output_args(graph.graph)[0]]
    weights = [set(runner._stretch(a, [b])[1]) for a, b in zip([[], *([stop] for stop in stops)], stops, strict=False)]
    assert sum(map(len, weights)) == len(set.union(*weights))
    read = [found for found in weights if found]
    assert len(read) == 1 + 2 * 2 + 2  # the embedding, attention and feed-forward of two blocks, the last norm, logits
    largest = max(sum(graph_tools.get_tensor(graph, n).nbytes for n in nodes) for nodes in weights)
    assert largest < sum(t.nbytes for t in graph.state_dict().values()) / 2


def test_measure_says_the_same(compiled, tiny):
    model = compiled("llama")
    runner = ByBlocks(model.graph_module, model)
    found, expected = (comparison.measure(one, WINDOWS, tiny("llama")) for one in (runner, model))
    for result in (found, expected):
        for who in ("model", "reference"):
            result[who] |= {"seconds": 0, "tokens_per_second": 0}
    assert found == expected


def test_a_graph_without_cuts_is_refused(captured):
    graph = captured("llama").graph_module
    first = cuts(graph)[0]
    with graph.graph.inserting_before(graph.graph.output_node()):
        last = graph_tools.output_args(graph.graph)[0]
        kept = graph.graph.call_function(
            torch.ops.aten.add.Tensor, (last, graph.graph.call_function(torch.sum, (first,)))
        )
    graph.graph.output_node().args = ((kept, *graph_tools.output_args(graph.graph)[1:]),)
    assert first not in cuts(graph) and all(executor.carried(graph, cut) for cut in cuts(graph))
    graph.graph.find_nodes(op="call_function", target=torch.sum)[0].args = (graph_tools.placeholders(graph.graph)[0],)
    ids = graph_tools.placeholders(graph.graph)[0]
    first.replace_all_uses_with(ids)
    with pytest.raises(TopologyError, match="can only be run whole"):
        cuts(graph)
