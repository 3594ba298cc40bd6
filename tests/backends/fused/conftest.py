"""Fused operators on every target that can run here; Triton's kernels run in its interpreter (tests/conftest.py)."""

from __future__ import annotations

import importlib.util

import pytest
from resq_compiler.backends.fused.targets import find_target

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Every test here."""


@pytest.fixture(scope="module", params=["torch", "cpu", pytest.param("triton", marks=NEEDS_TRITON)])
def target(request):
    """Each target in turn."""
    return find_target(request.param)
