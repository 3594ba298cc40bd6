"""The law of the integers, against numpy written from the formulas (float32 operations, int64 accumulators)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resq_compiler.errors import DataError, QuantError
from resq_compiler.numerics import quantized
from resq_compiler.numerics.clip import SHARES
from resq_compiler.numerics.quantized import (
    FLT_MIN,
    MAX_EXACT_WIDTH,
    Part,
    QuantizedActivation,
    QuantSpec,
    check_parts,
    dequantize,
    integer_linear,
    parts_for,
    quantize_activation,
    quantize_dequantize,
    quantize_static,
)
from resq_compiler.numerics.static_scales import Range, StaticSearch


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def law(x: np.ndarray, bits: int, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The contract's formulas in numpy float32; x [..., K] is one group."""
    x = x.astype(np.float32)
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0)) * np.float32(clip)
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0)) * np.float32(clip)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), np.finfo(np.float32).tiny)
    zero = np.rint(-low / scale) - 2 ** (bits - 1)
    q = np.clip(np.rint(x / scale) + zero, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return q.astype(np.int64), scale, zero.astype(np.int64)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_quantize_is_the_law(bits: int, clip: float) -> None:
    x = torch.randn(5, 17, 72, generator=rng()) * torch.rand(5, 17, 1, generator=rng(1)) * 10 - 1
    xq = quantize_activation(x, bits, clip=clip)
    q, scale, zero = law(x.numpy(), bits, clip)
    assert xq.qdata.dtype == torch.int8 and xq.scale.dtype == torch.float32 and xq.zero_point.dtype == torch.int32
    assert np.array_equal(xq.qdata.numpy(), q)
    assert np.array_equal(xq.scale.numpy(), scale) and np.array_equal(xq.zero_point.numpy(), zero)


def test_groups_are_independent_quantizations() -> None:
    x = torch.randn(3, 4, 9 * 8, generator=rng())
    xq = quantize_activation(x, 4, groups=9)
    assert xq.scale.shape == (3, 4, 9) and xq.groups == 9
    for g, piece in enumerate(x.split(8, dim=-1)):
        one = quantize_activation(piece, 4)
        assert torch.equal(xq.qdata[..., 8 * g : 8 * g + 8], one.qdata)
        assert torch.equal(xq.scale[..., g : g + 1], one.scale)
        assert torch.equal(xq.zero_point[..., g : g + 1], one.zero_point)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_one_step_and_zero_is_exact(bits: int) -> None:
    x = torch.randn(64, 40, generator=rng())
    x[:, 3] = 0
    xq = quantize_activation(x, bits)
    image = dequantize(xq)
    # x and the zero-point each round by half a step: together at most one step (1e-5: float32 rounding)
    assert ((image - x).abs() <= xq.scale * (1 + 1e-5)).all()
    assert (image[:, 3] == 0).all()


@pytest.mark.parametrize(
    "row", [[0.0, 0.0], [1e-41, -1e-42], [5.0, 5.0], [-3.0, -3.0], [0.0, 7.5], [1e30, -1e30], [0.5, 1.5, 2.5, 15.0]]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_corner_rows(row: list[float], bits: int) -> None:
    x = torch.tensor([row])
    xq = quantize_activation(x, bits)
    q, scale, zero = law(x.numpy(), bits, 1.0)
    assert np.array_equal(xq.qdata.numpy(), q) and np.array_equal(xq.zero_point.numpy(), zero)
    assert (xq.scale >= FLT_MIN).all() and dequantize(xq).isfinite().all()
    spec = QuantSpec(bits, symmetric=False)
    assert spec.qmin <= int(xq.zero_point) <= spec.qmax


def test_input_is_untouched_and_any_float_dtype_works() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        x = torch.randn(4, 16, generator=rng()).to(dtype).requires_grad_()
        before = x.detach().clone()
        xq = quantize_activation(x, 4)
        assert torch.equal(xq.qdata, quantize_activation(before.float(), 4).qdata)
        assert quantize_dequantize(x, [(4, 0, 16)]).dtype == dtype
        assert torch.equal(x.detach(), before)


def test_quantize_dequantize_is_the_image_of_the_codes() -> None:
    x = torch.randn(2, 3, 5, 64, generator=rng())
    parts = parts_for(64, 1 / 8, lowest_fraction=1 / 8)
    image = quantize_dequantize(x, parts, clip=0.95)
    for p in parts:
        piece = x[..., p.start : p.stop]
        assert torch.equal(image[..., p.start : p.stop], dequantize(quantize_activation(piece, p.bits, clip=0.95)))


@pytest.mark.parametrize(
    ("bits", "weight_bits", "rows"), [(4, 4, 1), (4, 8, 700), (8, 8, 1), (8, 8, 700), (7, 2, 33), (2, 2, 5)]
)
@pytest.mark.parametrize("extreme", [False, True])
def test_integer_linear_matches_int64(bits: int, weight_bits: int, rows: int, extreme: bool) -> None:
    n, k, spec, wspec = 37, 71, QuantSpec(bits, symmetric=False), QuantSpec(weight_bits)

    def draw(shape: tuple[int, ...], s: QuantSpec, seed: int) -> torch.Tensor:
        if extreme:
            return torch.where(torch.rand(shape, generator=rng(seed)) < 0.5, s.qmin, s.qmax)
        return torch.randint(s.qmin, s.qmax + 1, shape, generator=rng(seed))

    qx, qw, zero = draw((rows, k), spec, 0), draw((n, k), wspec, 1), draw((rows, 1), spec, 2)
    acc = (qx.numpy() - zero.numpy()).astype(np.int64) @ qw.numpy().astype(np.int64).T
    xq = QuantizedActivation(qx.to(torch.int8), torch.ones(rows, 1), zero.int(), bits)
    # unit scales show the accumulator itself; below 2^24 float32 holds it exactly
    assert np.array_equal(integer_linear(xq, qw.to(torch.int8), torch.ones(n)).numpy().astype(np.int64), acc)
    sx, sw = torch.rand(rows, 1, generator=rng(3)), torch.rand(n, generator=rng(4))
    xq = QuantizedActivation(xq.qdata, sx, xq.zero_point, bits)
    y = integer_linear(xq, qw.to(torch.int8), sw, row_sum=qw.sum(1, dtype=torch.int32))
    assert np.array_equal(y.numpy(), acc.astype(np.float32) * (sx.numpy() * sw.numpy()))


def test_a_part_of_one_column() -> None:
    xq = quantize_activation(torch.tensor([[3.0], [-5.0], [0.5]]), 8)
    qdata = torch.tensor([[-128], [83], [7]], dtype=torch.int8)
    acc = (xq.qdata.long() - xq.zero_point.long()) @ qdata.long().T
    assert torch.equal(integer_linear(xq, qdata, torch.ones(3)), acc.float() * xq.scale)


def test_largest_accumulator_does_not_overflow() -> None:
    assert MAX_EXACT_WIDTH * 255 * 128 < 2**31 <= (MAX_EXACT_WIDTH + 1) * 255 * 128
    k = MAX_EXACT_WIDTH
    qx = torch.full((2, k), 127, dtype=torch.int8)
    xq = QuantizedActivation(qx, torch.ones(2, 1), torch.full((2, 1), -128, dtype=torch.int32), 8)
    y = integer_linear(xq, torch.full((1, k), -128, dtype=torch.int8), torch.ones(1))
    assert y.flatten().tolist() == [float(np.float32(-k * 255 * 128))] * 2
    wide = QuantizedActivation(torch.zeros(1, k + 1, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1).int(), 8)
    with pytest.raises(QuantError, match="overflow"):
        integer_linear(wide, torch.zeros(1, k + 1, dtype=torch.int8), torch.ones(1))


def test_grouped_integer_linear_follows_the_sum_over_groups() -> None:
    x = torch.randn(2, 7, 9 * 8, generator=rng())
    qw = torch.randint(-8, 8, (20, 72), generator=rng(1), dtype=torch.int8)
    sw = torch.rand(20, generator=rng(2))
    xq = quantize_activation(x, 8, groups=9)
    centred = xq.qdata.numpy().reshape(2, 7, 9, 8).astype(np.int64) - xq.zero_point.numpy()[..., None]
    acc = np.einsum("btgk,ngk->btgn", centred, qw.numpy().reshape(20, 9, 8).astype(np.int64))
    exact = (acc * xq.scale.double().numpy()[..., None]).sum(2) * sw.double().numpy()
    # float32 sums of 72 terms: a few ulp of the row's magnitude
    np.testing.assert_allclose(integer_linear(xq, qw, sw).numpy(), exact, atol=1e-6 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 5])
def test_weight_groups_are_summed_with_their_scales(bits: int, groups: int) -> None:
    """Against float64; 70 columns in groups of 32, the last of 6."""
    xq = quantize_activation(torch.randn(3, 9, 70, generator=rng()), bits, groups)
    qdata = torch.randint(-8, 8, (11, 70), generator=rng(1), dtype=torch.int8)
    scale = torch.rand(11, 3, generator=rng(2)) + 0.5
    image = qdata.double() * scale.double().repeat_interleave(32, 1)[:, :70]
    want = dequantize(xq, torch.float64) @ image.T
    got = integer_linear(xq, qdata, scale, group_size=32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)  # float32 sums over groups
    with pytest.raises(QuantError, match=r"expected 2 groups of 64 for 70 columns"):
        integer_linear(quantize_activation(torch.ones(1, 70), 4, 5), qdata, scale, group_size=64)


def test_static_codes_are_the_law_with_given_scales() -> None:
    x = torch.randn(2, 3, 12, generator=rng())
    scale, zero = torch.tensor([0.3, 0.1]), torch.tensor([-2, 3], dtype=torch.int32)
    xq = quantize_static(x, 4, scale, zero)
    want = (x.unflatten(-1, (2, 6)) / scale[:, None]).round().add(zero[:, None]).clamp(-8, 7).flatten(-2)
    assert torch.equal(xq.qdata, want.to(torch.int8)) and xq.scale.shape == (2, 3, 2)
    dynamic = quantize_activation(x[0, 0], 8)
    same = quantize_static(x[0, 0], 8, dynamic.scale, dynamic.zero_point)
    assert torch.equal(same.qdata, dynamic.qdata)


def test_the_static_search_finds_the_best_share() -> None:
    """One far value in 4 bits: the range that is covered is smaller than what was seen, and no other share is better."""
    x = torch.randn(1, 400, 8, generator=rng())
    x[0, 0, 0] = 9
    seen = Range("test", 1)
    seen.update(x)
    assert (float(seen.low), float(seen.high)) == (float(x.min()), 9)
    search = StaticSearch(4, seen)
    search.update(x)
    scale, zero = search.best()
    errors = [(dequantize(quantize_static(x, 4, *search.scales(s))) - x).square().sum() for s in SHARES]
    assert (dequantize(quantize_static(x, 4, scale, zero)) - x).square().sum() == min(errors) < errors[0]
    with pytest.raises(DataError, match="range of test: not finite"):
        seen.update(torch.full((1, 8), torch.nan))


def test_chunked_rows_equal_unchunked_rows() -> None:
    x = torch.randn(1025, 24, generator=rng())
    qw, sw = torch.randint(-128, 128, (10, 24), generator=rng(1), dtype=torch.int8), torch.rand(10, generator=rng(2))
    whole = integer_linear(quantize_activation(x, 8), qw, sw)
    rows = torch.cat([integer_linear(quantize_activation(r, 8), qw, sw) for r in x.split(100)])
    assert torch.equal(whole, rows)


def test_fake_tensors_and_export_see_the_codes() -> None:
    class Linear(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[QuantizedActivation, torch.Tensor]:
            xq = quantize_activation(x, 4, groups=1)
            qw, sw = torch.ones(6, 16, dtype=torch.int8), torch.ones(6)
            image = quantize_dequantize(x, [(4, 0, 10), (8, 10, 16)])
            return xq, integer_linear(xq, qw, sw) + image.sum(-1, keepdim=True)

    with FakeTensorMode():
        xq, y = Linear()(torch.randn(2, 3, 16))
        assert xq.qdata.shape == (2, 3, 16) and xq.qdata.dtype == torch.int8 and y.shape == (2, 3, 6)
    x = torch.randn(2, 3, 16, generator=rng())
    dynamic = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("s")}}
    exported = torch.export.export(Linear(), (x,), dynamic_shapes=dynamic).module()
    longer = torch.randn(5, 200, 16, generator=rng(1))
    (got, y), (want, z) = exported(longer), Linear()(longer)
    assert isinstance(got, QuantizedActivation) and got.bits == 4
    assert torch.equal(got.qdata, want.qdata) and torch.equal(y, z)


