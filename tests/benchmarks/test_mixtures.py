"""benchmarks/mixtures.py: made once, measured again, and a row for each profile."""

from __future__ import annotations

import pytest

TINY = "--experts 4 --choices 2 --hidden 128 --inner 64 --blocks 1 --vocabulary 64 --prompt 8 --new 2 --rounds 1 --threads 1"


def test_both_profiles(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("resq_kernels")
    benchmark = script("mixtures")
    for _ in range(2):
        benchmark.main([str(tmp_path), *TINY.split()])
        monkeypatch.setattr(benchmark, "make", None)
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "experts 4, choices 2, hidden 128, inner 64, blocks 1, vocabulary 64"
        assert [line.split()[0] for line in said[3:]] == ["native", "ort"]
        assert said[4].split()[3] == said[4].split()[6] == "1.00"
