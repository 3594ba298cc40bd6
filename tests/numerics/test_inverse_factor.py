"""The factor of an inverse in the memory of its matrix, against torch's inverse."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.numerics import inverse_factor
from resq_compiler.numerics.inverse_factor import BLOCK, invert, reorder, restore, work


def definite(k: int) -> torch.Tensor:
    x = torch.randn(3 * k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.T @ x / k


@pytest.mark.parametrize("block", [3, 8, 24, 50, 64])  # 24, 50: one block
def test_it_is_the_cholesky_factor_of_the_inverse(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inverse_factor, "BLOCK", block)
    h = definite(24)
    want = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    matrix = h.clone()
    assert invert(matrix)
    torch.testing.assert_close(matrix.triu(), want, rtol=1e-11, atol=1e-12)  # float64 rounding
    assert torch.equal(matrix.tril(-1), h.tril(-1))
    restore(matrix)
    assert torch.equal(matrix - matrix.diagonal().diag(), h - h.diagonal().diag())


@pytest.mark.parametrize("block", [3, 8, 24])
@pytest.mark.parametrize("bad", [0, 11, 23])
def test_a_matrix_that_is_not_positive_definite_can_be_restored(
    monkeypatch: pytest.MonkeyPatch, block: int, bad: int
) -> None:
    monkeypatch.setattr(inverse_factor, "BLOCK", block)
    h = definite(24)
    h[bad, bad] = -1
    matrix, diagonal = h.clone(), h.diagonal().clone()
    assert not invert(matrix)
    restore(matrix)
    matrix.diagonal().copy_(diagonal)
    assert torch.equal(matrix, h)


def test_rows_and_columns_are_put_in_order_in_place() -> None:
    h, order = definite(23), torch.randperm(23, generator=torch.Generator().manual_seed(1))
    matrix = h.clone()
    reorder(matrix, order, step=5)
    assert torch.equal(matrix, h[order][:, order])


def test_blocks_are_less_work_than_one_of_their_width() -> None:
    """n^3 / 3 for each of two factors, against n^3 / 3 and n^3 where the inverse of one block is solved for."""
    assert work(BLOCK // 2) == (BLOCK // 2) ** 3
    assert 1 / 2 < work(20 * BLOCK) / (20 * BLOCK) ** 3 < 0.51
