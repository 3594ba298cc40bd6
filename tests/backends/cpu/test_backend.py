"""Whole tiny models on the CPU kernels: integers of the law, same tokens as those in PyTorch, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.cpu.target import CPU, why_not_columns, why_not_head, why_not_transform
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.lower import lower
from resq_compiler.backends.fused.runner import prepare

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens
from tests.backends.coded import FORM, coded_kernels
from tests.backends.comparing import ComparingKernels
from tests.conftest import with_layer_norms, with_prefix

BLOCK = dict(norm_quantize=2, mixed_linear=4, rope_cache=1, attention_quantize=1, hadamard_quantize=1)
GREEDY = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)


@pytest.fixture(autouse=True)
def built_library(library, poisoned_memory, monkeypatch):
    """The kernels are those of the tree, installed or not."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(libraries, "unavailable", lambda: None)


@pytest.fixture
def compiled(compile_tiny, sharing):
    """(family, **options) -> (reference model, the same on the kernels)."""

    def make(family: str, **options):
        defaults = {} if isinstance(options.get("recipe"), tuple) else {"recipe": "resq", "weight_method": "rtn"}
        reference, _ = compile_tiny(family, **{**defaults, **options})
        return reference, sharing(reference).use_backend("cpu", engine="torch")

    return make


def padded(seed=0):
    ids = tiny_tokens(2, 9, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def compare_operators(reference, monkeypatch):
    """Run a model with every operator computed twice; returns how often each was called."""
    runner = prepare(reference.graph_module, CPU, torch.float32, False, 1)
    ids, mask = padded()
    shapes = [node.meta["val"].shape for node in graph_tools.placeholders(reference.graph_module.graph)[3:]]
    checked = ComparingKernels(CPU, FORM)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "find_target", lambda name: dataclasses.replace(CPU, kernels=checked))
        runner(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), *(torch.zeros(2, s[1], 0, s[3]) for s in shapes))
    checked.check()
    return len(runner.caches), checked.counts


def assert_same_tokens(ours, padding):
    """In one of three prompts a query or weight of attention next to the boundary of a code may fall to the other side."""
    same = []
    for ids, mask in map(padded, range(3)):
        options = dict(GREEDY, attention_mask=mask) if padding else GREEDY
        with coded_kernels():
            expected = ours.generate(ids, **options)
        same.append(torch.equal(ours.generate(ids, **options), expected))
    assert sum(same) >= 2, same


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_operator_computes_its_integers_and_generates_the_same_tokens(family, compiled, monkeypatch):
    reference, ours = compiled(family)
    layers, counts = compare_operators(reference, monkeypatch)
    assert counts == {name: layers * count for name, count in BLOCK.items()}
    assert_same_tokens(ours, padding=True)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(recipe="quarot")),
        ("llama", dict(recipe="rtn")),
        ("llama", dict(recipe="resq+", allocation="equal")),
        ("llama", dict(recipe="resq+", allocation="equal", activation_group_size=32)),
        ("llama", dict(recipe="quarot", activation_group_size=32)),
        ("llama", dict(key_basis="head", site_fractions="mlp=1/4,o=0,value=0")),
        ("llama", dict(kv_bits=8)),
        ("llama", dict(lm_head_bits=8)),
        ("llama", dict(activation_bits=8)),
        ("llama", dict(activation_bits=8, kv_bits=8)),
        ("opt", dict(recipe=with_layer_norms())),
        ("llama", dict(recipe=with_prefix())),
    ],
    ids=str,
)
def test_recipes_and_options(family, options, compiled, monkeypatch):
    reference, ours = compiled(family, **options)
    compare_operators(reference, monkeypatch)
    assert_same_tokens(ours, padding=False)


def test_the_quantized_graph_comes_back(compiled):
    reference, _ = compiled("llama")
    restored = prepare(reference.graph_module, CPU, torch.float32, False, 1).quantized_graph()
    expected, got = dict(reference.graph_module.named_buffers()), dict(restored.named_buffers())
    assert got.keys() == expected.keys() and all(torch.equal(got[name], t) for name, t in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_bits=16), r"backend cpu cannot take 2 nodes:\n  attention\S*: the key/value cache is not quantized"),
        (dict(activation_bits=16), r"weight_only_linear\S*: 16-bit activations"),
    ],
    ids=["cache", "activations"],
)
def test_what_is_refused(options, message, compiled):
    with pytest.raises(BackendError, match=f"(?s){message}"):
        compiled("llama", **options)


def test_limits():
    assert why_not_columns(65536) is None and why_not_head(256) is None and why_not_transform(8192) is None
    assert why_not_columns(65537) == "65537 input columns, the kernels take at most 65536"
    assert why_not_head(257) == "heads of 257 columns, the kernels take at most 256"


def test_heads_that_are_too_wide_are_named(compile_tiny):
    reference, _ = compile_tiny("llama", recipe="resq", weight_method="rtn")
    narrow = dataclasses.replace(CPU, why_not_head=lambda n: f"heads of {n} columns are too wide")
    with pytest.raises(BackendError, match=r"attention\S*: heads of 16 columns are too wide"):
        lower(graph_tools.snapshot(reference.graph_module), narrow)