def test_parts() -> None:
    assert parts_for(576, 1 / 8) == (Part(4, 0, 504), Part(8, 504, 576))
    assert parts_for(576, 0) == (Part(4, 0, 576),)
    assert parts_for(576, 1) == (Part(8, 0, 576),)
    assert parts_for(576, 1 / 8, lowest_fraction=1 / 8) == (Part(2, 0, 72), Part(4, 72, 504), Part(8, 504, 576))
    assert parts_for(576, 1 / 8, rank_multiple=16)[1].width == 80  # 72 is half-way between 64 and 80
    assert parts_for(64, 1 / 8, rank_multiple=16)[1].width == 16  # never rounded away
    assert parts_for(100, 1 / 8)[1].width == 12  # floor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 4, "high_fraction": 1 / 8}, "less than one column"),
        ({"width": 8, "high_fraction": 1.5}, "high_fraction"),
        ({"width": 8, "high_fraction": 0.5, "rank_multiple": 16}, "exceed"),
        ({"width": 8, "high_fraction": 0.5, "low_bits": 8, "high_bits": 4}, "descend"),
        ({"width": 8, "high_fraction": 0.5, "low_bits": 1}, "2..8"),
    ],
)
def test_parts_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(QuantError, match=message):
        parts_for(**arguments)


