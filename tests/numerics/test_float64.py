from __future__ import annotations

import torch

from resq_compiler.numerics import float64
from resq_compiler.numerics.float64 import by_column_chunks, by_row_chunks


def test_chunks_are_the_whole_rounded_once():
    weight = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    u = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []

    def change(rows):
        seen.append((len(rows), rows.dtype))
        return rows @ u

    result = by_row_chunks(weight, change, rows=4)
    assert seen == [(4, torch.float64), (4, torch.float64), (2, torch.float64)]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (weight.double() @ u).float(), rtol=1e-6, atol=1e-6)  # products of other shapes


def test_wide_rows_are_fewer_at_a_time(monkeypatch):
    weight, seen = torch.ones(10, 6), []
    monkeypatch.setattr(float64, "PIECE", 3 * 4 * 6)
    assert torch.equal(by_row_chunks(weight, lambda rows: (seen.append(len(rows)), rows * 2)[1]), weight * 2)
    assert seen == [3, 3, 3, 1]


def test_columns_are_changed_some_at_a_time():
    weight, seen = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), []
    found = by_column_chunks(weight, lambda w: (seen.append(w.shape[1]), w.flip(0))[1], columns=4)
    assert torch.equal(found, weight.flip(0)) and seen == [4, 4, 2]
