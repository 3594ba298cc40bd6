"""Sizes of channels of each expert: parts add up."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.numerics.expert_channels import ExpertEnergy, ExpertPeak

INDICES = torch.tensor(
    [[[0, 1], [0, 1], [0, 1], [2, 1], [2, 0], [2, 1]]]
)  # the fourth is never chosen, the third only later


@pytest.mark.parametrize("kind", [ExpertEnergy, ExpertPeak])
def test_parts_add_up(kind):
    x = torch.randn(1, 6, 2, 3, generator=torch.Generator().manual_seed(0))

    def seen(part):
        found = kind("site", 4)
        found.route(INDICES[:, part])
        found.update(x[:, part])
        return found

    total = kind("site", 4)
    total.restore(seen(slice(3)).state())
    total.merge(seen(slice(3, 6)).state())
    for name, value in seen(slice(6)).state().items():
        torch.testing.assert_close(total.state()[name], value)
