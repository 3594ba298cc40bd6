"""The library is built from the tree, once for all tests, so that what is tested is what lies there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from resq_compiler.backends.cpu.library import Library

KERNELS = Path(__file__).parents[3] / "kernels"


def build_library_module():
    spec = importlib.util.spec_from_file_location("build_library", KERNELS / "build_library.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_library"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder():
    """kernels/build_library.py, on a machine that has a compiler."""
    module = build_library_module()
    if module.system_compiler() is None and importlib.util.find_spec("ziglang") is None:
        pytest.skip("no C compiler: install one, or pip install ziglang")
    return module


@pytest.fixture(scope="session")
def library(builder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return Library(builder.build(folder, folder / "objects"))


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
