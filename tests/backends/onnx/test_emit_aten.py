"""Every emitter of an aten operator that computes values against the operator: ONNX Runtime and onnx's evaluator."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
from resq_compiler.backends.onnx import emit_aten
from resq_compiler.backends.onnx.registry import EMITTERS

from resq_compiler.errors import BackendError
from resq_compiler.ir.graph_tools import aten
from tests.backends.onnx.graphs import Lowered, Weight, check, check_call

torch.manual_seed(0)
X, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
POSITIVE = X.abs() + 0.1
ROW = torch.randn(5)
IDS = torch.tensor([[3, 0, 6], [1, 1, 5]])
MASK = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("target", emit_aten.BINARY, ids=str)
def test_binary(target):
    """Tensors of one shape, broadcast, and with a number; the exponent of a power of negative numbers is whole."""
    if target in (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar):
        pairs = {aten.pow.Tensor_Scalar: (X, 3), aten.pow.Tensor_Tensor: (POSITIVE, ROW), aten.pow.Scalar: (2, X)}
        check_call(target, *pairs[target])
        return
    check_call(target, X, Y)
    check_call(target, X, ROW)
    if "Tensor" in str(target):
        check_call(target, X, 0.75)


@pytest.mark.parametrize(
    ("first", "second"), [(IDS, X[0, 0, :3]), (IDS[:1], X[:, :1, :3]), (IDS, IDS[0]), (IDS, 2), (X, IDS[:, :1, None])]
)
def test_operands_of_two_types_are_promoted(first, second):
    check_call(aten.mul.Tensor, first, second)
    check_call(aten.div.Tensor, first, second if isinstance(second, int) else second + 7)


@pytest.mark.parametrize("kwargs", [{"alpha": 2}, {"rounding_mode": "floor"}])
def test_binary_refuses_what_it_does_not_compute(kwargs):
    target = aten.add.Tensor if "alpha" in kwargs else aten.div.Tensor_mode
    with pytest.raises(BackendError, match="only alpha=1 and true division|no ONNX form"):
        check_call(target, X, Y, **kwargs)


@pytest.mark.parametrize("target", [*emit_aten.COMPARISON, aten.ne.Scalar, aten.ne.Tensor], ids=str)
def test_comparisons(target):
    numbers = torch.tensor([[1, 2, 3], [3, 2, 1]])
    if str(target).endswith("Scalar"):
        check_call(target, numbers, 2)
        check_call(target, X, 0)
        check_call(target, numbers, 1.5)
    else:
        check_call(target, numbers, numbers[:1])
        check_call(target, numbers, numbers[0].float())


@pytest.mark.parametrize("target", [aten.max.default, aten.min.default], ids=str)
def test_extremes(target):
    check_call(target, IDS)
    check_call(target, X)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("target", [aten.max.dim, aten.min.dim], ids=str)
def test_extremes_along_a_dimension(target, output):
    for options in ((-1,), (0, True), (2, False)):
        check({"x": X}, lambda graph, x, o=options: graph.call(operator.getitem, graph.call(target, x, *o), output))


@pytest.mark.parametrize("target", emit_aten.LOGICAL, ids=str)
def test_logic(target):
    check_call(target, MASK, MASK[:1].logical_not())
    if "logical" not in str(target):
        with pytest.raises(BackendError, match="expected masks, got torch.int64"):
            check_call(target, IDS, IDS)


@pytest.mark.parametrize("target", [aten.logical_not.default, aten.bitwise_not.default], ids=str)
def test_not(target):
    check_call(target, MASK)


def test_not_of_integers():
    check_call(aten.logical_not.default, IDS)
    with pytest.raises(BackendError, match="expected a mask, got torch.int64"):
        check_call(aten.bitwise_not.default, IDS)


def test_where_and_masked_fill():
    mask = MASK[:, :, None]
    check_call(aten.where.self, mask, X, Y)
    check_call(aten.where.ScalarOther, mask, X, -3.4e38)
    check_call(aten.where.ScalarSelf, mask, 1.5, X)
    check_call(aten.where.Scalar, mask, 1.0, 0.0)
    check_call(aten.masked_fill.Scalar, X, mask, -1.0)
    check_call(aten.masked_fill.Tensor, X, mask, torch.tensor(2.0))


@pytest.mark.parametrize("target", emit_aten.UNARY, ids=str)
def test_unary(target):
    check_call(target, POSITIVE if target in (aten.log.default, aten.sqrt.default) else X)


@pytest.mark.parametrize("target", [aten.cos.default, aten.sqrt.default, aten.exp.default], ids=str)
def test_unary_of_integers_is_float(target):
    check_call(target, IDS)


def test_functions_of_several_operators():
    check_call(aten.square.default, X)
    check_call(aten.rsqrt.default, POSITIVE)
    check_call(aten.silu.default, X)
    check_call(aten.gelu.default, X)
    check_call(aten.gelu.default, X, approximate="tanh")


def test_expm1_keeps_its_digits_near_zero():
    near = torch.tensor([1e-8, -3e-7, 1e-5, 0.3, -2.0, 5.0, -40.0, 0.0])
    lowered = Lowered({"x": near}, lambda graph, x: graph.call(aten.expm1.default, x))
    for (got,) in lowered.run(lowered.low.exact(lowered.result)):
        np.testing.assert_allclose(got, near.expm1().numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int32, torch.bool])
def test_casts(dtype):
    check_call(aten.to.dtype, IDS, dtype)
    check_call(aten._to_copy.default, IDS, dtype=dtype)
    check_call(aten.to.device, IDS, torch.device("cpu"), dtype)


def test_a_cast_without_an_onnx_form_is_named():
    with pytest.raises(BackendError, match="torch.complex64 have no ONNX form"):
        check_call(aten.to.dtype, X, torch.complex64)


def test_bfloat16_is_rounded_after_every_operator():
    def build(graph, x, y):
        narrow = graph.call(aten.to.dtype, x, torch.bfloat16)
        product = graph.call(aten.mul.Tensor, graph.call(aten.mul.Tensor, narrow, y), 1.7)
        return graph.call(aten.to.dtype, graph.call(aten.exp.default, product), torch.float32)

    check({"x": X, "y": torch.arange(5)}, build, tolerance=0)


@pytest.mark.parametrize("target", emit_aten.NO_OPERATION, ids=str)
def test_no_operation(target):
    check_call(target, X)


@pytest.mark.parametrize("bias", [None, torch.randn(7)])
def test_linear(bias):
    check_call(aten.linear.default, X, Weight(torch.randn(7, 5)), None if bias is None else Weight(bias))


@pytest.mark.parametrize("bounds", [(-0.5, 0.25), (None, 0.25), (-0.5, None)])
def test_clamp(bounds):
    check_call(aten.clamp.default, X, *bounds)


@pytest.mark.parametrize("bounds", [(X[:1], None), (None, X.abs()), (X + 0.5, X - 0.5)])
def test_clamp_between_tensors(bounds):
    check_call(aten.clamp.Tensor, X, *bounds)


def test_softmax_and_sums():
    check_call(aten.softmax.int, X, 1)
    check_call(aten.softmax.int, X, -1, torch.float32)
    check_call(aten.sum.dim_IntList, X, [-1])
    check_call(aten.sum.dim_IntList, X, [0, 2], True)
    check_call(aten.sum.dim_IntList, IDS, [1])


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("options", [(2,), (2, 1), (3, -1, False), (2, -1, True, False)])
def test_topk(output, options):
    check({"x": X}, lambda graph, x: graph.call(operator.getitem, graph.call(aten.topk.default, x, *options), output))


def test_scatter_and_filled_like():
    check_call(aten.scatter.value, X[0], 1, IDS[:, :2] % 5, 1)
    check_call(aten.scatter.value, IDS, 0, IDS[:1] % 2, 7)
    for like in (X, IDS):
        check_call(aten.zeros_like.default, like)
        check_call(aten.ones_like.default, like)


def embedding_of(table, kind):
    return Lowered(
        {"ids": IDS}, lambda graph, ids: graph.call(aten.embedding.default, Weight(table), ids), embedding=kind
    )


def test_embedding_in_float32_is_exact():
    table = Weight(torch.randn(7, 4))
    build = lambda graph, ids: graph.call(aten.embedding.default, table, ids)  # noqa: E731
    check({"ids": IDS}, build, embedding="float32", tolerance=0)


def test_embedding_in_float16_is_the_rounded_table():
    table = torch.randn(7, 4)
    lowered = embedding_of(table, "float16")
    for (got,) in lowered.run(lowered.low.exact(lowered.result)):
        np.testing.assert_array_equal(got, table.half().float()[IDS].numpy())


def test_embedding_in_int8_is_within_half_a_step():
    table = torch.randn(7, 4)
    table[1] = 0
    lowered = embedding_of(table, "int8")
    step = (table.abs().amax(1, keepdim=True) / 127)[IDS].numpy()
    for (got,) in lowered.run(lowered.low.exact(lowered.result)):
        assert (np.abs(got - table[IDS].numpy()) <= step * 0.5001).all() and not got[IDS.numpy() == 1].any()


def test_every_emitter_of_this_module_is_tested():
    tested = {*emit_aten.BINARY, *emit_aten.COMPARISON, *emit_aten.LOGICAL, *emit_aten.UNARY, *emit_aten.NO_OPERATION}
    tested |= {
        aten.ne.Scalar, aten.ne.Tensor, aten.logical_not.default, aten.bitwise_not.default, aten.where.self, aten.where.ScalarOther,
        aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.square.default, aten.rsqrt.default,
        aten.silu.default, aten.gelu.default, aten.expm1.default, aten.to.dtype, aten._to_copy.default, aten.to.device,
        aten.linear.default, aten.embedding.default, aten.max.default, aten.min.default, aten.clamp.default, aten.softmax.int,
        aten.sum.dim_IntList, aten.topk.default, aten.scatter.value, aten.zeros_like.default, aten.ones_like.default,
        aten.max.dim, aten.min.dim, aten.clamp.Tensor,
    }  # fmt: skip
    assert tested == {target for target, emitter in EMITTERS.items() if emitter.__module__ == emit_aten.__name__}
