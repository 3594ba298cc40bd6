"""Definitions of the diagnostics, on values made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from resq_compiler.inspection import statistics
from resq_compiler.numerics.rotation import part_rotation
from resq_compiler.numerics.seeds import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test-statistics"))


def test_kurtosis_of_known_distributions():
    assert statistics.kurtosis(normal(200000)) == pytest.approx(3, abs=0.1)  # sampling error of 2e5 draws is 0.02
    assert statistics.kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0])) == pytest.approx(1)
    assert statistics.kurtosis(torch.zeros(4)) == 0


def test_qsur_of_white_noise_is_that_of_a_ball_in_its_cube():
    d = 8
    ball = (math.pi ** (d / 2) / math.gamma(d / 2 + 1)) ** (1 / d) / 2  # (ball of radius r / cube of side 2r)^(1/d)
    assert statistics.SiteStatistics.of(normal(200000, d)).qsur == pytest.approx(
        ball, rel=0.02
    )  # covariance of 2e5 samples: 1 %


def test_qsur_falls_with_an_outlier_channel_and_a_rotation_repairs_it():
    x = normal(5000, 64)
    spiky = x.clone()
    spiky[:, 3] *= 50
    turned = spiky @ part_rotation([64], "hadamard", generator(0, "r")).float()
    plain, bad, good = (statistics.SiteStatistics.of(values).qsur for values in (x, spiky, turned))
    assert bad < 0.1 * plain and good > 3 * bad


def test_qsur_needs_more_tokens_than_channels():
    assert statistics.SiteStatistics.of(normal(64, 64)).qsur is None
    assert statistics.SiteStatistics.of(torch.ones(100, 4)).qsur is None


def test_statistics_of_a_site_agree_with_numpy():
    x = normal(700, 12) * 3 + 5
    found, values = statistics.SiteStatistics.of(x), x.double().numpy()
    assert (found.low, found.high) == (values.min(), values.max())
    np.testing.assert_allclose(found.peaks, np.abs(values).max(0), rtol=1e-6)
    np.testing.assert_allclose(found.rms, np.sqrt((values**2).mean(0)), rtol=1e-5)  # sums of 700 in float32
    np.testing.assert_allclose(found.moment, values.T @ values / 700, rtol=1e-5)
    assert found.median == pytest.approx(np.median(np.abs(values)), rel=0.05)  # of every sixth token


def test_kurtosis_of_a_skewed_distribution():
    x = (normal(4000, seed=3) ** 3) + 1
    values = x.double().numpy() - x.double().numpy().mean()
    assert statistics.kurtosis(x) == pytest.approx((values**4).mean() / (values**2).mean() ** 2, rel=1e-4)


def test_outlier_channels_by_the_definition_of_llm_int8():
    layers = [torch.zeros(100, 8, dtype=torch.bool) for _ in range(8)]
    layers[0][:6, 1] = layers[1][:6, 1] = True  # 2 of 8 layers, 6 of 100 tokens: just enough
    layers[0][:50, 2] = True  # one layer only
    for layer in layers:
        layer[:5, 3] = True  # all layers, but only 5 % of tokens
    assert statistics.outlier_channels(layers) == [{"channel": 1, "layers": 0.25, "tokens": pytest.approx(0.06)}]


def test_massive_values_need_both_conditions():
    x = torch.full((4, 6), 0.05)
    x[1, 2], x[3, 4] = -150.0, 120.0
    assert statistics.massive_values(x, 0.05) == [(1, 2, -150.0), (3, 4, 120.0)]
    assert statistics.massive_values(x, 1.0) == []  # not 1000 times the median
    assert statistics.massive_values(x / 10, 0.005) == []  # not above 100


def test_super_weight_is_found_where_one_weight_makes_the_spike():
    x, weight = normal(20, 16) * 0.1, normal(12, 16, seed=1) * 0.1
    x[7, 5], weight[9, 5] = 80.0, 3.0
    found = statistics.super_weight(x, x @ weight.T, weight)
    assert (found["row"], found["column"], found["token"]) == (9, 5, 7)
    assert found["share"] == pytest.approx(1, abs=0.02)  # all but the other fifteen channels' noise
    assert statistics.super_weight(normal(20, 16), normal(20, 12, seed=2), weight) is None
