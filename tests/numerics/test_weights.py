"""Weight codes: parts, rows, rounding, and what is refused."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import FLT_MIN, Part, parts_for
from resq_compiler.numerics.scale_search import search_scale
from resq_compiler.numerics.weights import (
    QuantizedWeight,
    dequantize_weight,
    quantize_weight_rtn,
    round_to_codes,
    split_rows,
)


def weight(n: int, k: int, seed: int = 0, heavy: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 0.02
    return w * torch.randn(n, k, generator=generator).abs() ** 2 if heavy else w


def test_max_clip_represents_the_largest_weight() -> None:
    w = weight(20, 30)
    scale = search_scale(w, 4, clip="max")
    assert torch.equal(scale, w.abs().amax(1) / 7)
    # half a step, plus float32 rounding of the division
    assert ((w - round_to_codes(w, scale, 4) * scale[:, None]).abs() <= scale[:, None] * 0.50001).all()


def test_rows_of_zeros_and_denormals_stay_finite() -> None:
    w = torch.zeros(3, 8)
    w[1] = 1e-42
    [q] = quantize_weight_rtn(w, [Part(4, 0, 8)])
    assert (q.scale >= FLT_MIN).all() and (q.qdata == 0).all() and q.dequantize().isfinite().all()


def test_rtn_quantizes_each_part_on_its_own() -> None:
    w = weight(40, 64).to(torch.bfloat16)
    parts = parts_for(64, 1 / 8, lowest_fraction=1 / 8)
    result = quantize_weight_rtn(w, parts)
    assert [(q.bits, tuple(q.qdata.shape)) for q in result] == [(2, (40, 8)), (4, (40, 48)), (8, (40, 8))]
    for q, p in zip(result, parts, strict=True):
        assert q.qdata.dtype == torch.int8 and q.scale.dtype == torch.float32 and q.qdata.is_contiguous()
        assert int(q.qdata.min()) >= -(2 ** (q.bits - 1)) and int(q.qdata.max()) < 2 ** (q.bits - 1)
        assert torch.equal(q.scale, search_scale(w[:, p.start : p.stop], q.bits))
    error = (dequantize_weight(result)[:, 56:] - w[:, 56:]).abs()
    assert (error <= result[2].scale[:, None] * 3).all()  # 8 bits clip at most 2 % of 127 steps on this data


def test_groups_are_weights_of_their_own() -> None:
    """Every group of columns gets the codes and scales that it gets alone, and finer scales lose less."""
    w = weight(6, 70, heavy=True)
    (grouped,) = quantize_weight_rtn(w, [Part(4, 0, 70)], group_size=32)
    assert grouped.scale.shape == (6, 3)
    for g, here in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
        (alone,) = quantize_weight_rtn(w[:, here], [Part(4, 0, w[:, here].shape[1])])
        assert torch.equal(grouped.qdata[:, here], alone.qdata) and torch.equal(grouped.scale[:, g], alone.scale)
    (whole,) = quantize_weight_rtn(w, [Part(4, 0, 70)])
    assert (grouped.dequantize() - w).norm() < (whole.dequantize() - w).norm()
    first, second = split_rows([grouped], [2, 4])
    assert torch.equal(torch.cat([first[0].dequantize(), second[0].dequantize()]), grouped.dequantize())


def test_clip_search_beats_no_clipping() -> None:
    w = weight(100, 504)
    mse, largest = (quantize_weight_rtn(w, [Part(4, 0, 504)], clip=c)[0].dequantize() for c in ("mse", "max"))
    assert (mse - w).norm() < 0.95 * (largest - w).norm()


def test_column_weight_protects_heavy_columns() -> None:
    w = weight(200, 128, heavy=True)
    h = torch.full((128,), 1e-3)
    h[:16] = 1.0
    parts = [Part(4, 0, 128)]
    plain = quantize_weight_rtn(w, parts)[0].dequantize()
    aware = quantize_weight_rtn(w, parts, column_weight=h)[0].dequantize()
    assert ((aware - w).square() * h).sum() < ((plain - w).square() * h).sum()


def test_split_rows_undoes_stacking() -> None:
    w = weight(30, 16)
    parts = parts_for(16, 1 / 8)
    pieces = split_rows(quantize_weight_rtn(w, parts), [18, 6, 6])
    for piece, rows in zip(pieces, w.split([18, 6, 6]), strict=True):
        for q, alone in zip(piece, quantize_weight_rtn(rows, parts), strict=True):
            assert isinstance(q, QuantizedWeight) and torch.equal(q.qdata, alone.qdata)
    with pytest.raises(QuantError, match="30 rows"):
        split_rows(quantize_weight_rtn(w, parts), [18, 6])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_refused_with_a_count(bad: float) -> None:
    w = weight(4, 8)
    w[1, 2] = w[3, 0] = bad
    with pytest.raises(QuantError, match="2 of 32 weights"):
        search_scale(w, 4)
    with pytest.raises(QuantError, match="2 of 32 weights"):
        quantize_weight_rtn(w, [Part(4, 0, 8)])


@pytest.mark.parametrize(
    "arguments",
    [
        {"clip": "median"},
        {"column_weight": torch.ones(7)},
        {"column_weight": -torch.ones(8)},
        {"bits": 1},
    ],
)
def test_search_refuses(arguments: dict) -> None:
    with pytest.raises(QuantError):
        search_scale(weight(4, 8), **{"bits": 4, **arguments})
