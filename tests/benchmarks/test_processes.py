"""benchmarks/processes.py: what it reads off records, and its report."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def benchmark(script):
    return script("processes")


def record(seconds, calibrate, quantize, notes=()):
    passes = [{"name": "compute-bases", "seconds": calibrate}, {"name": "quantize-weights", "seconds": quantize}]
    return {"seconds": seconds, "passes": passes, "notes": list(notes), "peak_memory_bytes": 10**9}


def test_the_report(benchmark):
    note = "computed by 2 processes, which sent 900.5 MB to each other; codes may differ"
    found = [
        benchmark.summary(record(100.0, 20.0, 60.0), 1, 20.0),
        benchmark.summary(record(60.0, 11.0, 31.0, [note]), 2, 20.05),
    ]
    assert found[1]["sent"] == 900.5 and found[0]["sent"] == 0
    arguments = SimpleNamespace(recipe="resq+", model="embedded", samples=10, length=100, cores=2, network=100.0)
    text = benchmark.report(arguments, found)
    assert "| 2 | 60.0 | 11.0 | 11.000 | 31.0 | 1000 | 900.5 | 20.050 |" in text and "differs by +0.25 %" in text
    assert "| 1 | 100.0 | 1.00 |" in text and "| 8 | 30.1 | 3.32 |" in text  # 20 + 80 / 8, and the bytes
