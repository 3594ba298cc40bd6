"""Private generators: equal keys give equal streams, different keys differ, and nobody else's randomness moves."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from resq_compiler.numerics.seeds import generator


def draw(*key) -> list[float]:
    return torch.randn(4, generator=generator(*key)).tolist()


@given(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 200))
def test_equal_keys_give_equal_streams(seed, purpose, index):
    assert draw(seed, purpose, index) == draw(seed, purpose, index)


def test_every_part_of_the_key_matters():
    keys = [(0, "rotation", 0), (1, "rotation", 0), (0, "rotation", 1), (0, "sample", 0), (0, "rotation1", 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_stream_does_not_depend_on_the_process():
    code = "from resq_compiler.numerics.seeds import generator; print(generator(7, 'rotation', 3).initial_seed())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == generator(7, "rotation", 3).initial_seed()


def test_global_state_is_untouched():
    before = torch.get_rng_state()
    draw(3, "rotation", 1)
    assert torch.equal(before, torch.get_rng_state())
