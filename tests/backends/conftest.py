"""Fixtures for backends that run kernels."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.model.compiled_model import CompiledModel

SENTINEL = 0x55


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
