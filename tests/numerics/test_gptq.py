"""GPTQ against a slow float64 textbook version, and the properties they promise."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import QuantError
from resq_compiler.numerics.gptq import GptqResult, gptq
from resq_compiler.numerics.quantized import Part, parts_for
from resq_compiler.numerics.weights import dequantize_weight, quantize_weight_rtn, split_rows


def problem(n: int, k: int, tokens: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [n, k] and correlated inputs [tokens, k]."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=g) / k**0.5 + torch.diag(torch.rand(k, generator=g))
    return torch.randn(n, k, generator=g), torch.randn(tokens or 4 * k, k, generator=g) @ mixing


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double()


def hessian_error(w: torch.Tensor, image: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Output error of each row, diag(dW H dW^T)."""
    delta = w.double() - image.double()
    return ((delta @ h.double()) * delta).sum(1)


def column_scales(result: GptqResult) -> torch.Tensor:
    return torch.cat([p.scale[:, None].expand(-1, p.qdata.shape[1]) for p in result.parts], 1).double()


def limits(parts: tuple[Part, ...]) -> list[int]:
    return [2 ** (p.bits - 1) for p in parts for _ in range(p.width)]


def textbook(
    w: torch.Tensor, h: torch.Tensor, scales: torch.Tensor, limit: list[int], order: list[int]
) -> torch.Tensor:
    """OBS: round a column, move the rest by the optimal update, remove the column from H^-1 by Gaussian elimination."""
    w, k = w.double().clone(), len(h)
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(k, dtype=torch.float64))
    codes = torch.zeros_like(w)
    for i, j in enumerate(order):
        codes[:, j] = (w[:, j] / scales[:, j]).round().clamp(-limit[j], limit[j] - 1)
        error = (w[:, j] - codes[:, j] * scales[:, j]) / inverse[j, j]
        rest = order[i + 1 :]
        w[:, rest] -= error[:, None] * inverse[j, rest]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("k", "block_size"), [(7, 32), (48, 1), (48, 5), (100, 32)])
def test_same_integers_as_the_textbook(k: int, block_size: int, act_order: bool) -> None:
    w, x = problem(20, k)
    parts = parts_for(k, 1 / 4)
    h = moment(x)
    result = gptq(w, h, parts, block_size=block_size, act_order=act_order)
    order = list(range(k))
    if act_order:
        order = [j for p in parts for j in sorted(range(p.start, p.stop), key=lambda j: -float(h[j, j]))]
    want = textbook(w, h, column_scales(result), limits(parts), order)
    assert torch.equal(torch.cat([p.qdata for p in result.parts], 1).double(), want)


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_are_the_textbook_with_the_scales_of_groups(act_order: bool) -> None:
    """A column keeps the scale of its own group wherever act-order puts it; the last group of a part is smaller."""
    w, x = problem(20, 100)
    parts, h = parts_for(100, 1 / 4), moment(x)
    result = gptq(w, h, parts, act_order=act_order, group_size=32)
    assert [p.scale.shape for p in result.parts] == [(20, 3), (20, 1)]
    scales = torch.cat([p.scale.repeat_interleave(32, 1)[:, : p.qdata.shape[1]] for p in result.parts], 1)
    order = list(range(100))
    if act_order:
        order = [j for p in parts for j in sorted(range(p.start, p.stop), key=lambda j: -float(h[j, j]))]
    want = textbook(w, h, scales, limits(parts), order)
    assert torch.equal(torch.cat([p.qdata for p in result.parts], 1).double(), want)
    for p, q, rtn in zip(parts, result.parts, quantize_weight_rtn(w, parts, group_size=32), strict=True):
        assert torch.equal(q.scale, rtn.scale) and q.bits == p.bits and q.group_size == 32


def test_scales_and_shapes_are_those_of_rtn() -> None:
    w, x = problem(12, 40)
    parts = parts_for(40, 1 / 8, lowest_fraction=1 / 8)
    result = gptq(w, moment(x), parts, act_order=True)
    for p, q, rtn in zip(parts, result.parts, quantize_weight_rtn(w, parts), strict=True):
        assert q.bits == p.bits and q.qdata.shape == (12, p.width) and q.qdata.dtype == torch.int8
        assert torch.equal(q.scale, rtn.scale) and q.qdata.is_contiguous()


@pytest.mark.parametrize("act_order", [False, True])
def test_weight_error_up_output_error_down(act_order: bool) -> None:
    w, x = problem(64, 96)
    parts, h = parts_for(96, 1 / 8), moment(x)
    rtn = dequantize_weight(quantize_weight_rtn(w, parts))
    learned = dequantize_weight(gptq(w, h, parts, act_order=act_order).parts)
    assert (learned - w).norm() > (rtn - w).norm()
    assert hessian_error(w, learned, h).sum() < 0.8 * hessian_error(w, rtn, h).sum()


