"""Lowering to fused operators: on the torch target every family computes the same bits as the graph it came from."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.lower import Lowered, lower
from resq_compiler.backends.fused.plain import TORCH
from resq_compiler.backends.fused.runner import FusedRunner, prepare
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.views import Norm
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens
from tests.conftest import with_layer_norms, with_online_bases

BLOCK = dict(norm_quantize=2, mixed_linear=4, rope_cache=1, attention_quantize=1, hadamard_quantize=1)
LAYERS = {"gemma3": 3}


@pytest.fixture
def reference(compiled):
    """(family, **options) -> the quantized graph."""

    def make(family: str, **options):
        defaults = {} if isinstance(options.get("recipe"), tuple) else {"recipe": "resq", "weight_method": "rtn"}
        return compiled(family, **{**defaults, **options}).graph_module

    return make


def calls(lowered: Lowered | FusedRunner) -> Counter:
    nodes = lowered.graph_module.graph.nodes
    return Counter(str(n.target).split(".")[1] for n in nodes if getattr(n.target, "namespace", "") == "resq")


def prompt(gm) -> tuple[Tensor, ...]:
    """Nine tokens in two sequences, one padded on the left; then empty caches."""
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    shapes = [node.meta["val"].shape for node in graph_tools.placeholders(gm.graph)[3:]]
    empty = [torch.zeros(2, shape[1], 0, shape[3]) for shape in shapes]
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), *empty


def next_token(inputs: tuple[Tensor, ...], present) -> tuple[Tensor, ...]:
    mask = torch.nn.functional.pad(inputs[1], (0, 1), value=1)
    return tiny_tokens(2, 1, seed=1), mask, mask.sum(-1, keepdim=True) - 1, *present


def assert_same_bits(gm, runner: FusedRunner) -> None:
    """A prefill, and a token behind it. What padding computes is nobody's business: its rows see nothing."""
    inputs = prompt(gm)
    with torch.no_grad():
        expected, *past = gm(*inputs)
        ours, *packed = runner(*inputs)
        assert torch.equal(ours[0, 3:], expected[0, 3:]) and torch.equal(ours[1], expected[1])
        expected, ours = gm(*next_token(inputs, past))[0], runner(*next_token(inputs, packed))[0]
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_computes_the_same_bits(family, reference):
    gm = reference(family)
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    layers = LAYERS.get(family, 2)
    assert calls(runner) == {name: layers * count for name, count in BLOCK.items()}
    assert not runner.reasons and not runner.left
    assert_same_bits(gm, runner)


@pytest.mark.parametrize(
    "options",
    [
        dict(recipe="quarot"),
        dict(recipe="rtn"),
        dict(recipe="resq+", allocation="equal"),
        dict(key_basis="head", site_fractions="mlp=1/4,o=0,value=0"),
        dict(kv_bits=8),
        dict(lm_head_bits=8),
    ],
    ids=str,
)
def test_recipes_and_options(options, reference):
    gm = reference("llama", **options)
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert not runner.reasons
    assert_same_bits(gm, runner)


def test_layer_norms_are_fused(reference):
    """Gain, bias and mean are the operator's; no norm but the last is left."""
    gm = reference("opt", recipe=with_layer_norms())
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    quantizing = [n for n in runner.graph_module.graph.nodes if n.target is operators.norm_quantize]
    normed = [n for n in quantizing if n.args[3] == "layer"]
    assert len(normed) == 4 and all(n.args[1] is not None and n.args[2] is not None for n in normed)
    assert len(runner.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)) == 1
    assert_same_bits(gm, runner)


def test_norms_that_keep_their_gains_in_a_stream_that_changes_basis(reference):
    """A product with one matrix stands behind the norm; all else is as ever."""
    gm = reference("llama", recipe=with_online_bases(weight_method="rtn"))
    online = [n for n in gm.graph.nodes if (f := meta.get(n, meta.Projection)) and f.basis == "U_A"]
    assert 0 < len(online) < 4 and all(Norm.require(n.args[0]).gain is None for n in online)
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert calls(runner) == {name: 2 * count for name, count in BLOCK.items()} and not runner.reasons
    assert_same_bits(gm, runner)


