from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import QuantizeKvCache

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.tiny import tiny_tokens

RTN = {"weight_method": "rtn"}


def quantizers(gm):
    return gm.graph.find_nodes(op="call_function", target=ops.quantize_dequantize)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({}, ((4, 0, 14), (8, 14, 16))),
        ({"kv_bits": 8}, ((8, 0, 16),)),
        ({"kv_bits": 3, "low_fraction": 0.25, "high_fraction": 0.25}, ((2, 0, 4), (3, 4, 12), (8, 12, 16))),
        ({"recipe": "quarot"}, ((4, 0, 16),)),
    ],
    ids=str,
)
def test_rewrites(options, parts, build):
    built = build("llama", "quantize-kv-cache", **RTN, **options)
    assert QuantizeKvCache().run(built.gm, built.ctx) == 4
    found = quantizers(built.gm)
    assert {n.args[1] for n in found} == {parts}
    for node in found:
        (cache,) = node.users
        assert cache.target is ops.append_cache and cache.args[1] is node and cache.args[0].op == "placeholder"
    names = [meta.get(n, meta.QuantizerSite).name for n in found]
    assert sorted(names) == ["blocks.0.key", "blocks.0.value", "blocks.1.key", "blocks.1.value"]


def test_leaves_alone(build):
    built = build("llama", "quantize-kv-cache", kv_bits=16, **RTN)
    assert QuantizeKvCache().run(built.gm, built.ctx) == 0 and not quantizers(built.gm)


def test_numerics(build):
    """Cached values are within a step of the float ones, head by head: the steps come from the values themselves."""
    built = build("llama", "quantize-kv-cache", **RTN)
    QuantizeKvCache().run(built.gm, built.ctx)
    nodes = quantizers(built.gm)
    env = executor.first_tokens(built.gm, tiny_tokens(2, 16))
    executor.Schedule(built.gm, nodes + [n.args[0] for n in nodes], env).run(env)
    for node in nodes:
        for bits, start, stop in node.args[1]:
            image, x = (env[n][..., start:stop] for n in (node, node.args[0]))
            step = (x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)) / (2**bits - 1)
            assert bool(((image - x).abs().amax(-1) <= step * 1.001).all())  # half a step, half for the zero-point


def test_decode_does_not_quantize_the_past_again(compile_tiny):
    """Keys of old tokens come out of a decode as they went in, bit for bit."""
    compiled, _ = compile_tiny("llama")
    first = compiled(tiny_tokens(2, 9))
    before = [layer.keys.clone() for layer in first.past_key_values.layers]
    second = compiled(tiny_tokens(2, 1, seed=1), past_key_values=first.past_key_values)
    for old, layer in zip(before, second.past_key_values.layers, strict=True):
        assert layer.keys.shape[2] == 10 and torch.equal(layer.keys[:, :, :9], old)


def test_idempotent(build):
    built = build("llama", **RTN)
    outputs = len(graph_tools.output_args(built.gm.graph))
    assert QuantizeKvCache().run(built.gm, built.ctx) == 0
    assert len(quantizers(built.gm)) == 4 and outputs == 5
