"""Kernels are tested with every instruction set that the processor has."""

from __future__ import annotations

import pytest

from tests.backends.conftest import build_library_module


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        names = build_library_module().INSTRUCTION_SETS.get(build_library_module().machine_name(), {"portable": []})
        metafunc.parametrize("isa", list(names), indirect=True)


@pytest.fixture
def isa(library, request):
    """Every instruction set of this machine's architecture; skipped where the processor lacks it."""
    if not library.instruction_sets()[request.param]:
        pytest.skip(f"this processor has no {request.param}")
    with library.using(request.param):
        yield request.param
