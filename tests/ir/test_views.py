"""Every view on graphs that compiles make; what does not match says why."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.fx import Graph

import resq_compiler
from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values, views
from resq_compiler.ir.graph_tools import aten
from resq_compiler.tiny import tiny_tokens
from tests.families import small
from tests.ir.test_transforms import place
from tests.numerics.test_transforms import KINDS

VIEWS = [v for v in vars(views).values() if inspect.isclass(v) and issubclass(v, views.View) and v is not views.View]


def found(gm, view) -> list:
    return [v for node in gm.graph.nodes if (v := view.of(node)) is not None]


@pytest.fixture(scope="module")
def mixtures():
    """A mixture of experts in float32, with integer products, and with rounded weights alone."""
    graphs: list = []
    options = {"calibration_samples": 4, "calibration_length": 32, "unreached_experts": "layer"}
    for bits in (4, 16):
        compiled = resq_compiler.compile(
            small("mixtral"), tiny_tokens(4, 32), recipe="rtn", activation_bits=bits, on_float=graphs.append, **options
        )
        graphs.append(compiled.graph_module)
    return graphs


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_matches_every_call_of_its_operators(view, build, compiled, mixtures):
    """Somewhere between capture and the end of a compile, with arguments that are the node's."""
    graphs = [build("llama", "fold-norms").gm, build("gemma2", "fuse-projections").gm, build("opt", "fold-norms").gm]
    graphs += [
        build("llama", "fuse-projections", down_proj="block-pca").gm,
        compiled("llama", weight_method="rtn").graph_module,
    ]
    graphs.append(build("llama", "quantize-weights").gm)
    graphs.append(build("llama", recipe="resq", weight_method="rtn").gm)
    graphs.append(build("llama", recipe="gptq", activation_bits=16).gm)
    graphs += [place(transform)[0] for transform in KINDS] + mixtures
    seen = set()
    for gm in graphs:
        calls = [n for n in gm.graph.nodes if graph_tools.is_call(n, *view.targets)]
        assert [v.node for v in found(gm, view)] == calls
        assert all(view.why_not(n) is None and view.require(n) == view.of(n) for n in calls)
        seen |= {n.target for n in calls}
    missing = set(view.targets) - seen
    assert not missing or (view is views.Dequantize and not seen)  # a finished graph reads codes


def test_a_linear_has_its_tensors(build):
    gm = build("qwen2", "fold-norms").gm
    linear = found(gm, views.Linear)[0]
    assert linear.name == "model.layers.0.self_attn.q_proj"
    weight, bias = linear.weight_tensor(gm), linear.bias_tensor(gm)
    assert weight.shape == (values.width(linear.node), values.width(linear.x)) and bias.shape == weight.shape[:1]
    linear.change_weight(gm, lambda w: w * 2)
    linear.set_bias(gm, bias * 3, "test")
    assert torch.equal(linear.weight_tensor(gm), weight * 2) and torch.equal(linear.bias_tensor(gm), bias * 3)


def test_a_linear_without_a_bias_can_get_one(build):
    gm = build("llama", "fold-norms").gm
    linear = found(gm, views.Linear)[0]
    assert linear.bias is None and linear.bias_tensor(gm) is None
    value = torch.ones(values.width(linear.node))
    linear.set_bias(gm, value, "test")
    again = views.Linear.require(linear.node)
    assert str(again.bias.target) == "model.layers.0.self_attn.q_proj.bias" and torch.equal(
        again.bias_tensor(gm), value
    )


def test_norms_of_both_kinds(build):
    rms, layer = (found(build(f, "fold-norms").gm, views.Norm)[0] for f in ("llama", "opt"))
    assert not rms.subtracts_mean and rms.bias is None and rms.gain is not None
    assert layer.subtracts_mean and None not in (layer.gain, layer.bias)
    for norm in (rms, layer):
        norm.drop_affine()
        bare = views.Norm.require(norm.node)
        assert (bare.gain, bare.bias, bare.eps, bare.x) == (None, None, norm.eps, norm.x)


def test_coded_linears_know_their_quantizer(compiled):
    gm = compiled("llama", weight_method="rtn").graph_module
    coded = found(gm, views.CodedLinear)
    assert coded and all(c.on_codes and c.quantizer.node is c.x for c in coded)
    first = coded[0]
    assert first.name == "model.layers.0.self_attn.q_proj.part0"
    assert first.codes(gm).dtype == torch.int8 and first.scales(gm).shape == first.codes(gm).shape[:1]
    assert first.codes(gm).shape[1] == first.quantizer.columns


def near_miss(make) -> object:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    return make(graph, x, w)


@pytest.mark.parametrize(
    ("view", "make", "reason"),
    [
        (views.Linear, lambda g, x, w: x, "node x: expected aten.linear or expert_linear, got"),
        (views.Linear, lambda g, x, w: 3, "expected aten.linear or expert_linear, got 3"),
        (views.Linear, lambda g, x, w: g.call_function(aten.linear.default, (x, x)), "weight is computed; expected a tensor of the model"),
        (views.Norm, lambda g, x, w: g.call_function(aten.relu.default, (x,)), "expected rms_norm or aten.layer_norm, got"),
        (views.Norm, lambda g, x, w: g.call_function(ops.rms_norm, (x, x, 1e-5)), "weight is computed"),
        (views.Columns, lambda g, x, w: g.call_function(ops.columns, (x, 0, x)), "stop: expected a constant integer, got x"),
        (views.Quantize, lambda g, x, w: g.call_function(ops.quantize, (x,)), "its argument bits is missing"),
    ],
)  # fmt: skip
def test_near_misses_are_named(view, make, reason):
    node = near_miss(make)
    assert view.of(node) is None and reason in view.why_not(node)
    with pytest.raises(TopologyError) as error:
        view.require(node)
    assert reason in str(error.value)
