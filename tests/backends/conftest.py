"""Fixtures for backends that run kernels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from resq_compiler.backends.cpu.library import Library

from resq_compiler.model.compiled_model import CompiledModel

SENTINEL = 0x55
KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, or 0x55 in integers, so an element that a kernel does not write fails its test."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(torch.nan if t.is_floating_point() else SENTINEL) if t.device.type == "cpu" else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def sharing():
    """model -> a model with the same tensors and a backend of its own, so that tests can share what was compiled once."""

    return lambda model: CompiledModel(model.result)


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
    """The library, built from the tree once for all tests, so that what is tested is what lies there."""
    return Library(builder.build(folder, folder / "objects"))
