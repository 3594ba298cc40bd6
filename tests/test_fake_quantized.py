"""A compiled model against the same model rounded in eager PyTorch: float graph, formulas written out here, no integer product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from resq_compiler.frontend.capture import concrete_example
from resq_compiler.ir import meta
from resq_compiler.ir.linears import linear_sums
from resq_compiler.ir.views import AppendCache, CodedLinear, Dequantize, Linear, Quantize, QuantizeDequantize


def rounded(x: Tensor, bits: int, clip: float) -> Tensor:
    """Asymmetric, one scale for the last dimension."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0) * clip, x.amax(-1, keepdim=True).clamp_min(0) * clip
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


class Rounded(Interpreter):
    """Runs the float graph; inputs of linears, their weights and cache entries are rounded as the compiled graph says."""

    def __init__(self, float_graph, compiled):
        super().__init__(float_graph)
        self.compiled = compiled.graph_module
        facts = ((node, meta.get(node, meta.LinearPart)) for node in self.compiled.graph.nodes)
        self.parts = {(fact.site.name, fact.index): node for node, fact in facts if fact is not None}
        caches = (AppendCache.of(node) for node in self.compiled.graph.nodes)
        self.caches = {str(c.past): QuantizeDequantize.of(c.new) for c in caches if c is not None}
        self.seen: set[tuple[str, int]] = set()

    def run_node(self, n: Node):
        fact, cache = meta.get(n, meta.LinearPart), AppendCache.of(n)
        if fact is not None:
            self.seen.add((fact.site.name, fact.index))
            return self.part(Linear.require(n), self.parts[fact.site.name, fact.index])
        if cache is not None and self.caches[str(cache.past)] is not None:
            found = self.caches[str(cache.past)]
            new = [rounded(self.env[cache.new][..., a:b], bits, found.clip) for bits, a, b in found.parts]
            return torch.cat((self.env[cache.past], torch.cat(new, -1)), -2)
        return super().run_node(n)

    def part(self, view: Linear, node: Node) -> Tensor:
        assert view.bias is None
        x, weight = self.env[view.x], view.weight_tensor(self.module)
        coded = CodedLinear.of(node)
        source = node.all_input_nodes[0] if coded is None else coded.x
        image = Dequantize.of(source)
        quantizer = Quantize.of(source if image is None else image.codes)
        if quantizer is not None:
            groups = x.unflatten(-1, (quantizer.groups, -1))
            x = rounded(groups, quantizer.bits, quantizer.clip).flatten(-2)
        if coded is not None:
            weight = coded.codes(self.compiled).float() * coded.scales(self.compiled)[:, None]
        return x @ weight.T


CASES = {
    "W4A4KV4": ({}, {(4, 4), (8, 8)}, {4, 8}),
    "W4A16": ({"activation_bits": 16, "kv_bits": 16}, {(4, 16), (8, 16)}, set()),
    "W8A8": ({"weight_bits": 8, "activation_bits": 8, "kv_bits": 16}, {(8, 8)}, set()),
    "W16A4KV4": ({"weight_bits": 16}, {(16, 4), (16, 8)}, {4, 8}),
    "W3A5KV6": ({"weight_bits": 3, "activation_bits": 5, "kv_bits": 6}, {(3, 5), (8, 8)}, {6, 8}),
    "three parts": ({"low_fraction": 0.25}, {(2, 2), (4, 4), (8, 8)}, {2, 4, 8}),
    "per token": ({"o_proj_granularity": "token"}, {(4, 4), (8, 8)}, {4, 8}),
    "groups": ({"activation_group_size": 32, "activation_clip": 0.95}, {(4, 4), (8, 8)}, {4, 8}),
    "clips": ({"activation_clip": 0.95, "kv_clip": 0.9, "weight_clip": "hessian"}, {(4, 4), (8, 8)}, {4, 8}),
    "energy-split": ({"down_proj": "energy-split"}, {(4, 4), (8, 8)}, {4, 8}),
}


CHECKS = [("llama", name) for name in CASES] + [(family, "W4A4KV4") for family in ("qwen2", "gemma2", "opt")]


@pytest.mark.parametrize(("family", "name"), CHECKS)
def test_the_compiled_graph_computes_the_rounded_model(compile_tiny, family, name):
    """Bits are those asked for; nine of ten tokens agree within float32 rounding, and a code at a tie moves the others a little."""
    options, bits, kv_bits = CASES[name]
    compiled, float_graph = compile_tiny(family, weight_method="rtn", **options)
    facts = [fact for s in linear_sums(compiled.graph_module) for fact in s.facts]
    assert {(f.weight_bits, f.activation_bits) for f in facts} == bits
    eager = Rounded(float_graph, compiled)
    assert {b for found in eager.caches.values() if found is not None for b, *_ in found.parts} == kv_bits
    errors = []
    for past, new in ((7, 5), (0, 12), (9, 1)):
        inputs = concrete_example(131, compiled.cache_specs, new=new, past=past)
        with torch.no_grad():
            expected, got = eager.run(*inputs)[0], compiled.graph_module(*inputs)[0]
        seen = inputs[1][:, -new:].bool()
        errors.append((got - expected)[seen].norm(dim=-1) / expected[seen].norm(dim=-1))
    assert eager.seen == eager.parts.keys()
    errors = torch.cat(errors)
    assert float((errors < 1e-5).float().mean()) > 0.8 and float(errors.max()) < 0.3
