"""Sums of many matrices: one in memory at a time, with the bits of the sum of all."""

from __future__ import annotations

import weakref

import pytest
import torch

from resq_compiler.analysis.amplification import added


@pytest.mark.parametrize("count", [1, 2, 16, 17, 60, 140, 255])
def test_the_sum_of_matrices_one_at_a_time(count):
    matrices = torch.randn(count, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alive: list[weakref.ref] = []

    def one_by_one():
        for matrix in matrices:
            assert sum(ref() is not None for ref in alive) <= 1
            own = matrix.clone()
            alive.append(weakref.ref(own))
            yield own

    assert torch.equal(added(one_by_one()), matrices.sum(0))
