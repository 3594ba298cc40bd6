"""Quantizers and linears of every form against the integer law: codes, zero points and accumulators as integers, exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto
from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.form_qdq import QdqForm, WeightOnlyForm
from resq_compiler.backends.onnx.forms import FLT_MIN
from resq_compiler.backends.onnx.integer_weights import (
    PIECE,
    correction_count,
    correction_rows,
    stacked_bias,
    stored_zero,
)
from resq_compiler.backends.onnx.packed_cache import with_packed_cache
from resq_compiler.backends.onnx.plan import Product, Term
from resq_compiler.backends.onnx.values import Codes, PackedValue

from resq_compiler.errors import BackendError
from resq_compiler.ir import meta, ops
from resq_compiler.ir.graph_tools import aten
from tests.backends.onnx.graphs import Lowered, Weight, check

FORMS = pytest.mark.parametrize("form", [QdqForm, IntegerForm, WeightOnlyForm])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
IDS = torch.zeros(3, 4, dtype=torch.int64)
SITE = meta.LinearSite("layer", "up", 0)


def rows(width: int, seed: int = 0) -> torch.Tensor:
    """[3, 4, width]: usual rows, and rows of zeros, of one sign, with a large value, tiny, and equal."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, width, generator=generator)
    x[0, 0], x[0, 1], x[0, 2] = 0, x[0, 1].abs(), -x[0, 2].abs()
    x[1, 0, 0], x[1, 1], x[1, 2] = 1e4, x[1, 1] * 1e-30, 3.0
    return x


def codes_of(lowered: Lowered, stored_by: int) -> list[tuple[np.ndarray, ...]]:
    """(codes, zero point, scale) from each evaluator, as the law writes them."""
    found = lowered.emitted
    assert isinstance(found, Codes)
    wide = [lowered.low.b.op("Cast", name, to=TensorProto.INT32) for name in (found.codes, found.zero_point)]
    return [(q - stored_by, z - stored_by, scale) for q, z, scale in lowered.run(*wide, found.scale)]


def assert_same_scale(scale: np.ndarray, law: torch.Tensor) -> None:
    """Equal, and normal numbers; hi is at least the floor of a scale, which shows in ranges that are hardly above it."""
    np.testing.assert_allclose(scale, law.numpy(), rtol=0, atol=1.001 * FLT_MIN)
    assert (scale >= FLT_MIN).all()


@FORMS
@BITS
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_codes_are_the_laws(form, bits, clip):
    """uint8 codes of the integer form are stored with the largest one at 255."""
    inputs = {"input_ids": IDS, "x": rows(20)}
    lowered = Lowered(inputs, lambda graph, ids, x: graph.call(ops.quantize, x, bits, 1, clip), form())
    law = ops.quantize(inputs["x"], bits, 1, clip)
    offset = stored_zero(bits) + 2 ** (bits - 1) if form is IntegerForm else 0
    for codes, zero_point, scale in codes_of(lowered, offset):
        np.testing.assert_array_equal(codes, law.qdata.numpy())
        np.testing.assert_array_equal(zero_point, law.zero_point.numpy())
        assert_same_scale(scale, law.scale)


@FORMS
@BITS
@pytest.mark.parametrize(("groups", "clip"), [(1, 1.0), (1, 0.9), (4, 1.0), (4, 0.9)])
def test_images_are_the_laws(form, bits, groups, clip):
    """To the last bit of a product; a value at a tie of a symmetric range may get one step more where the clamp is left out."""
    inputs = {"input_ids": IDS, "x": rows(20)}

    def build(graph, ids, x):
        return graph.call(ops.dequantize, graph.call(ops.quantize, x, bits, groups, clip))

    check(inputs, build, form(), tolerance=2e-7)


PARTS = [((4, 0, 14), (8, 14, 16)), ((4, 0, 16),), ((2, 0, 3), (4, 3, 12), (8, 12, 16)), ((3, 0, 9), (6, 9, 16))]


