"""Hadamard matrices are checked by their definition (±1, H Hᵀ = n I, exactly), transforms against the dense product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from resq_compiler.errors import QuantError
from resq_compiler.numerics.hadamard import hadamard_matrix, hadamard_plan, hadamard_transform, scaled_factors
from resq_compiler.numerics.hadamard_orders import base_matrix, is_known_order, prime_power

MODEL_WIDTHS = (
    12, 20, 28, 56, 64, 96, 112, 128, 192, 448, 504, 576, 784, 1152, 1344, 1536, 1792, 2048, 3072, 3136, 3584, 4864,
    5632, 6912, 8192, 8960, 9216, 9728, 11008, 11776, 12288, 13824, 14336, 16384, 17408, 17920, 18432, 18944, 21504,
    27648, 28672, 29568,
)  # fmt: skip


def integer_product_is_scaled_identity(matrix: torch.Tensor) -> bool:
    n = matrix.shape[0]
    wide = matrix.double()  # sums of n <= 2048 ones: exact in float64, and a fast matrix product
    entries_ok = bool((wide.abs() == 1).all())
    return entries_ok and torch.equal(wide @ wide.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize(
    "order", [2, 4, 16, 12, 20, 28, 36, 76, 92, 108, 116, 140, 148, 172, 252, 344, 924], ids=lambda n: f"order{n}"
)
def test_named_orders(order):
    assert integer_product_is_scaled_identity(base_matrix(order))


def test_every_known_order_up_to_700_is_hadamard():
    known = [n for n in range(1, 701) if is_known_order(n)]
    assert len(known) > 100
    assert [n for n in known if not integer_product_is_scaled_identity(base_matrix(n))] == []


def test_prime_powers():
    assert prime_power(343) == (7, 3)
    assert prime_power(169) == (13, 2)
    assert prime_power(139) == (139, 1)
    assert [prime_power(q) for q in (0, 1, 6, 85)] == [None] * 4


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order 668"):
        base_matrix(668)


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_model_widths_are_full_width(n):
    plan = hadamard_plan(n)
    assert plan.full_width and plan.block == n
    assert math.prod(plan.orders) == n
    assert max(plan.orders) <= 252  # every factor stays a small product
    assert "full width" in plan.reason


@pytest.mark.parametrize(("n", "block", "words"), [(63, 1, "exists"), (22, 2, "exists"), (668, 4, "no construction")])
def test_block_plans_say_why(n, block, words):
    plan = hadamard_plan(n)
    assert not plan.full_width
    assert (plan.block, plan.blocks * plan.block) == (block, n)
    assert words in plan.reason and str(block) in plan.reason


@given(st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_any_width_has_an_orthogonal_transform(n):
    plan = hadamard_plan(n)
    x = torch.arange(2 * n, dtype=torch.float64).reshape(2, n).sin()
    back = hadamard_transform(hadamard_transform(x, plan), plan, transpose=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)  # a few float64 roundings of numbers below 1


@pytest.mark.parametrize("n", [1, 2, 12, 56, 96, 172, 448, 504, 576, 1536, 63, 22, 668])
@pytest.mark.parametrize("transpose", [False, True])
def test_transform_equals_the_dense_matrix(n, transpose):
    plan = hadamard_plan(n)
    dense = hadamard_matrix(n) / math.sqrt(plan.block)
    x = torch.arange(6 * n, dtype=torch.float64).reshape(2, 3, n).sin()
    expected = x @ (dense.T if transpose else dense)
    actual = hadamard_transform(x, plan, transpose=transpose)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("n", [448, 29568, 668])
def test_factors_follow_the_documented_index_convention(n):
    plan = hadamard_plan(n)
    x = torch.arange(n, dtype=torch.float64).cos()
    view = x.reshape(plan.blocks, *plan.orders)
    for axis, factor in enumerate(plan.factors, start=1):
        view = torch.tensordot(view, factor, dims=([axis], [0])).movedim(-1, axis)
    expected = view.reshape(n) / math.sqrt(plan.block)
    torch.testing.assert_close(hadamard_transform(x, plan), expected, rtol=0, atol=1e-11)  # float64, up to 29568 terms


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, tolerance):
    plan = hadamard_plan(1536)
    x = torch.arange(4 * 1536, dtype=torch.float64).reshape(4, 1536).sin().to(dtype)
    y = hadamard_transform(x, plan)
    assert y.dtype == dtype
    expected = hadamard_transform(x.double(), plan)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)  # dtype's own precision


def test_wrong_inputs_are_errors():
    plan = hadamard_plan(64)
    with pytest.raises(QuantError, match="64"):
        hadamard_transform(torch.zeros(3, 32), plan)
    with pytest.raises(QuantError, match="int8"):
        hadamard_transform(torch.zeros(3, 64, dtype=torch.int8), plan)
    with pytest.raises(QuantError, match="positive"):
        hadamard_plan(0)


class Transform(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hadamard_transform(x, hadamard_plan(int(x.shape[-1])))


def test_export_with_dynamic_leading_dimensions():
    scaled_factors.cache_clear()  # the constants are built while tracing, and must survive it
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, 3, 448)
    program = torch.export.export(Transform(), (example,), dynamic_shapes={"x": {0: dynamic, 1: dynamic}}, strict=False)
    x = torch.arange(5 * 7 * 448, dtype=torch.float32).reshape(5, 7, 448).sin()
    torch.testing.assert_close(program.module()(x), Transform()(x), rtol=0, atol=0)  # the same operations


def test_fake_tensors_do_not_poison_the_cache():
    scaled_factors.cache_clear()
    with FakeTensorMode():
        assert Transform()(torch.empty(2, 96)).shape == (2, 96)
    with torch.inference_mode():
        Transform()(torch.ones(1, 96))
    x = torch.ones(1, 96, requires_grad=True)
    Transform()(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_no_tokens():
    assert Transform()(torch.zeros(0, 96)).shape == (0, 96)
