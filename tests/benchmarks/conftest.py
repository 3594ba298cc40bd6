"""Benchmarks are scripts: their tests load them by path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script():
    """script(name): the module of benchmarks/NAME.py."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def made_once(script, tmp_path, monkeypatch, capsys):
    """made_once(name, flags): lines that a benchmark of exported models prints, when it makes these and when they are there."""

    def run(name: str, flags: str) -> list[list[str]]:
        pytest.importorskip("resq_kernels")
        benchmark, said = script(name), []
        for _ in range(2):
            benchmark.main([str(tmp_path), *flags.split()])
            monkeypatch.setattr(benchmark, "make", None)
            said.append(capsys.readouterr().out.splitlines())
        return said

    return run
