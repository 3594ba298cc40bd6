"""Linears of experts against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resq_compiler.numerics import experts
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear, quantize_activation

B, S, K, N, E, CHOICES = 2, 3, 12, 5, 4, 2
torch.manual_seed(0)
X, WEIGHT, BIAS = torch.randn(B, S, K), torch.randn(E, N, K), torch.randn(E, N)
INDICES = torch.tensor([[0, 3], [3, 1], [0, 1], [1, 0], [3, 0], [0, 3]])  # the third expert is never chosen


def rows(x: torch.Tensor) -> torch.Tensor:
    """What each choice reads: [B·S·k, K]."""
    return x.flatten(0, -2) if x.dim() == 4 else x.flatten(0, 1).repeat_interleave(CHOICES, 0)


@pytest.mark.parametrize("x", [X, X[:, :, None] * torch.tensor([1.0, -2.0])[:, None]], ids=["tokens", "choices"])
def test_every_row_has_its_own_weight(x):
    expected = [F.linear(r, WEIGHT[i], BIAS[i]) for r, i in zip(rows(x), INDICES.flatten(), strict=True)]
    got = experts.expert_linear(x, WEIGHT, INDICES, BIAS)
    torch.testing.assert_close(got, torch.stack(expected).view(B, S, CHOICES, N))


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_multiplied_exactly(bits, group_size):
    codes = torch.randint(-8, 8, (E, N, K), dtype=torch.int8)
    scale = torch.rand(E, N) if group_size is None else torch.rand(E, N, K // group_size)
    x = quantize_activation(X, bits)
    got = experts.quantized_expert_linear(x, codes, scale, INDICES, group_size=group_size)
    flat = [t.flatten(0, 1).repeat_interleave(CHOICES, 0) for t in (x.qdata, x.scale, x.zero_point)]
    for j, i in enumerate(INDICES.flatten()):
        one = QuantizedActivation(*(t[j : j + 1] for t in flat), bits)
        expected = integer_linear(one, codes[i], scale[i], group_size=group_size)
        assert torch.equal(got.flatten(0, 2)[j : j + 1], expected)


def test_the_float_image_of_codes():
    codes, scale = torch.randint(-8, 8, (E, N, K), dtype=torch.int8), torch.rand(E, N)
    got = experts.weight_only_expert_linear(X, codes, scale, INDICES)
    torch.testing.assert_close(got, experts.expert_linear(X, codes * scale[..., None], INDICES))


def test_biases_and_the_weighted_sum():
    y, weights = torch.randn(B, S, CHOICES, N), torch.rand(B * S, CHOICES)
    torch.testing.assert_close(
        experts.add_expert_bias(y, BIAS, INDICES), y + BIAS[INDICES].view(B, S, CHOICES, N)
    )  # fmt: skip
    expected = (y * weights.view(B, S, CHOICES, 1)).sum(2)
    torch.testing.assert_close(experts.combine_experts(y, weights), expected)


def test_rows_by_expert_keep_their_order():
    found = experts.groups(INDICES, E)
    assert found.counts == [5, 3, 0, 4]
    assert found.rows(1).tolist() == [3, 5, 6]
    assert found.rows(2).tolist() == []


def test_shapes_are_found_without_values():
    meta = torch.zeros(6, CHOICES, dtype=torch.int64, device="meta")
    assert experts.expert_linear(X.to("meta"), WEIGHT.to("meta"), meta).shape == (B, S, CHOICES, N)
