"""The scale search, against an exhaustive float64 search written in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resq_compiler.numerics import scale_search
from resq_compiler.numerics.quantized import QuantSpec
from resq_compiler.numerics.scale_search import (
    SHRINKS,
    best_by_cells,
    best_one_by_one,
    cells_of,
    search_scale,
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


@pytest.mark.parametrize("search", [best_by_cells, best_one_by_one])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heavy", [False, True])
def test_search_finds_the_exhaustive_minimum(search, bits: int, weighted: bool, heavy: bool) -> None:
    w = weight(100, 200, heavy)
    h = column_weight(200) if weighted else torch.ones(200)
    shrink = search(w / w.abs().amax(1, keepdim=True), QuantSpec(bits), h)
    errors = all_errors(w.numpy(), bits, h.double().numpy())
    chosen = np.abs(shrink.numpy()[:, None] - np.array(SHRINKS)).argmin(1)
    # 1e-5: float32 sums of 200 terms may order two candidates that are closer than that
    assert (errors[np.arange(100), chosen] <= errors.min(1) * (1 + 1e-5)).all()
    assert (chosen == errors.argmin(1)).mean() > 0.98  # the rest are such ties


@pytest.mark.parametrize(
    ("bits", "columns", "by_cells"), [(4, 576, True), (4, 64, False), (2, 64, True), (8, 2048, False)]
)
def test_few_bits_and_many_columns_go_by_cells(monkeypatch, bits: int, columns: int, by_cells: bool) -> None:
    used = []
    for name in ("best_by_cells", "best_one_by_one"):
        real = getattr(scale_search, name)
        monkeypatch.setattr(scale_search, name, lambda *a, name=name, real=real: used.append(name) or real(*a))
    search_scale(weight(3, columns), bits)
    assert used == ["best_by_cells" if by_cells else "best_one_by_one"]


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


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_search, "CHUNK", 6000)
    w, h = weight(64, 600), column_weight(600)
    alone = search_scale(w, 4, column_weight=h)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(search_scale(w, 4, column_weight=h), alone)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