def test_three_parts_are_two_operators(reference):
    """The sum of the parts is taken in another order: float32 rounding, unless it moves a code."""
    gm = reference("llama", low_fraction=0.125, kv_bits=8)
    lowered = lower(graph_tools.snapshot(gm), TORCH, allow_fallback=True)
    assert calls(lowered)["mixed_linear"] > 8


def test_a_target_may_take_linears_one_by_one(reference):
    gm = reference("llama")
    apart = dataclasses.replace(TORCH, stacked=False)
    runner = prepare(gm, apart, torch.float32, False, 1)
    assert calls(runner) == {name: 2 * count for name, count in (BLOCK | dict(mixed_linear=7)).items()}
    assert_same_bits(gm, runner)


def test_the_quantized_graph_comes_back(reference):
    gm = reference("llama")
    restored = prepare(gm, TORCH, torch.float32, False, 1).quantized_graph()
    expected, got = dict(gm.named_buffers()), dict(restored.named_buffers())
    assert got.keys() == expected.keys() and all(torch.equal(got[name], t) for name, t in expected.items())
    assert [n.name for n in restored.graph.nodes] == [n.name for n in gm.graph.nodes]


def test_inputs_of_a_lowered_graph(reference):
    gm = reference("llama")
    names = [n.name for n in graph_tools.placeholders(lower(graph_tools.snapshot(gm), TORCH).graph_module.graph)]
    caches = [f"{kind}_cache_{layer}" for layer in range(2) for kind in ("key", "value")]
    assert names == ["input_ids", "attention_mask", "position_ids", "cache_start", *caches]


# what is left to PyTorch, and why ---------------------------------------------------------------------------------------


def test_every_node_that_cannot_be_taken_is_named(reference):
    gm = reference("llama", kv_bits=16)
    message = (
        r"(?s)backend torch cannot take 2 nodes:\n  attention\S*: the key/value cache is not quantized.*\n  attention"
    )
    with pytest.raises(BackendError, match=message + ".*allow_fallback=True"):
        lower(graph_tools.snapshot(gm), TORCH)
    runner = prepare(gm, TORCH, torch.float32, True, 1)
    assert len(runner.reasons) == 2 and runner.caches == (None, None)
    assert sum("left to PyTorch: attention" in line for line in runner.stages[0].lines) == 2
    assert_same_bits(gm, runner)


def test_float_activations_are_named(reference):
    with pytest.raises(BackendError, match=r"(?s)weight_only_linear\S*: 16-bit activations"):
        lower(graph_tools.snapshot(reference("llama", activation_bits=16)), TORCH)


def test_rows_wider_than_a_target_takes(reference):
    narrow = dataclasses.replace(TORCH, why_not_columns=lambda n: f"{n} columns are too many" if n > 64 else None)
    with pytest.raises(BackendError, match=r"(?s)linear\S*: 160 columns are too many"):
        lower(graph_tools.snapshot(reference("llama")), narrow)


def test_transforms_that_a_target_does_not_take_are_noted(reference):
    gm = reference("llama")
    none = dataclasses.replace(TORCH, why_not_transform=lambda n: f"no transform of {n} columns")
    runner = prepare(gm, none, torch.float32, False, 1)
    assert calls(runner) == {
        k: 2 * n for k, n in (BLOCK | dict(norm_quantize=3, hadamard=1, hadamard_quantize=0)).items() if n
    }
    assert (
        list(runner.left.values()) == ["its Hadamard transform is computed by PyTorch: no transform of 160 columns"] * 2
    )
    assert_same_bits(gm, runner)


def test_weights_with_groups_are_refused_with_the_reason(reference):
    with pytest.raises(
        BackendError, match="(?s)cannot take.*a scale for every 32 columns.*compile with weight_group_size=None"
    ):
        lower(graph_tools.snapshot(reference("llama", weight_group_size=32)), TORCH)
