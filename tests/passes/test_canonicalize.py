from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import Canonicalize
from resq_compiler.passes.canonicalize import merge_equal
from torch.fx import Graph, GraphModule

from resq_compiler.ir import graph_tools, ops, values, verify
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.passes import PassContext
from resq_compiler.pipeline.run import prefill_and_decode
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.tiny import TINY_FAMILIES

NORMS = {"llama": 5, "qwen3": 9, "gemma2": 9, "gemma3": 19, "olmo2": 9}  # 2 blocks; gemma3 has 3 and q/k norms


def count(gm, target) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def small_graph(body, weight: torch.Tensor, x: torch.Tensor) -> GraphModule:
    """A graph with one input and one weight; `body` returns the output node."""
    graph = Graph()
    source = graph.placeholder("x")
    w = graph.get_attr("w")
    graph.output((body(graph.call_function, source, w),))
    gm = GraphModule({"w": weight}, graph)
    verify.propagate_shapes(gm, (x,))
    return gm


def run(gm) -> int:
    return Canonicalize().run(gm, PassContext(CompileConfig(), ()))


@pytest.mark.parametrize("family", NORMS)
def test_rewrites(family, build):
    built = build(family, "canonicalize")
    assert count(built.gm, ops.rms_norm) == 0 and count(built.gm, aten.rsqrt.default) == NORMS[family]
    built.pipeline.run(built.gm, [Canonicalize()])
    blocks = len({n for n in built.gm.graph.nodes if n.target is aten.scaled_dot_product_attention.default}) or 2
    assert count(built.gm, ops.rms_norm) == NORMS[family] and count(built.gm, aten.rsqrt.default) == 0
    assert count(built.gm, ops.rope) == 2 * blocks and count(built.gm, aten.neg.default) == 0


def test_rewrites_partial_rotary(build):
    built = build("gpt_neox", "name-attention")
    ropes = built.gm.graph.find_nodes(op="call_function", target=ops.rope)
    widths = {(values.width(n.args[0]), values.width(n.args[1])) for n in ropes}
    assert len(ropes) == 4 and widths == {(16, 8)}  # rotary_pct 0.5


def rms_norm_but(exponent: float = 2, dim: int = -1, other=False):
    def body(call, x, w):
        mean = call(aten.mean.dim, (call(aten.pow.Tensor_Scalar, (x, exponent)), [dim], True))
        factor = call(aten.rsqrt.default, (call(aten.add.Tensor, (mean, 1e-5)),))
        scaled = call(aten.mul.Tensor, (call(aten.relu.default, (x,)) if other else x, factor))
        return call(aten.mul.Tensor, (w, scaled))

    return body


def rope_but(swap: bool = False, sign: bool = True):
    def body(call, x, w):
        low, high = call(aten.slice.Tensor, (x, -1, 0, 4)), call(aten.slice.Tensor, (x, -1, 4, 2**63 - 1))
        if swap:
            low, high = high, low
        turned = call(aten.cat.default, ([call(aten.neg.default, (high,)) if sign else high, low], -1))
        return call(aten.add.Tensor, (call(aten.mul.Tensor, (x, w)), call(aten.mul.Tensor, (turned, w))))

    return body


def test_leaves_alone():
    x, w = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8.0)
    norms = [rms_norm_but(exponent=4), rms_norm_but(dim=1), rms_norm_but(other=True)]
    near_misses = [*norms, rope_but(swap=True), rope_but(sign=False)]
    for body in near_misses:
        gm = small_graph(body, w, x)
        before = gm(x)[0]
        assert run(gm) == 0
        assert count(gm, ops.rms_norm) == count(gm, ops.rope) == 0
        gm.recompile()
        assert torch.equal(gm(x)[0], before)
    for body, target in (
        (rms_norm_but(), ops.rms_norm),
        (rope_but(), ops.rope),
    ):  # and the hits, so that misses mean something
        gm = small_graph(body, w, x)
        assert run(gm) == 1 and count(gm, target) == 1


def test_merges_only_equal_calls():
    def body(call, x, w):
        a, b, c = call(aten.mul.Tensor, (x, w)), call(aten.mul.Tensor, (x, w)), call(aten.mul.Tensor, (w, x))
        return call(aten.add.Tensor, (call(aten.add.Tensor, (a, b)), c))

    gm = small_graph(body, torch.ones(8), torch.ones(2, 8))
    assert merge_equal(gm) == 1 and count(gm, aten.mul.Tensor) == 2


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_numerics(family, build):
    """In float32, because what is recognized are casts to float32: nothing may change but the order of a product."""
    built = build(family, "canonicalize")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [Canonicalize()])
    after = prefill_and_decode(built.gm, built.ctx.example_inputs)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # a few float32 roundings


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt"])
def test_idempotent(family, build):
    built = build(family, "name-attention")
    assert Canonicalize().run(built.gm, built.ctx) == 0


def test_folded_gain_is_one_plus_the_weight(build, tiny):
    built = build("gemma2", "name-attention")
    (first, *_) = built.gm.graph.find_nodes(op="call_function", target=ops.rms_norm)
    gain = graph_tools.get_tensor(built.gm, first.args[1])
    torch.testing.assert_close(gain, 1 + tiny("gemma2").model.layers[0].input_layernorm.weight, rtol=0, atol=0)