@FORMS
@pytest.mark.parametrize("clip", [1.0, 0.95])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_cache_images_are_the_laws(form, heads, parts, clip):
    inputs = {"input_ids": IDS, "x": rows(16 * heads)}

    def build(graph, ids, x):
        return graph.call(ops.quantize_dequantize, graph.call(ops.split_heads, x, heads), parts, clip)

    check(inputs, build, form(), tolerance=2e-7)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_packed_cache_holds_the_laws_codes(parts):
    inputs = {"input_ids": IDS, "x": rows(32)}

    def build(graph, ids, x):
        return graph.call(ops.quantize_dequantize, graph.call(ops.split_heads, x, 2), parts)

    lowered = Lowered(inputs, build, with_packed_cache(IntegerForm()))
    found = lowered.emitted
    assert isinstance(found, PackedValue)
    heads = inputs["x"].unflatten(-1, (2, 16))
    for data, scales in lowered.run(found.data, found.scale):
        at, zero_points = 0, data[..., data.shape[-1] - len(parts) :]
        for i, (bits, start, stop) in enumerate(parts):
            law = ops.quantize(heads[..., start:stop].contiguous(), bits)
            codes, at = unpacked(data, at, bits, stop - start)
            np.testing.assert_array_equal(codes.astype(int) - 2 ** (bits - 1), law.qdata.numpy())
            np.testing.assert_array_equal(
                zero_points[..., i : i + 1].astype(int) - 2 ** (bits - 1), law.zero_point.numpy()
            )
            assert_same_scale(scales[..., i : i + 1], law.scale)
        assert at == data.shape[-1] - len(parts)


def unpacked(data: np.ndarray, at: int, bits: int, width: int) -> tuple[np.ndarray, int]:
    """Codes of one part, read as the format says, and where the next part begins."""
    if bits > 4:
        return data[..., at : at + width], at + width
    half = width // 2
    body, tail = data[..., at : at + half], data[..., at + half : at + half + width % 2]
    return np.concatenate([body & 15, body >> 4, tail], -1), at + half + width % 2


def linear_of(graph, x, parts, bias, groups, clip):
    """A linear [x0 | x1 | ..] on codes: each part (columns, activation bits, weight bits, codes [N, K])."""
    total, start = None, 0
    for index, (width, bits, weight_bits, codes) in enumerate(parts):
        piece = graph.call(ops.columns, x, start, start + width)
        source = piece if bits == 16 else graph.call(ops.quantize, piece, bits, groups, clip)
        target = ops.weight_only_linear if bits == 16 else ops.quantized_linear
        product = graph.call(target, source, Weight(codes), Weight(scales_of(codes)))
        meta.put(product, meta.LinearPart(SITE, index, start, start + width, weight_bits, bits))
        total = product if total is None else graph.call(aten.add.Tensor, total, product)
        start += width
    return total if bias is None else graph.call(aten.add.Tensor, total, Weight(bias))


def scales_of(codes: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.01, 0.2, codes.shape[0])


