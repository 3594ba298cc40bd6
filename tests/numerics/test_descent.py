"""Coordinate descent against its definition: errors computed directly, every single change tried, scales by lstsq."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import QuantError
from resq_compiler.numerics.descent import descend
from resq_compiler.numerics.gptq import gptq, hessian_error
from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.weights import dequantize_weight

PARTS = [Part(4, 0, 20), Part(8, 20, 24)]


def problem(rows: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, 24] and the moment of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    return torch.randn(rows, 24, generator=draw), x.T @ x / 400


@pytest.mark.parametrize("act_order", [False, True])
def test_every_round_lowers_the_error(act_order):
    w, hessian = problem()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    errors = []
    for sweeps in (0, 1, 2, 8):
        found = gptq(w, hessian, PARTS, act_order=act_order, sweeps=sweeps)
        error = hessian_error(w, dequantize_weight(found.parts), damped)
        torch.testing.assert_close(found.row_loss, error, rtol=1e-4, atol=0)  # float32 against float64 sums
        errors.append(error)
    assert all(bool((b <= a * 1.0001).all()) for a, b in zip(errors, errors[1:], strict=False))  # rounding of the sums
    assert errors[-1].sum() < 0.97 * errors[0].sum()


def test_it_ends_where_no_single_code_can_be_better():
    w, hessian = problem()
    found = gptq(w, hessian, PARTS, sweeps=40)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    image = dequantize_weight(found.parts)
    best = hessian_error(w, image, damped)
    for part, piece in zip(PARTS, found.parts, strict=True):
        for j in range(part.width):
            for step in (-1, 1):
                allowed = (piece.qdata[:, j] + step).clamp(-(2 ** (part.bits - 1)), 2 ** (part.bits - 1) - 1)
                other = image.clone()
                other[:, part.start + j] = allowed * piece.scale
                assert bool((hessian_error(w, other, damped) >= best * (1 - 1e-5)).all())


def test_scales_are_least_squares():
    """With no room for codes to move (one round on codes that are already best), scales solve the normal equations."""
    w, hessian = problem()
    first = gptq(w, hessian, PARTS, sweeps=40)
    root = torch.linalg.cholesky(hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(24)).mT
    for row in range(len(w)):
        pieces = [
            root[:, p.start : p.stop] @ piece.qdata[row].double() for p, piece in zip(PARTS, first.parts, strict=True)
        ]
        fitted = torch.linalg.lstsq(torch.stack(pieces, 1), root @ w[row].double()).solution
        found = torch.stack([piece.scale[row] for piece in first.parts])
        torch.testing.assert_close(found.double(), fitted, rtol=1e-4, atol=0)  # found in float32


def test_blocks_change_nothing_but_rounding():
    w, hessian = problem()
    whole, single = (gptq(w, hessian, PARTS, sweeps=3, block_size=size) for size in (32, 1))
    assert all(torch.equal(a.qdata, b.qdata) for a, b in zip(whole.parts, single.parts, strict=True))


def test_rows_of_zeros_and_dead_columns():
    w, hessian = problem()
    w[3] = 0
    hessian[:, 5] = hessian[5] = 0
    found = gptq(w, hessian, PARTS, sweeps=3)
    assert found.dead_columns == 1
    assert all(bool(p.scale.isfinite().all()) and bool((p.scale > 0).all()) for p in found.parts)
    assert not dequantize_weight(found.parts)[3].any()


def test_inputs_are_left_as_they_were():
    w, hessian = problem()
    columns, codes, scales = w.T.contiguous(), torch.zeros(24, 12, dtype=torch.int8), [torch.full((12,), 0.1)] * 2
    before = columns.clone(), codes.clone(), [s.clone() for s in scales]
    descend(columns, hessian, codes, scales, PARTS, 2)
    assert torch.equal(columns, before[0]) and torch.equal(codes, before[1])
    assert all(torch.equal(a, b) for a, b in zip(scales, before[2], strict=True))


def test_no_sweeps_with_gptaq():
    w, hessian = problem()
    with pytest.raises(QuantError, match="with cross .GPTAQ. sweeps must be 0"):
        gptq(w, hessian, PARTS, cross=hessian, sweeps=1)
