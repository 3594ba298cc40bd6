from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.kernels import RowParts, mixed_linear, pack_linear
from resq_compiler.backends.fused.formats import centred

from resq_compiler.errors import BackendError, QuantError
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear, quantize_activation


def rows_of(parts: list[QuantizedActivation]) -> RowParts:
    held = [centred(p) if p.bits < 8 else p for p in parts]
    return RowParts(
        tuple(formats.pack_rows(p.qdata, p.groups) for p in held),
        tuple(p.qdata.shape[-1] // p.groups for p in parts),
        tuple(p.groups for p in parts),
        tuple(p.bits for p in parts),
        torch.cat([p.scale for p in parts], -1),
        torch.cat([p.zero_point for p in held], -1),
    )


def example(seed, rows, channels, widths, bits, weight_bits, groups):
    """Quantized rows and weight parts (qdata, scale, bits); the extreme codes of every width occur."""
    g = torch.Generator().manual_seed(seed)
    parts, weights = [], []
    for width, b, wb, n_groups in zip(widths, bits, weight_bits, groups, strict=True):
        x = torch.randn(rows, width * n_groups, generator=g) * 3 + 1
        parts.append(quantize_activation(x, b, n_groups))
        q = torch.randint(-(2 ** (wb - 1)), 2 ** (wb - 1), (channels, width * n_groups), generator=g, dtype=torch.int8)
        q[::3] = -(2 ** (wb - 1))
        weights.append((q, torch.rand(channels, generator=g) * 0.01 + 1e-4, wb))
    return parts, weights


def reference(parts, weights, bias=None, residual=None):
    y = sum(integer_linear(x, q, scale) for x, (q, scale, _) in zip(parts, weights, strict=True))
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


SHAPES = {
    "one_row": (1, 200, (504, 72), (4, 8), (4, 8)),
    "many_rows": (103, 130, (56, 8), (4, 8), (4, 8)),
    "odd_columns": (7, 65, (61, 3), (4, 8), (4, 8)),
    "one_column": (2, 1, (1, 1), (4, 8), (4, 8)),
    "low_only": (13, 64, (1536,), (4,), (4,)),
    "high_only": (5, 96, (333,), (8,), (8,)),
    "weights_of_4_bits": (9, 70, (120,), (8,), (4,)),
    "three_parts": (6, 64, (64, 120, 24), (2, 4, 8), (2, 4, 8)),
    "between": (4, 64, (40, 24), (3, 6), (3, 5)),
    "a_tile_of_rows": (16, 64, (64, 64), (4, 8), (4, 8)),
    "more_columns_than_a_stretch": (150, 70, (1109, 520), (4, 8), (4, 8)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_integer_law_to_the_bit(library, isa, shape):
    rows, channels, widths, bits, weight_bits = SHAPES[shape]
    groups = (1,) * len(widths)
    parts, weights = example(0, rows, channels, widths, bits, weight_bits, groups)
    bias, residual = torch.randn(channels), torch.randn(rows, channels)
    packed = pack_linear(weights, groups, bits)
    assert torch.equal(mixed_linear(library, rows_of(parts), packed), reference(parts, weights))
    y = mixed_linear(library, rows_of(parts), packed, bias, residual)
    assert torch.equal(y, reference(parts, weights, bias, residual))


@pytest.mark.parametrize("rows", [11, 57])
@pytest.mark.parametrize("widths", [(56, 8), (61, 3)])
def test_a_scale_for_each_head(library, isa, widths, rows):
    """float32 of every head's exact sum, times its scale, heads in order: the law's sum up to the order of float32 additions."""
    parts, weights = example(1, rows, 100, widths, (4, 8), (4, 8), (9, 9))
    expected = None
    for xq, (q, scale, _) in zip(parts, weights, strict=True):
        x, w = xq.qdata.unflatten(-1, (9, -1)).long(), q.unflatten(-1, (9, -1)).long()
        acc = torch.einsum("mgk,ngk->mgn", x - xq.zero_point[..., None], w).float()
        y = torch.zeros(rows, 100)
        for g in range(9):
            y = y + acc[:, g] * xq.scale[:, g, None]
        expected = y * scale if expected is None else expected + y * scale
    y = mixed_linear(library, rows_of(parts), pack_linear(weights, (9, 9), (4, 8)))
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, reference(parts, weights), rtol=1e-4, atol=1e-4)  # sums in another order


def test_the_largest_sums_are_exact(library, isa):
    """Every product as large as it can be, over more columns than 16 bits could add up."""
    k = 65792
    q = torch.full((64, k), -128, dtype=torch.int8)
    xq = QuantizedActivation(
        torch.full((2, k), -128, dtype=torch.int8),
        torch.ones(2, 1),
        torch.tensor([[127], [-128]], dtype=torch.int32),
        8,
    )
    y = mixed_linear(library, rows_of([xq]), pack_linear([(q, torch.ones(64), 8)], (1,), (8,)))
    assert torch.equal(y, torch.tensor([[255.0 * 128 * k], [0.0]]).expand(2, 64))


@given(
    rows=st.integers(1, 14) | st.integers(15, 150), channels=st.integers(1, 140), low=st.integers(1, 90), high=st.integers(1, 40),
    groups=st.sampled_from([(1, 1), (1, 1), (3, 3), (5, 1), (1, 2)]), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_all_instruction_sets_and_threads_agree(library, rows, channels, low, high, groups, seed):
    parts, weights = example(seed, rows, channels, (low, high), (4, 8), (4, 8), groups)
    x, packed = rows_of(parts), pack_linear(weights, groups, (4, 8))
    residual = torch.randn(rows, channels)
    results = []
    for name in (name for name, able in library.instruction_sets().items() if able):
        with library.using(name):
            results += [mixed_linear(library, x, packed, None, residual, threads=threads) for threads in (1, 2, 3, 4)]
    assert all(torch.equal(results[0], y) for y in results)
    if groups == (1, 1):
        assert torch.equal(results[0], reference(parts, weights, None, residual))


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize(("channels", "width", "groups"), [(64, 8, 1), (100, 13, 3)])
def test_weights_and_rows_come_back(library, bits, channels, width, groups):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, width * groups), dtype=torch.int8)
    tiles = formats.pack_weight(codes, bits, groups)
    assert tiles.shape == (-(-channels // 64), library.tile_bytes(width, groups, bits))
    assert torch.equal(formats.unpack_weight(tiles, channels, width, bits, groups), codes)
    rows = formats.pack_rows(codes, groups)
    assert rows.shape == (channels, library.row_bytes(width, groups))
    assert torch.equal(formats.unpack_rows(rows, width, groups), codes)


def test_operands_that_do_not_fit(library):
    parts, weights = example(0, 2, 64, (16, 8), (4, 8), (4, 8), (1, 1))
    x, packed = rows_of(parts), pack_linear(weights, (1, 1), (4, 8))
    with pytest.raises(
        BackendError, match=r"residual is torch.float32 \(2, 63\).*expected contiguous torch.float32 \(2, 64\)"
    ):
        mixed_linear(library, x, packed, residual=torch.zeros(2, 63))
    with pytest.raises(BackendError, match="2 parts of rows, 1 of weights"):
        mixed_linear(library, x, pack_linear(weights[:1], (1,), (4,)))
    with pytest.raises(QuantError, match="a multiple of 3 columns"):
        formats.pack_weight(weights[0][0], 4, 3)
