"""Rotations are orthogonal, repeat from their generator, keep parts apart, and spread an outlier evenly."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_compiler.errors import ConfigError, QuantError
from resq_compiler.numerics.rotation import ROTATION_KINDS, part_rotation, random_rotation, rotation_info
from resq_compiler.numerics.seeds import generator


def assert_orthogonal(matrix: torch.Tensor) -> None:
    identity = torch.eye(matrix.shape[0], dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)  # float64 rounding of n <= 504 terms
    torch.testing.assert_close(matrix.T @ matrix, identity, rtol=0, atol=1e-12)  # the same


@pytest.mark.parametrize("kind", ROTATION_KINDS)
@given(n=st.integers(1, 130), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_orthogonal_and_repeatable(kind, n, seed):
    rotation = random_rotation(n, kind, generator(seed, "rotation"))
    assert rotation.dtype == torch.float64 and rotation.shape == (n, n)
    assert_orthogonal(rotation)
    assert torch.equal(rotation, random_rotation(n, kind, generator(seed, "rotation")))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_seeds_matter_and_global_state_does_not(kind):
    before = torch.get_rng_state()
    first, second = (random_rotation(64, kind, generator(seed, "rotation")) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_hadamard_spreads_a_single_outlier_evenly():
    rotation = random_rotation(504, "hadamard", generator(0, "rotation"))
    torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, 504**-0.5), rtol=1e-15, atol=0)  # one rounding


def test_hadamard_signs_change_the_mixing_not_only_output_signs():
    first, second = (random_rotation(64, "hadamard", generator(seed, "rotation")) for seed in (0, 1))
    outputs = [torch.ones(64, dtype=torch.float64) @ r for r in (first, second)]
    assert not torch.allclose(outputs[0].abs(), outputs[1].abs())


@pytest.mark.parametrize("n", [63, 22, 668])
def test_width_without_hadamard_is_stated(n, caplog):
    info = rotation_info(n, "hadamard")
    assert (info.requested, info.used) == ("hadamard", "orthogonal")
    assert f"order {n}" in info.reason
    with caplog.at_level(logging.INFO, logger="resq_compiler"):
        rotation = random_rotation(n, "hadamard", generator(0, "rotation"))
    assert f"width {n}" in caplog.text
    assert torch.equal(rotation, random_rotation(n, "orthogonal", generator(0, "rotation")))


def test_none_is_the_identity():
    assert torch.equal(random_rotation(5, "none", generator(0, "rotation")), torch.eye(5, dtype=torch.float64))


def test_haar_mean_of_squared_entries():
    draws = torch.stack([random_rotation(8, "orthogonal", generator(0, "haar", i)) for i in range(2000)])
    # Haar: E q = 0, E q² = 1/n. 2000 draws of variance ~1/8 leave a standard error of 0.008; QR without the sign fix
    # has diagonal means near -0.2.
    torch.testing.assert_close(draws.mean(0), torch.zeros(8, 8, dtype=torch.float64), rtol=0, atol=0.04)
    uniform = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    torch.testing.assert_close(draws.square().mean(0), uniform, rtol=0, atol=0.02)  # the same standard error


@pytest.mark.parametrize("sizes", [(56, 8), (8, 48, 8), (504, 72), (0, 12), (49, 7)])
def test_parts_never_mix(sizes):
    rotation = part_rotation(sizes, "hadamard", generator(3, "rotation"))
    assert_orthogonal(rotation)
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert (rotation[part[:, None] != part] == 0).all()


def test_bad_requests():
    with pytest.raises(ConfigError, match="'hadmard'"):
        random_rotation(8, "hadmard", generator(0, "rotation"))
    with pytest.raises(QuantError, match="-8"):
        part_rotation([16, -8], "none", generator(0, "rotation"))
    with pytest.raises(QuantError, match="positive sum"):
        part_rotation([], "none", generator(0, "rotation"))
