"""The upper Cholesky factor in the memory of its matrix, against the factor of torch's inverse."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.numerics import upper_factor
from resq_compiler.numerics.upper_factor import factorize, reorder, restore


def definite(k: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(3 * k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (x.T @ x / k).to(dtype)


@pytest.mark.parametrize("block", [3, 8, 24, 50, 64])  # 24, 50: one block
def test_it_is_the_inverse_of_the_factor_of_the_inverse(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(upper_factor, "BLOCK", block)
    h = definite(24)
    want = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(h), upper=True))
    matrix = h.clone()
    assert factorize(matrix)
    torch.testing.assert_close(matrix.triu(), want, rtol=1e-11, atol=1e-12)  # float64 rounding
    assert torch.equal(matrix.tril(-1), h.tril(-1))
    restore(matrix)
    assert torch.equal(matrix - matrix.diagonal().diag(), h - h.diagonal().diag())


@pytest.mark.parametrize("block", [8, 64])
def test_float32_is_off_by_its_rounding(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """A direction a thousand times as strong as the damping of the others: half of what GPTQ meets at most."""
    monkeypatch.setattr(upper_factor, "BLOCK", block)
    v = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = (definite(200) + 30 * torch.outer(v, v)).float()
    matrix, exact = h.clone(), h.double()
    assert factorize(matrix) and factorize(exact)
    off = matrix.triu().double() - exact.triu()
    assert float(off.norm() / exact.triu().norm()) < 2e-6
    image = matrix.triu().double()
    assert float((image @ image.T - h).norm() / h.norm()) < 1e-6


@pytest.mark.parametrize("block", [3, 8, 24])
@pytest.mark.parametrize("bad", [0, 11, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_is_not_positive_definite_can_be_restored(
    monkeypatch: pytest.MonkeyPatch, block: int, bad: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(upper_factor, "BLOCK", block)
    h = definite(24, dtype)
    h[bad, bad] = -1
    matrix, diagonal = h.clone(), h.diagonal().clone()
    assert not factorize(matrix)
    restore(matrix)
    matrix.diagonal().copy_(diagonal)
    assert torch.equal(matrix, h)


def test_rows_and_columns_are_put_in_order_in_place() -> None:
    h, order = definite(23), torch.randperm(23, generator=torch.Generator().manual_seed(1))
    matrix = h.clone()
    reorder(matrix, order, step=5)
    assert torch.equal(matrix, h[order][:, order])