def test_row_loss_is_the_damped_output_error() -> None:
    w, x = problem(9, 32)
    h = moment(x)
    result = gptq(w, h, parts_for(32, 1 / 8))
    damped = h + result.damping * h.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    want = hessian_error(w, dequantize_weight(result.parts), damped)
    torch.testing.assert_close(result.row_loss, want, rtol=1e-4, atol=0)  # the errors are accumulated in float32


def test_diagonal_hessian_gives_rtn() -> None:
    w, _ = problem(10, 24)
    parts = parts_for(24, 1 / 8)
    result = gptq(w, torch.eye(24), parts)
    for got, want in zip(result.parts, quantize_weight_rtn(w, parts), strict=True):
        assert torch.equal(got.qdata, want.qdata)


def test_hessian_scale_and_block_size_do_not_matter() -> None:
    w, x = problem(16, 80)
    parts, h = parts_for(80, 1 / 8), moment(x)
    first = dequantize_weight(gptq(w, h, parts).parts)
    assert torch.equal(first, dequantize_weight(gptq(w, h / 1024, parts).parts))  # a power of two: exact
    assert torch.equal(first, dequantize_weight(gptq(w, h, parts, block_size=80).parts))  # no near tie on this data


def test_stacked_rows_are_independent() -> None:
    w, x = problem(24, 64)
    parts, h = parts_for(64, 1 / 8), moment(x)
    stacked = split_rows(gptq(w, h, parts).parts, [16, 8])
    for piece, rows in zip(stacked, w.split([16, 8]), strict=True):
        for q, alone in zip(piece, gptq(rows, h, parts).parts, strict=True):
            assert torch.equal(q.qdata, alone.qdata)


def test_act_order_keeps_columns_in_their_part() -> None:
    w, x = problem(16, 32)
    x[:, 2] *= 50  # a low column with the largest moment must stay 4-bit
    parts = parts_for(32, 1 / 4)
    low, high = gptq(w, moment(x), parts, act_order=True).parts
    assert int(low.qdata.max()) <= 7 and int(low.qdata.min()) >= -8 and int(high.qdata.abs().max()) > 8


def test_dead_columns_are_rounded() -> None:
    w, x = problem(8, 24)
    x[:, [3, 22]] = 0
    parts = parts_for(24, 1 / 8)
    result, rtn = gptq(w, moment(x), parts), quantize_weight_rtn(w, parts)
    assert result.dead_columns == 2
    assert torch.equal(result.parts[0].qdata[:, 3], rtn[0].qdata[:, 3])
    assert torch.equal(result.parts[1].qdata[:, 1], rtn[1].qdata[:, 1])


def test_fewer_tokens_than_columns_still_works() -> None:
    w, x = problem(8, 64, tokens=10)
    result = gptq(w, moment(x).float(), parts_for(64, 1 / 8))
    assert result.damping == 0.01 and dequantize_weight(result.parts).isfinite().all()


def test_damping_is_raised_and_reported_then_refused() -> None:
    w, _ = problem(4, 8)
    h = torch.eye(8)
    h[0, 1] = h[1, 0] = 1.05  # smallest eigenvalue -0.05: damping 0.01 fails, 0.1 is enough
    assert gptq(w, h, [Part(4, 0, 8)]).damping == pytest.approx(0.1)
    h[0, 1] = h[1, 0] = 100.0
    with pytest.raises(QuantError, match="not positive definite"):
        gptq(w, h, [Part(4, 0, 8)])


def test_weighted_clip_and_half_precision_inputs() -> None:
    w, x = problem(16, 32)
    h = moment(x)
    result = gptq(w.to(torch.bfloat16), h, parts_for(32, 1 / 8), weighted_clip=True)
    assert torch.isfinite(result.row_loss).all() and result.row_loss.shape == (16,)


def test_refusals() -> None:
    w, x = problem(4, 8)
    h, parts = moment(x), [Part(4, 0, 8)]
    with pytest.raises(QuantError, match="hessian must be"):
        gptq(w, h[:7, :7], parts)
    with pytest.raises(QuantError, match="NaN or infinite entries"):
        gptq(w, h * float("nan"), parts)
    with pytest.raises(QuantError, match="negative diagonal"):
        gptq(w, -h, parts)
    with pytest.raises(QuantError, match="damping > 0"):
        gptq(w, h, parts, damping=0.0)
    with pytest.raises(QuantError, match="without gaps"):
        gptq(w, h, [Part(4, 0, 7)])
    w[0, 0] = float("nan")
    with pytest.raises(QuantError, match="1 of 32 weights"):
        gptq(w, h, parts)
