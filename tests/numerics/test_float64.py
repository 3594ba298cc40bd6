from __future__ import annotations

import torch

from resq_compiler.numerics.float64 import by_row_chunks


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
