"""The search against what is known of normal rows, and against rows for which every cut is wrong."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.numerics import clip
from resq_compiler.numerics.clip import SHARES, ClipSearch
from resq_compiler.numerics.quantized import dequantize, quantize_activation


def search(x: torch.Tensor, bits: int = 4) -> float:
    found = ClipSearch(bits)
    for part in x.split(100):
        found.update(part)
    return found.best()


@pytest.mark.parametrize(
    ("width", "bits", "step"), [(504, 4, 0.3352), (3584, 4, 0.3352), (14336, 4, 0.3352), (504, 3, 0.5860)]
)
def test_normal_rows(width, bits, step):
    """J. Max, Quantizing for Minimum Distortion (1960), table II: the best step of 2^b even codes on a unit normal variable."""
    x = torch.randn(max(200, 2**18 // width), width, generator=torch.Generator().manual_seed(width + bits))
    best = step * (2**bits - 1) / float(x.amax(-1).mean() - x.amin(-1).mean())
    assert abs(search(x, bits) - best) <= 0.05 + 0.01  # the grid of shares, and 1 % for 2 * 10^5 samples


def test_rows_of_equal_sizes_keep_their_range():
    """What a Hadamard transform makes of a single channel: plus and minus one number."""
    x = torch.randn(300, 504, generator=torch.Generator().manual_seed(0)).sign()
    assert search(x) == 1.0 == SHARES[0]


def test_large_rows_do_not_decide_alone():
    normal = torch.randn(300, 504, generator=torch.Generator().manual_seed(1))
    massive = 1e4 * torch.ones(3, 504)
    massive[:, ::2] *= -1
    assert search(torch.cat((normal, massive))) == search(normal) < 1


def test_with_readers_the_error_is_that_of_their_outputs():
    """Against the definition, for more readers than columns (a factor of their moment) and for fewer."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 256, generator=generator)
    for count in (16, 400):
        readers = torch.randn(count, 256, generator=generator)
        found = ClipSearch(4, readers)
        found.update(x)
        kept = [i for i in range(len(SHARES)) if found.errors[i] < torch.inf]
        assert len(kept) >= 2
        for i, share in enumerate(SHARES):
            gap = (dequantize(quantize_activation(x, 4, clip=share)) - x).double()
            expected = ((gap @ readers.double().T).square().sum(-1) / x.double().square().sum(-1)).sum()
            if i in kept:
                torch.testing.assert_close(found.errors[i], expected, rtol=1e-5, atol=0)
            else:
                assert expected > 1.1 * found.errors.min()


@pytest.mark.parametrize("denormals", ["kept", "flushed"])
def test_readers_that_are_zero_leave_the_whole_range(denormals):
    torch.set_flush_denormal(denormals == "flushed")
    try:
        found = ClipSearch(4, torch.zeros(200, 64))
        found.update(torch.randn(20, 64, generator=torch.Generator().manual_seed(4)))
    finally:
        torch.set_flush_denormal(False)
    assert found.best() == 1.0


def test_what_is_cut_off_costs_more_where_readers_see_the_sum(monkeypatch):
    """All columns have one sign: a cut lowers their sum in every row, rounding errors cancel in it."""
    monkeypatch.setattr(clip, "FAR", float("inf"))  # give no share up
    x = torch.randn(300, 504, generator=torch.Generator().manual_seed(3)).abs()
    ratio = {}
    for name, readers in (("input", None), ("sum", torch.ones(1, 504))):
        found = ClipSearch(4, readers)
        found.update(x)
        ratio[name] = float(found.errors[SHARES.index(0.8)] / found.errors[0])
    assert ratio["input"] < 1.2 and ratio["sum"] > 2
