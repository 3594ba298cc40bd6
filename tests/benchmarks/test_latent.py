"""benchmarks/latent.py: made once, measured again, and a row for each profile and number of tokens."""

from __future__ import annotations

import pytest

TINY = "--blocks 1 --heads 2 --vector 32 --own 16 --rotary 8 --hidden 64 --behind 4 9 --rounds 1 --threads 1"


def test_both_profiles(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("resq_kernels")
    benchmark = script("latent")
    for _ in range(2):
        benchmark.main([str(tmp_path), *TINY.split()])
        monkeypatch.setattr(benchmark, "make", None)
        said = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
        assert said == [["4", "native"], ["4", "ort"], ["9", "native"], ["9", "ort"]]
