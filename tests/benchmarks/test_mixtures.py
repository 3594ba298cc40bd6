"""benchmarks/mixtures.py: made once, measured again, and a row for each profile."""

from __future__ import annotations

TINY = "--experts 4 --choices 2 --hidden 128 --inner 64 --blocks 1 --vocabulary 64 --prompt 8 --new 2 --rounds 1 --threads 1"


def test_both_profiles(made_once):
    for said in made_once("mixtures", TINY):
        assert said[0] == "experts 4, choices 2, hidden 128, inner 64, blocks 1, vocabulary 64"
        assert [line.split()[0] for line in said[3:]] == ["native", "ort"]
        assert said[4].split()[3] == said[4].split()[6] == "1.00"
