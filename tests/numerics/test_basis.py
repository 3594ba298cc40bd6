"""Moments against NumPy's float64 sums; bases by their definition: orthogonal, diagonalizing, ascending, canonical."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_compiler.errors import DataError, QuantError
from resq_compiler.numerics.basis import SecondMoment, principal_basis
from resq_compiler.numerics.seeds import generator


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=generator(seed, "activations"))
    return x * torch.linspace(0.1, 3.0, shape[-1])


def random_moment(*shape: int, seed: int = 0) -> torch.Tensor:
    x = activations(*shape[:-2], 2 * shape[-1], shape[-1], seed=seed).double()
    return x.mT @ x


def test_moment_equals_numpy():
    x = activations(3, 5000, 24)
    moment = SecondMoment("layers.0.input", 24)
    moment.update(x[:2])
    moment.update(x[2:])
    flat = x.numpy().astype(np.float64).reshape(-1, 24)
    expected = torch.from_numpy(flat.T @ flat)
    assert moment.tokens == 15000 and moment.total.dtype == torch.float64
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(moment.total, expected, rtol=0, atol=1e-6 * scale)  # float32 products
    torch.testing.assert_close(moment.mean(), expected / 15000, rtol=0, atol=1e-6 * scale / 15000)  # the same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [500, 9000])  # more than are summed in float32
def test_a_mean_that_is_taken_is_the_rounded_mean(dtype, tokens):
    moments = [SecondMoment("layers.0.input", 300, dtype=dtype) for _ in range(2)]
    for moment in moments:
        moment.update(activations(1, tokens, 300))
    want = moments[0].mean().float()
    torch.testing.assert_close(moments[1].take_mean(), want, rtol=2e-7, atol=0)  # divided before or behind the rounding
    with pytest.raises(DataError, match="no tokens"):
        moments[1].mean()


def test_bfloat16_products_are_near_and_symmetric():
    """300 columns need two stripes. Rounding is random, so it averages out over tokens."""
    x = activations(4096, 300)
    moment = SecondMoment("site", 300, dtype=torch.bfloat16)
    moment.update(x[:2048])
    moment.update(x[2048:])
    exact = x.double().T @ x.double()
    assert torch.equal(moment.total, moment.total.T)
    assert float(torch.linalg.matrix_norm(moment.total - exact)) < 2**-9 * float(torch.linalg.matrix_norm(exact))
    assert not torch.equal(moment.total, exact.float().double())


def test_loud_tokens_do_not_drown_the_others_in_bfloat16():
    """One token of 1000 times the size: what is left without it is as near as if it had never been there."""
    x = activations(2048, 64)
    x[7] *= 1000
    moment = SecondMoment("site", 64, dtype=torch.bfloat16)
    moment.update(x)
    loud = x[7].double()
    quiet = torch.cat((x[:7], x[8:])).double()
    exact = quiet.T @ quiet
    error = moment.total - torch.outer(loud, loud) - exact
    assert float(torch.linalg.matrix_norm(error)) < 0.01 * float(torch.linalg.matrix_norm(exact))


@pytest.mark.parametrize("taken", [False, True])
def test_a_mean_that_holds_most_of_the_energy_does_not_drown_the_rest_in_bfloat16(taken):
    """300 columns, two stripes. Rounded as they are, products of such tokens have eigenvalues that no usual damping lifts above zero."""
    offset = torch.randn(300, generator=generator(1, "offset")) * torch.linspace(0.1, 3.0, 300) ** 2
    x = offset + 0.05 * activations(4096, 300)
    moment = SecondMoment("site", 300, dtype=torch.bfloat16)
    for part in x.split(1024):
        moment.update(part)
    exact = x.double().T @ x.double() / 4096
    rounded = sum((p.bfloat16().T @ p.bfloat16()).double() for p in x.split(1024)) / 4096
    found = moment.take_mean().double() if taken else moment.mean()
    least = [float(torch.linalg.eigvalsh(m).min()) / float(exact.diagonal().mean()) for m in (exact, rounded, found)]
    assert 0 < least[0] < 1e-3 and least[1] < -0.03 and least[2] > -1e-3
    assert torch.equal(found, found.T)
    assert float(torch.linalg.matrix_norm(found - exact)) < 1e-5 * float(torch.linalg.matrix_norm(exact))


def test_parts_of_a_moment_may_have_means_of_their_own():
    """Merged, and gone on with behind a total that was asked for."""
    x = torch.cat((3 + 0.1 * activations(1500, 40), -2 + 0.1 * activations(1500, 40, seed=1)))
    whole, first, last = (SecondMoment("site", 40, dtype=torch.bfloat16) for _ in range(3))
    whole.update(x[:1500])
    assert whole.total.shape == (40, 40)
    whole.update(x[1500:])
    first.update(x[:1500])
    last.update(x[1500:])
    first.merge(last.state())
    assert first.tokens == whole.tokens == 3000 and torch.equal(first.total, whole.total)
    exact = x.double().T @ x.double()
    torch.testing.assert_close(whole.total, exact, rtol=1e-4, atol=0)


def test_no_tokens_leave_a_bfloat16_moment_as_it_is():
    """As where no token reaches an expert in a batch."""
    moments = [SecondMoment("site", 40, dtype=torch.bfloat16) for _ in range(2)]
    x = 3 + 0.1 * activations(1500, 40)
    moments[0].update(x[:0])
    for moment in moments:
        moment.update(x)
        moment.update(x[:0])
    assert moments[0].tokens == 1500 and bool(moments[0].total.isfinite().all())
    assert torch.equal(moments[0].total, moments[1].total)


def test_float64_inputs_stay_float64():
    x = activations(100, 6).double()
    moment = SecondMoment("site", 6)
    moment.update(x)
    torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-14, atol=1e-12)  # float64 rounding


def test_groups_have_their_own_moments():
    x = activations(7, 11, 3, 8)
    moment = SecondMoment("v_proj", 8, groups=3)
    moment.update(x)
    assert moment.total.shape == (3, 8, 8) and moment.tokens == 77
    for head in range(3):
        rows = x[:, :, head].reshape(-1, 8).double()
        torch.testing.assert_close(moment.total[head], rows.T @ rows, rtol=1e-5, atol=1e-3)  # float32 products


def test_low_precision_inputs_are_widened():
    x = activations(50, 6).bfloat16()
    moment = SecondMoment("site", 6)
    moment.update(x)
    torch.testing.assert_close(moment.total, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)  # float32 products


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_name_the_site(bad):
    moment = SecondMoment("layers.3.mlp", 6)
    moment.update(activations(4, 6))
    before = moment.total.clone()
    x = activations(9, 6)
    x[5, 2] = bad
    with pytest.raises(DataError, match=r"layers\.3\.mlp.*1 NaN or infinite.*token 5"):
        moment.update(x)
    assert torch.equal(moment.total, before) and moment.tokens == 4


def test_overflow_is_told_from_nan():
    with pytest.raises(DataError, match="overflow"):
        SecondMoment("site", 2).update(torch.full((3, 2), 1e30))
    with pytest.raises(DataError, match="overflow"):
        SecondMoment("site", 2).update(torch.full((3, 2), 1.5e19))  # each square fits, their sum does not
    moment = SecondMoment("site", 3)
    moment.update(1.5e19 * torch.eye(3))  # three of these squares would not fit, and no column has three
    assert bool(moment.total.isfinite().all()) and moment.tokens == 3


def test_moment_misuse():
    with pytest.raises(QuantError, match="expected floating-point"):
        SecondMoment("site", 6).update(torch.zeros(3, 5))
    with pytest.raises(DataError, match="no tokens"):
        SecondMoment("site", 6).mean()


@given(d=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_basis_diagonalizes(d, seed):
    moment = random_moment(d, d, seed=seed)
    basis, eigenvalues = principal_basis(moment)
    scale = float(eigenvalues[-1])
    identity = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-12)  # float64 eigensolver
    diagonal = basis.T @ moment @ basis
    torch.testing.assert_close(diagonal, torch.diag(eigenvalues), rtol=0, atol=1e-12 * scale)  # the same, scaled
    assert (eigenvalues.diff() >= 0).all()


def test_eigenvalues_equal_numpy():
    moment = random_moment(3, 16, 16)
    expected = torch.from_numpy(np.linalg.svd(moment.numpy(), compute_uv=False)[:, ::-1].copy())
    torch.testing.assert_close(principal_basis(moment)[1], expected, rtol=1e-10, atol=0)  # another algorithm, float64


def test_signs_are_canonical():
    basis, _ = principal_basis(random_moment(2, 12, 12))
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    tied, _ = principal_basis(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))  # eigenvectors (1, -1) and (1, 1) over sqrt(2)
    assert (tied[0] > 0).all()


def test_batches_equal_single_bases():
    moment = random_moment(3, 10, 10)
    batched, _ = principal_basis(moment)
    for group in range(3):
        assert torch.equal(batched[group], principal_basis(moment[group])[0])


def test_bad_moments():
    with pytest.raises(DataError, match="NaN"):
        principal_basis(torch.full((2, 2), float("nan")))
    with pytest.raises(QuantError, match=r"\(2, 3\)"):
        principal_basis(torch.zeros(2, 3))
