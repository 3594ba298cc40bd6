"""Kernels run in Triton's interpreter here: tests/conftest.py sets TRITON_INTERPRET=1 before anything imports triton."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the package triton")


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory):
    """Every test here."""


@pytest.fixture(scope="session")
def kernels():
    """The Triton kernels as operators call them."""
    from resq_compiler.backends.triton.target import TRITON

    return TRITON.kernels


@pytest.fixture(scope="session")
def reference():
    """What they must compute, on the same bytes."""
    from resq_compiler.backends.fused.torch_kernels import TorchKernels
    from resq_compiler.backends.triton.formats import PaddedRows, PagedCache

    return TorchKernels(PaddedRows(), PagedCache())
