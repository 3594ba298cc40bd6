"""Mixtures as one operator: what the graph they came from computes, in bits; codes come back; what is not taken says why."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.experts import ExpertPart, experts_below, pack_experts
from resq_compiler.backends.fused.formats import InputPart
from resq_compiler.backends.fused.lower import lower
from resq_compiler.backends.fused.plain import TORCH
from resq_compiler.backends.fused.runner import prepare

import resq_compiler
from resq_compiler.ir import graph_tools
from resq_compiler.ir.promises import Promised, in_memory
from resq_compiler.tiny import tiny_tokens
from tests.backends.fused.test_lower import assert_same_bits, calls
from tests.families import small

OPTIONS = {"calibration_samples": 8, "calibration_length": 32, "weight_method": "rtn", "unreached_experts": "layer"}
TAKEN = {
    "mixtral": {},
    "qwen2_moe": {"expert_bits": "0=4632/8866,1=8246/8888"},  # a shared expert reads the same values
    "glm4_moe": {"recipe": "quarot"},
    "gpt_oss": {"recipe": "rtn"},  # biases, a clamped activation, no transform
    "granitemoe": {"recipe": "resq+", "allocation": "equal"},  # two parts behind the activation
}
LEFT = {
    "three": (
        {"low_fraction": 0.125},
        "of a mixture that no grouped kernel takes: its input has parts of .* bits; grouped kernels take two",
    ),
    "groups": ({"weight_group_size": 32, "recipe": "rtn"}, "takes: its weights have a scale for every 32 columns"),
    "float": ({"activation_bits": 16}, "takes: 16-bit activations"),
}


@functools.cache
def compiled(name, **options):
    return resq_compiler.compile(small(name), tiny_tokens(8, 32), **(OPTIONS | options))


@pytest.mark.parametrize("name", TAKEN)
def test_one_operator_computes_the_same_bits(name):
    gm = compiled(name, **TAKEN[name]).graph_module
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert calls(runner)["experts"] == (1 if name == "glm4_moe" else 2) and not runner.reasons
    assert_same_bits(gm, runner)
    restored, expected = dict(runner.quantized_graph().named_buffers()), dict(gm.named_buffers())
    assert restored.keys() == expected.keys() and all(torch.equal(restored[n], t) for n, t in expected.items())


def test_what_shared_experts_read_is_quantized_once():
    gm = compiled("qwen2_moe", **TAKEN["qwen2_moe"]).graph_module
    lowered = lower(graph_tools.snapshot(gm), TORCH)
    for node in lowered.graph_module.graph.find_nodes(op="call_function", target=operators.experts):
        readers = {user.target for user in node.args[0].users}
        assert readers == {operators.experts, operators.mixed_linear}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_says_why(name):
    options, reason = LEFT[name]
    lowered = lower(graph_tools.snapshot(compiled("mixtral", **options).graph_module), TORCH, allow_fallback=True)
    of_experts = [text for node, text in lowered.reasons.items() if "expert" in node]
    assert of_experts and calls(lowered)["experts"] == 0
    assert all(re.search(reason, text) for text in of_experts)


def test_weights_come_back_from_every_format(target):
    """Bits of every expert's own where a target packs by them."""
    g = torch.Generator().manual_seed(0)
    parts = (InputPart(4, 40), InputPart(8, 24))
    given = [
        ExpertPart(
            torch.randint(-8, 8, (3, 70, part.columns), generator=g, dtype=torch.int8),
            torch.rand(3, 70, generator=g),
            bits,
        )
        for part, bits in zip(parts, ((4, 8, 4), (8, 8, 4)), strict=True)
    ]
    packed = pack_experts(target.codes, given, parts, None)
    assert packed.bits.tolist() == [[4, 8], [8, 8], [4, 4]] and packed.scale.shape == (3, 2, 70)
    for i, one in enumerate(given):
        assert torch.equal(packed.unpacked(target.codes, i), one.codes)
    summed = [one.codes for one, part in zip(given, parts, strict=True) if not target.codes.is_centred(part)]
    assert torch.equal(packed.row_sum, torch.stack([codes.sum(-1, dtype=torch.int32) for codes in summed], 1))
    pieces = [[one.codes[:, :30], Promised(in_memory(one.codes[:, 30:]))] for one in given]
    promised = [replace(one, codes=experts_below(codes, later=True)) for one, codes in zip(given, pieces, strict=True)]
    later = pack_experts(target.codes, promised, parts, None)
    for value, expected in ((later.codes, packed.codes), (later.row_sum, packed.row_sum)):
        assert isinstance(value, Promised) and value.shape == expected.shape
        assert torch.equal(value.make(), expected)
        assert torch.equal(torch.cat(list(value.promise.pieces())), expected)
