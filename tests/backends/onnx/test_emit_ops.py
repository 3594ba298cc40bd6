"""Emitters of our own operators against the operators, in every form: norms, heads, rotary embedding, projections, masks, attention."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.onnx import emit_ops
from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.form_qdq import QdqForm, WeightOnlyForm
from resq_compiler.backends.onnx.forms import repeats_half
from resq_compiler.backends.onnx.registry import EMITTERS

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.ops import OPS
from tests.backends.onnx.graphs import Weight, check, check_call

torch.manual_seed(0)
X = torch.randn(2, 3, 24)
HEADS = torch.randn(2, 4, 3, 6)
FORMS = pytest.mark.parametrize("form", [QdqForm, IntegerForm, WeightOnlyForm])


def orthogonal(*shape):
    return torch.linalg.qr(torch.randn(*shape))[0]


@FORMS
@pytest.mark.parametrize("gain", [None, torch.randn(24)])
def test_rms_norm(form, gain):
    check_call(ops.rms_norm, X, None if gain is None else Weight(gain), 1e-5, form=form())


@FORMS
def test_norms_of_heads_keep_their_order(form):
    gain = torch.randn(6)
    for target, rest in ((ops.rms_norm, (1e-5,)), (aten.layer_norm.default, (Weight(gain), 1e-5))):

        def build(graph, x):
            heads = graph.call(ops.split_heads, x, 4)
            shape = () if target is ops.rms_norm else ([6],)  # noqa: B023
            return graph.call(target, heads, *shape, Weight(gain), *rest)  # noqa: B023

        check({"x": X}, build, form())


@pytest.mark.parametrize("affine", [(None, None), (torch.randn(24), None), (torch.randn(24), torch.randn(24))])
def test_layer_norm(affine):
    weights = [None if value is None else Weight(value) for value in affine]
    check_call(aten.layer_norm.default, X, [24], *weights, 1e-5)


def test_layer_norm_over_two_dimensions_is_refused():
    with pytest.raises(BackendError, match="over the last dimension"):
        check_call(aten.layer_norm.default, X, [3, 24])


def test_heads_apart_and_together():
    check_call(ops.split_heads, X, 4, tolerance=0)
    check_call(ops.merge_heads, HEADS, tolerance=0)
    check({"x": X}, lambda graph, x: graph.call(ops.merge_heads, graph.call(ops.split_heads, x, 4)), tolerance=0)


@pytest.mark.parametrize("split", [False, True])
def test_columns(split):
    """Pieces that tile a value come out of one Split; others are slices."""

    def build(cuts):
        def made(graph, x):
            value = graph.call(ops.split_heads, x, 2) if split else x
            pieces = [graph.call(ops.columns, value, *cut) for cut in cuts]
            return graph.call(aten.cat.default, pieces[::-1], -1)

        return made

    width = 12 if split else 24
    kinds = [n.op_type for n in check({"x": X}, build([(0, 5), (5, width)]), tolerance=0).low.b.nodes]
    assert kinds.count("Split") == 1 and "Slice" not in kinds
    kinds = [n.op_type for n in check({"x": X}, build([(1, 5), (5, width)]), tolerance=0).low.b.nodes]
    assert kinds.count("Slice") == 2 and "Split" not in kinds


def tables(graph, positions, width, repeated):
    """cos and sin [B, 1, S, width], of angles that repeat their first half or not."""
    angles = graph.call(
        aten.mul.Tensor, graph.call(aten.unsqueeze.default, positions, -1), Weight(torch.rand(width // 2))
    )
    other = angles if repeated else graph.call(aten.mul.Tensor, angles, 0.5)
    both = graph.call(aten.cat.default, [angles, other], -1)
    return [graph.call(aten.unsqueeze.default, graph.call(t, both), 1) for t in (aten.cos.default, aten.sin.default)]


@FORMS
@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("width", [6, 4])
def test_rope(form, width, repeated):
    """All columns of a head or some; by RotaryEmbedding only where both halves of the tables are alike."""

    def build(graph, x, positions):
        cos, sin = tables(graph, positions, width, repeated)
        assert repeats_half(cos) == repeats_half(sin) == repeated
        return graph.call(ops.rope, graph.call(ops.split_heads, x, 4), cos, sin)

    positions = torch.tensor([[0.0, 1, 2], [5, 6, 700]])
    lowered = check({"x": X, "positions": positions}, build, form(), tolerance=2e-6)
    fused = "RotaryEmbedding" in {n.op_type for n in lowered.low.b.nodes}
    assert fused == (repeated and form is IntegerForm)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_project(inverse, split):
    u = Weight(orthogonal(6, 6) if split else orthogonal(24, 24))

    def build(graph, x):
        return graph.call(ops.project, graph.call(ops.split_heads, x, 4) if split else x, u, inverse)

    check({"x": X}, build)


@pytest.mark.parametrize("inverse", [False, True])
def test_project_heads(inverse):
    """A basis for each of two key heads, four query heads; heads that are token-major and heads that are not."""
    u = Weight(orthogonal(2, 6, 6))
    check({"x": X}, lambda graph, x: graph.call(ops.project_heads, graph.call(ops.split_heads, x, 4), u, inverse))
    check_call(ops.project_heads, HEADS, u, inverse)


@pytest.mark.parametrize("inverse", [False, True])
def test_project_kronecker(inverse):
    check_call(ops.project_kronecker, X, Weight(orthogonal(4, 4)), Weight(2 * orthogonal(6, 6)), inverse)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_scaled_and_permuted_channels(inverse, split):
    width = 6 if split else 24
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))

    def build(graph, x):
        value = graph.call(ops.split_heads, x, 4) if split else x
        value = graph.call(ops.permute_channels, value, Weight(order), inverse)
        return graph.call(ops.scale_channels, value, Weight(torch.arange(1.0, width + 1)), inverse)

    check({"x": X}, build, tolerance=1e-6)


def test_project_blocks():
    arguments = Weight(orthogonal(4, 6, 6)), Weight(torch.randperm(24))
    check_call(ops.project_blocks, X, *arguments)
    with pytest.raises(BackendError, match="an inverse of project_blocks is not emitted"):
        check_call(ops.project_blocks, X, *arguments, True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    ("width", "sizes"),
    [(24, None), (24, (20, 4)), (64, None), (1, None), (160, (140, 20)), (576, None), (28, (16, 12))],
)
def test_hadamard(width, sizes, transpose):
    check_call(ops.hadamard, torch.randn(2, 3, width), transpose, sizes)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("new", [1, 3, 5])
def test_causal_mask(new, window):
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, :2] = 0
    inputs = {"attention_mask": mask, "input_ids": torch.zeros(2, new, dtype=torch.int64)}
    check(inputs, lambda graph, mask, ids: graph.call(ops.causal_mask, mask, ids, window))


def test_prefix():
    check_call(ops.see_prefix, torch.rand(2, 1, 3, 4) > 0.5, 2)
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "x": HEADS}
    prefix = Weight(torch.randn(1, 4, 2, 6))
    check(inputs, lambda graph, ids, x: graph.call(ops.prepend, prefix, x), tolerance=0)


@FORMS
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("mask", ["bool", "float", None])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention(form, groups, mask, softcap):
    """Four query heads on one, two and four key heads; three new tokens, five keys, values of another width."""
    masks = {"bool": torch.ones(2, 1, 3, 5).tril(2).bool(), "float": torch.randn(2, 1, 3, 5), None: None}
    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "x": X,
        "k": torch.randn(2, groups, 5, 6),
        "v": torch.randn(2, groups, 5, 8),
    }
    if masks[mask] is not None:
        inputs["mask"] = masks[mask]

    def build(graph, ids, x, k, v, *given):
        q = graph.call(ops.split_heads, x, 4)
        return graph.call(ops.attention, q, k, v, given[0] if given else None, 0.4, softcap)

    check(inputs, build, form(), tolerance=1e-5)


def test_experts():
    """Rows of one expert, of several and of none, with a value for each token and for each of its choices."""
    ids, indices = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 3], [3, 4], [1, 4], [3, 1], [1, 3], [0, 3]])
    weight, bias = Weight(torch.randn(6, 4, 5)), Weight(torch.randn(6, 4))
    for x, given in ((torch.randn(2, 3, 5), None), (torch.randn(2, 3, 2, 5), None), (torch.randn(2, 3, 5), bias)):
        inputs = {"input_ids": ids, "x": x, "indices": indices}
        check(inputs, lambda graph, _, x, indices, b=given: graph.call(ops.expert_linear, x, weight, indices, b))
    values_of = {"input_ids": ids, "x": torch.randn(2, 3, 2, 4), "indices": indices}
    check(values_of, lambda graph, _, x, indices: graph.call(ops.add_expert_bias, x, bias, indices))
    weights = {"input_ids": ids, "x": torch.randn(2, 3, 2, 4), "weights": torch.rand(6, 2)}
    check(weights, lambda graph, _, x, weights: graph.call(ops.combine_experts, x, weights))


@pytest.mark.parametrize("form", [QdqForm, IntegerForm])
def test_attention_with_sinks(form):
    """A score of each head that has no value."""
    inputs = {
        "input_ids": torch.zeros(2, 3, dtype=torch.int64),
        "x": X,
        "k": torch.randn(2, 2, 5, 6),
        "v": torch.randn(2, 2, 5, 8),
    }
    sinks = Weight(torch.randn(4))

    def build(graph, ids, x, k, v):
        return graph.call(ops.attention, graph.call(ops.split_heads, x, 4), k, v, None, 0.4, None, sinks)

    check(inputs, build, form(), tolerance=1e-5)


def test_every_emitter_of_this_module_is_tested_or_needs_a_cache():
    """Quantizers and linears: test_forms.py, of experts: test_experts.py; caches: test_packed_cache.py and test_profiles.py."""
    elsewhere = {
        ops.quantize, ops.dequantize, ops.quantize_dequantize, ops.quantized_linear, ops.weight_only_linear, ops.append_cache,
        ops.quantized_expert_linear, ops.weight_only_expert_linear,
    }  # fmt: skip
    here = {
        ops.rms_norm, aten.layer_norm.default, ops.split_heads, ops.merge_heads, ops.columns, ops.rope, ops.project, ops.project_heads,
        ops.project_blocks, ops.project_kronecker, ops.scale_channels, ops.permute_channels, ops.hadamard,
        ops.causal_mask, ops.see_prefix, ops.prepend, ops.attention, ops.expert_linear, ops.add_expert_bias, ops.combine_experts,
    }  # fmt: skip
    known = {target for target, emitter in EMITTERS.items() if emitter.__module__ == emit_ops.__name__}
    assert known == here | elsewhere and set(OPS.values()) <= known
