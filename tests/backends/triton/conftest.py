"""Kernels run in Triton's interpreter: tests/conftest.py sets TRITON_INTERPRET=1 before anything imports triton. TRITON_INTERPRET=0 on a
machine with a GPU runs the same tests there."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the package triton")


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory, monkeypatch):
    """Every test here."""
    from tests.backends.triton import on_gpu

    if on_gpu.wanted():
        on_gpu.launch_there(monkeypatch)


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


@pytest.fixture
def expanded(monkeypatch):
    """Operands are expanded before every launch of many rows, as on GPUs whose matrix instructions read shared memory alone."""
    from resq_compiler.backends.triton import attention, expand, mixed_linear

    monkeypatch.setattr(expand, "expands", lambda device: True)
    monkeypatch.setattr(attention, "EXPANDED_ROWS", 1)
    monkeypatch.setattr(mixed_linear, "EXPANDED_ROWS", 1)
