"""benchmarks/latent.py: made once, measured again, and a row for each profile and number of tokens."""

from __future__ import annotations

TINY = "--blocks 1 --heads 2 --vector 32 --own 16 --rotary 8 --hidden 64 --behind 4 9 --rounds 1 --threads 1"


def test_both_profiles(made_once):
    for said in made_once("latent", TINY):
        assert [line.split()[:2] for line in said[2:]] == [["4", "native"], ["4", "ort"], ["9", "native"], ["9", "ort"]]
