"""The scale search, against an exhaustive float64 search written in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resq_compiler.numerics import scale_search
from resq_compiler.numerics.quantized import QuantSpec
from resq_compiler.numerics.scale_search import (
    SHRINKS,
    ByCells,
    OneByOne,
    cells_of,
    search_scale,
    way_of,
)


def weight(n: int, k: int, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, k, generator=generator) * 0.02
    return w * torch.randn(n, k, generator=generator).abs() ** 2 if heavy else w


def column_weight(k: int) -> torch.Tensor:
    return torch.rand(k, generator=torch.Generator().manual_seed(5))


def all_errors(w: np.ndarray, bits: int, h: np.ndarray) -> np.ndarray:
    """[N, 80] errors of every shrink, float64."""
    w, qmax = w.astype(np.float64), 2 ** (bits - 1) - 1
    columns = []
    for shrink in SHRINKS:
        scale = shrink * np.abs(w).max(1, keepdims=True) / qmax
        image = np.clip(np.rint(w / scale), -qmax - 1, qmax) * scale
        columns.append((h * (w - image) ** 2).sum(1))
    return np.stack(columns, 1)


def test_grid_is_the_published_one() -> None:
    assert len(SHRINKS) == 80 and SHRINKS[0] == 1.0 and SHRINKS[1] == 0.99 and SHRINKS[-1] == 0.21


@pytest.mark.parametrize("way", [ByCells, OneByOne])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_search_finds_the_exhaustive_minimum(
    way: type[ByCells | OneByOne], bits: int, weighted: bool, heavy: bool
) -> None:
    w = weight(100, 200, heavy)
    h = column_weight(200) if weighted else torch.ones(200)
    shrink = way(120, QuantSpec(bits), h)(w / w.abs().amax(1, keepdim=True))
    errors = all_errors(w.numpy(), bits, h.double().numpy())
    chosen = np.abs(shrink.numpy()[:, None] - np.array(SHRINKS)).argmin(1)
    # 1e-5: float32 sums of 200 terms may order two candidates that are closer than that
    assert (errors[np.arange(100), chosen] <= errors.min(1) * (1 + 1e-5)).all()
    assert (chosen == errors.argmin(1)).mean() > 0.98  # the rest are such ties


@pytest.mark.parametrize(
    ("bits", "columns", "way"), [(4, 576, ByCells), (4, 64, OneByOne), (2, 64, ByCells), (8, 2048, OneByOne)]
)
def test_few_bits_and_many_columns_go_by_cells(bits: int, columns: int, way: type[ByCells | OneByOne]) -> None:
    assert way_of(QuantSpec(bits), torch.ones(columns)) is way


def test_rows_that_end_at_different_shrinks_do_not_meet() -> None:
    """Rows of zeros and rows of one outlier are done at once, rows whose largest weight counts nothing at last."""
    w = torch.cat([weight(20, 60), torch.zeros(3, 60), weight(20, 60, heavy=True), torch.eye(60)[:20] + 1e-4])
    w[-10:, 0] = 5.0
    h = column_weight(60)
    h[0] = 0
    for bits in (4, 8):
        together = search_scale(w, bits, column_weight=h)
        assert torch.equal(together, torch.cat([search_scale(row, bits, column_weight=h) for row in w.split(1)]))


def test_every_shrink_has_one_level_in_a_cell() -> None:
    cells = cells_of(4)
    first = torch.searchsorted(cells.cell[:-1].contiguous(), torch.arange(len(cells.middles), dtype=torch.int32))
    borders = torch.cat([first, torch.tensor([2 * cells.steps])]).double() / cells.steps - 1
    for shrink in SHRINKS:
        scale, inside = shrink / 7, 1e-6
        low, high = ((border / scale).round().clamp(-8, 7) for border in (borders[:-1] + inside, borders[1:] - inside))
        assert torch.equal(low, high)


@pytest.mark.parametrize("columns", [100, 600])
def test_search_is_scale_free_and_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    w = weight(64, columns)
    scale = search_scale(w, 4)
    for factor in (2.0**-60, 2.0**60):  # powers of two: exact
        assert torch.equal(search_scale(w * factor, 4), scale * factor)
    monkeypatch.setattr(scale_search, "CHUNK", 1250)
    # another chunk changes the order of float32 sums, hence near ties
    assert (search_scale(w, 4) == scale).float().mean() > 0.98


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_change_nothing(bits: int) -> None:
    w, h = weight(300, 600), column_weight(600)  # more than 32,768 weights: threads share an operator
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = search_scale(w, bits, column_weight=h)
        torch.set_num_threads(3)
        assert torch.equal(search_scale(w, bits, column_weight=h), alone)
    finally:
        torch.set_num_threads(before)