def test_check_parts_refuses_gaps() -> None:
    with pytest.raises(QuantError, match="without gaps"):
        check_parts([Part(4, 0, 3), Part(8, 4, 8)], 8)
    with pytest.raises(QuantError, match="without gaps"):
        check_parts([], 8)


@pytest.mark.parametrize("arguments", [{"bits": 9}, {"bits": 4, "clip": 0.0}, {"bits": 4, "groups": 3}])
def test_quantize_refuses(arguments: dict) -> None:
    with pytest.raises(QuantError):
        quantize_activation(torch.zeros(2, 8), **arguments)
    with pytest.raises(QuantError, match="floating"):
        quantize_activation(torch.zeros(2, 8).int(), 4)


def test_linear_refuses_mismatched_shapes() -> None:
    xq = quantize_activation(torch.zeros(2, 8), 4)
    with pytest.raises(QuantError, match="expected codes"):
        integer_linear(xq, torch.zeros(3, 9, dtype=torch.int8), torch.ones(3))
    with pytest.raises(QuantError, match="int8"):
        integer_linear(xq, torch.zeros(3, 8), torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device for the padded _int_mm")
def test_cuda_integer_linear_equals_cpu() -> None:
    x, qw = torch.randn(3, 71, generator=rng()), torch.randint(-128, 128, (37, 71), generator=rng(1), dtype=torch.int8)
    want = integer_linear(quantize_activation(x, 8), qw, torch.ones(37))
    got = quantized.integer_linear(quantize_activation(x.cuda(), 8), qw.cuda(), torch.ones(37, device="cuda"))
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("group_size", [None, 6])
def test_a_float_image_is_made_some_rows_at_a_time(group_size, monkeypatch):
    draw = torch.Generator().manual_seed(3)
    x, codes = torch.randn(2, 3, 16, generator=draw), torch.randint(-8, 8, (11, 16), generator=draw, dtype=torch.int8)
    scale = torch.rand(11, *([] if group_size is None else [3]), generator=draw) + 0.1
    columns = scale[:, None] if group_size is None else scale.repeat_interleave(6, 1)[:, :16]
    expected = x @ (codes * columns).T
    for at_a_time in (2**24, 4 * 16, 1):
        monkeypatch.setattr(quantized, "IMAGE_AT_A_TIME", at_a_time)
        found = quantized.weight_only_linear(x, codes, scale, group_size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