def codes(out: int, width: int, bits: int, seed: int) -> torch.Tensor:
    """Random weight codes with rows at both ends of the range, whose sums need several correction rows."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (out, width), generator=generator).to(torch.int8)
    found[0], found[1] = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    return found


MIXTURES = {
    "4 and 8 bits": [(20, 4, 4, 4), (6, 8, 8, 8)],
    "one part": [(26, 4, 4, 4)],
    "three parts": [(5, 2, 3, 3), (15, 4, 4, 4), (6, 8, 8, 8)],
    "float beside codes": [(20, 4, 4, 4), (6, 16, 8, 8)],
    "float activations": [(26, 16, 4, 4)],
}


@FORMS
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 7)])
@pytest.mark.parametrize(("groups", "clip"), [(1, 1.0), (1, 0.9), (2, 1.0)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_linears_are_the_laws(form, mixture, groups, clip, bias):
    """Integer parts are equal as integers (next test); their float sum is so to the last bits."""
    if groups == 2 and mixture == "three parts":
        pytest.skip("a part of odd width has no two groups")
    parts = [
        (width, bits, weight_bits, codes(7, width, weight_bits, i))
        for i, (width, bits, weight_bits, _) in enumerate(MIXTURES[mixture])
    ]
    inputs = {"input_ids": IDS, "x": rows(26)}
    lowered = check(
        inputs, lambda graph, ids, x: linear_of(graph, x, parts, bias, groups, clip), form(), tolerance=3e-6
    )
    assert len(lowered.low.plan.groups) == 1
    integer = form is IntegerForm and "float" not in mixture  # a product for each group
    assert sum(n.op_type == "MatMulInteger" for n in lowered.low.b.nodes) == (len(parts) * groups if integer else 0)


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("mixture", ["4 and 8 bits", "one part", "three parts"])
def test_accumulators_are_the_laws(mixture, clip):
    """Σ (q - zero point) w in int32, correction rows and all.

    Not where a row has no range: its zeros stand at the least number with a normal scale, and the product is below 1e-30.
    """
    parts = [
        (width, bits, weight_bits, codes(7, width, weight_bits, i))
        for i, (width, bits, weight_bits, _) in enumerate(MIXTURES[mixture])
    ]
    inputs = {"input_ids": IDS, "x": rows(26)}
    lowered = Lowered(inputs, lambda graph, ids, x: linear_of(graph, x, parts, None, 1, clip), IntegerForm())
    names = [n.output[0] for n in lowered.low.b.nodes if n.op_type == "MatMulInteger"]
    for results in lowered.run(*names):
        start = 0
        for found, (width, bits, _, weight) in zip(results, parts, strict=True):
            law = ops.quantize(inputs["x"][..., start : start + width].contiguous(), bits, 1, clip)
            exact = (law.qdata.long() - law.zero_point.long()) @ weight.long().T
            ranged = (law.scale > 1e-30).squeeze(-1).numpy()
            assert not ranged.all() and ranged.mean() > 0.8
            np.testing.assert_array_equal(found[ranged], exact.numpy()[ranged])
            start += width


def test_linears_of_one_input_are_one_product():
    weights = codes(7, 20, 4, 0), codes(5, 20, 4, 1)

    def build(graph, ids, x):
        source = graph.call(ops.quantize, x, 4)
        made = []
        for i, (weight, bias) in enumerate(zip(weights, (torch.randn(7), None), strict=True)):
            product = graph.call(ops.quantized_linear, source, Weight(weight), Weight(scales_of(weight)))
            meta.put(product, meta.LinearPart(meta.LinearSite(f"layer{i}", "up", 0), 0, 0, 20, 4, 4))
            made.append(product if bias is None else graph.call(aten.add.Tensor, product, Weight(bias)))
        return graph.call(aten.cat.default, made, -1)

    inputs = {"input_ids": IDS, "x": rows(20)}
    lowered = check(inputs, build, IntegerForm(), tolerance=3e-6)
    assert sum(n.op_type == "MatMulInteger" for n in lowered.low.b.nodes) == 1
    assert len(lowered.low.plan.groups) == 2  # both roots, one group
    lowered = check(inputs, build, QdqForm(), tolerance=3e-6)
    assert sum(n.op_type == "MatMul" for n in lowered.low.b.nodes) == 2


def test_parts_that_do_not_meet_are_named_and_still_right(caplog):
    """The first part has another reader, so the two cannot be one product."""
    first, second = codes(7, 20, 4, 0), codes(7, 6, 8, 1)

    def build(graph, ids, x):
        pieces = [graph.call(ops.columns, x, 0, 20), graph.call(ops.columns, x, 20, 26)]
        made = []
        for i, (piece, weight, bits) in enumerate(zip(pieces, (first, second), (4, 8), strict=True)):
            source = graph.call(ops.quantize, piece, bits)
            made.append(graph.call(ops.quantized_linear, source, Weight(weight), Weight(scales_of(weight))))
            meta.put(made[-1], meta.LinearPart(SITE, i, 0, 1, bits, bits))
        return graph.call(aten.mul.Tensor, graph.call(aten.add.Tensor, *made), made[0])

    check({"input_ids": IDS, "x": rows(26)}, build, IntegerForm(), tolerance=5e-6)
    assert "layer: its parts are products of their own: node quantized_linear" in caplog.text


def test_a_linear_on_codes_that_is_part_of_none_is_refused():
    def build(graph, ids, x):
        return graph.call(
            ops.quantized_linear, graph.call(ops.quantize, x, 4), Weight(codes(7, 20, 4, 0)), Weight(torch.ones(7))
        )

    with pytest.raises(BackendError, match="node quantized_linear: a linear on codes without the fact"):
        Lowered({"input_ids": IDS, "x": rows(20)}, build, IntegerForm())


@pytest.mark.parametrize("width", [1, 126, 127, 128, 3000])
def test_correction_rows_sum_to_the_column_sums(width):
    weight = codes(5, width, 8, 0)
    term = Term(None, weight, torch.ones(5), 8, "t")  # type: ignore[arg-type]
    count = correction_count([term])
    extra = correction_rows(term.codes, count)
    assert extra.dtype == np.int8 and np.abs(extra.astype(int)).max() <= PIECE
    np.testing.assert_array_equal(extra.astype(np.int64).sum(0), -weight.long().sum(1).numpy())
    assert count == -(-int(weight.long().sum(1).abs().max()) // PIECE)
    if count > 1:
        with pytest.raises(AssertionError, match="too few correction rows"):
            correction_rows(term.codes, count - 1)


def test_biases_side_by_side():
    term = Term(None, torch.zeros(3, 2, dtype=torch.int8), torch.ones(3), 4, "t")  # type: ignore[arg-type]
    without, biased = Product(None, (term,)), Product(None, (term,), torch.tensor([1.0, 2, 3]))  # type: ignore[arg-type]
    assert stacked_bias([without, without]) is None
    np.testing.assert_array_equal(stacked_bias([without, biased]), [0, 0, 0, 1, 2, 3])
