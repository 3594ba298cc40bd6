"""Denormal numbers: what a thread does with them is as before once a block is left."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.util.torch_state import denormals, flushes_denormals


@pytest.fixture(autouse=True)
def as_before():
    with denormals():
        yield


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("inside", [False, True, None])
def test_denormals(before, inside):
    torch.set_flush_denormal(before)
    with denormals(inside):
        assert flushes_denormals() == (before if inside is None else inside)
        assert (torch.tensor([1e-40]) * 1).item() == (0 if flushes_denormals() else pytest.approx(1e-40))
        torch.set_flush_denormal(not before)
    assert flushes_denormals() == before
