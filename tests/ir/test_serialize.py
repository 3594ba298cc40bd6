"""graph_json.py: graphs survive the way through JSON text, and a file cannot name anything but operators."""

from __future__ import annotations

import copy
import json
import math
import operator

import pytest
import torch
from torch.fx import Graph

from resq_compiler.errors import CheckpointError
from resq_compiler.ir import meta, ops
from resq_compiler.ir.graph_tools import module_of
from resq_compiler.ir.serialize import decode, dict_to_graph, encode, find_target, graph_to_dict, target_name, to_text

aten = torch.ops.aten


def small_graph():
    graph = Graph()
    x = graph.placeholder("input_ids")
    w = graph.get_attr("layer.weight")
    y = graph.call_function(aten.linear.default, (x, w))
    pieces = graph.call_function(aten.split.Tensor, (y, 2), {"dim": -1})
    first = graph.call_function(operator.getitem, (pieces, 0))
    low = graph.call_function(ops.columns, (first, 0, 2))
    q = graph.call_function(ops.quantize_dequantize, (low, ((4, 0, 1), (8, 1, 2))), {"clip": 1.0})
    meta.put(y, meta.Origin("layer", "capture"))
    meta.put(q, meta.LinearPart(meta.LinearSite("layer", "q", 0), 0, 0, 2, 4, 8))
    graph.output((q, [y]))
    return graph


def through_text(graph):
    return dict_to_graph(json.loads(to_text(graph_to_dict(graph))))


def nodes_of(graph):
    return [(n.name, n.op, n.target, repr(n.args), repr(n.kwargs), meta.facts(n)) for n in graph.nodes]


def facts_but_origin(node):
    return [fact for fact in meta.facts(node) if not isinstance(fact, meta.Origin)]


def test_round_trip_keeps_nodes_arguments_and_facts():
    graph = small_graph()
    again = through_text(graph)
    again.lint()
    assert nodes_of(again) == nodes_of(graph)
    assert type(list(again.nodes)[-1].args[0]) is tuple


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiled_graph_round_trip(compiled, family):
    graph = compiled(family).graph_module.graph
    again = through_text(graph)
    assert [row[:5] for row in nodes_of(again)] == [row[:5] for row in nodes_of(graph)]
    for node, copied in zip(graph.nodes, again.nodes, strict=True):
        assert facts_but_origin(copied) == facts_but_origin(node)
        assert module_of(copied) == module_of(node)
    assert all("unknown" not in json.dumps(item.get("args", [])) for item in graph_to_dict(graph)["nodes"])


def test_every_stage_can_be_described(compiled):
    for stage in compiled("gemma2").stages:
        described = graph_to_dict(stage.graph)
        assert json.loads(to_text(described)) == described
        assert graph_to_dict(stage.graph) == described


def test_one_line_for_each_node():
    text = to_text({"cache": [[2, 16, 16]], **graph_to_dict(small_graph())})
    assert json.loads(text)["cache"] == [[2, 16, 16]]
    assert sum(line.startswith('{"name"') for line in text.splitlines()) == len(small_graph().nodes)


def test_values_and_tensor_facts_are_written(compiled):
    graph = compiled("llama").graph_module.graph
    described = {n["name"]: n for n in graph_to_dict(graph, {"model.rotary_emb.inv_freq": {"note": 1}})["nodes"]}
    assert described["model_rotary_emb_inv_freq"]["tensor"] == {"note": 1}
    assert described["input_ids"]["value"]["dtype"] == "int64"
    quantize = next(n for n in described.values() if n["target"] == "resq.quantize")
    assert [v["dtype"] for v in quantize["value"]] == ["int8", "float32", "int32"]


@pytest.mark.parametrize("value", [
    None, True, 3, 0.1, math.inf, -math.inf, "tanh", (1, (2, 3)), [1, [2]], slice(1, None, 2), torch.float32, torch.int8,
    torch.device("cpu"), torch.strided, torch.contiguous_format, torch.channels_last,
])  # fmt: skip
def test_argument_round_trip(value):
    again = decode(json.loads(json.dumps(encode(value), allow_nan=False)), {})
    assert again == value and type(again) is type(value)


def test_a_graph_is_read_on_the_cpu():
    """Wherever it was compiled: it is moved with its weights."""
    assert decode(encode(torch.device("cuda:1")), {}) == torch.device("cpu")


def test_nan_round_trip():
    assert math.isnan(decode(encode(math.nan), {}))


@pytest.mark.parametrize("name", [
    "aten.add_.Tensor", "aten.add.out", "aten.from_file.default", "aten.save.default", "aten.add.nothing", "aten.overloads",
    "aten.__class__.mro", "aten.__dict__.x", "resq.nothing", "os.system", "builtins.eval", "operator.attrgetter", "aten.", "",
    "prims.add.default", "unknown:os.system",
])  # fmt: skip
def test_only_pure_operators_are_found(name):
    with pytest.raises(CheckpointError, match="unknown operator"):
        find_target(name)


def test_all_operators_of_the_compiler_have_names():
    for name, function in ops.OPS.items():
        assert target_name(function) == f"resq.{name}" and find_target(f"resq.{name}") is function
    assert target_name(print).startswith("unknown:")


def damaged(change):
    data = copy.deepcopy(graph_to_dict(small_graph()))
    change(data["nodes"])
    return data


@pytest.mark.parametrize(("change", "message"), [
    (lambda n: n[2].update(target="os.system"), "unknown operator"),
    (lambda n: n[2].update(args=[{"node": "nobody"}]), "nobody"),
    (lambda n: n[2].update(args=[{"what": 1}]), "malformed argument"),
    (lambda n: n[2].update(args=[{"dtype": "nn"}]), "malformed argument"),
    (lambda n: n[2].update(args=[{"unknown": "<object>"}]), "malformed argument"),
    (lambda n: n[2].update(op="call_module"), "unknown kind"),
    (lambda n: n[1].update(target="a b"), "malformed name"),
    (lambda n: n[1].update(name="input_ids"), "taken"),
    (lambda n: n[2].update(facts={"Nothing": {}}), "unknown fact"),
    (lambda n: n[2].update(facts={"Projection": {"colour": 1}}), "malformed"),
    (lambda n: n[2].pop("op"), "malformed"),
    (lambda n: n.insert(2, 7), "malformed"),
    (lambda n: n.pop(), "one output"),
    (lambda n: n.reverse(), "does not come before"),
])  # fmt: skip
def test_damaged_graphs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        dict_to_graph(damaged(change))


@pytest.mark.parametrize("data", [{}, {"nodes": 3}, []])
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(CheckpointError, match="list of nodes"):
        dict_to_graph(data)


def test_bits_of_experts_are_written_where_they_are_said():
    site = meta.LinearSite("mlp.down", "down", 0)
    assert "expert_bits" not in meta.to_dict(meta.LinearPart(site, 0, 0, 8, 4, 4))
    assert meta.to_dict(meta.LinearPart(site, 0, 0, 8, 6, 4, 1, (4, 6)))["expert_bits"] == (4, 6)
