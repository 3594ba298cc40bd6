"""norm_quantize and hadamard_quantize: codes of a given float row are the law's to the bit; norms and transforms to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.kernels import CodePart, RowParts, hadamard_quantize, norm_quantize
from resq_compiler.backends.fused.formats import centred

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import hadamard_plan, hadamard_transform
from resq_compiler.numerics.quantized import FLT_MIN, quantize_activation


def law(y, parts):
    """What the kernel must return for the float rows y."""
    made, start = [], 0
    for part in parts:
        stop = start + part.width * part.groups
        made.append(quantize_activation(y[:, start:stop], part.bits, part.groups, part.clip))
        start = stop
    made = [centred(xq) if xq.bits < 8 else xq for xq in made]
    rows = tuple(formats.pack_rows(xq.qdata, xq.groups) for xq in made)
    return RowParts(
        rows, tuple(p.width for p in parts), tuple(p.groups for p in parts), tuple(p.bits for p in parts),
        torch.cat([xq.scale for xq in made], 1), torch.cat([xq.zero_point for xq in made], 1),
    )  # fmt: skip


def equal(a: RowParts, b: RowParts) -> bool:
    same = all(torch.equal(x, y) for x, y in zip(a.rows, b.rows, strict=True))
    return same and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


def image(x: RowParts):
    """The float image of the codes."""
    pieces, run = [], 0
    for rows, width, groups in zip(x.rows, x.widths, x.groups, strict=True):
        codes = formats.unpack_rows(rows, width, groups).unflatten(-1, (groups, width)).float()
        runs = slice(run, run + groups)
        pieces.append(((codes - x.zero_point[:, runs, None]) * x.scale[:, runs, None]).flatten(1))
        run += groups
    return torch.cat(pieces, 1)


def assert_close_codes(got: RowParts, y, parts):
    """Scales to rounding, and every value within a step and a half of rounding of where it was."""
    expected = law(y, parts)
    torch.testing.assert_close(got.scale, expected.scale, rtol=2e-5, atol=0)
    assert (got.zero_point - expected.zero_point).abs().max() <= 1
    differ = (image(got) - image(expected)).abs()
    steps = torch.cat([s.expand(-1, p.width) for p in parts for s in expected.scale.split(1, 1)[: p.groups]], 1)[
        :, : y.shape[1]
    ]
    assert (differ <= 1.01 * steps.max()).all() and (differ > 0.5 * steps.min()).float().mean() < 0.01


@given(
    rows=st.integers(1, 5), widths=st.lists(st.integers(1, 70), min_size=1, max_size=3), groups=st.integers(1, 3),
    clip=st.sampled_from([1.0, 0.9, 0.01]), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_codes_are_the_law(library, rows, widths, groups, clip, seed):
    bits = (2, 4, 8)[3 - len(widths) :]
    parts = [CodePart(b, w, groups, clip) for b, w in zip(bits, widths, strict=True)]
    x = torch.randn(rows, sum(widths) * groups, generator=torch.Generator().manual_seed(seed)) * 5 - 1
    for name in (name for name, able in library.instruction_sets().items() if able):
        with library.using(name):
            assert equal(norm_quantize(library, x, parts), law(x, parts))


def test_corner_rows(library, isa):
    big = torch.finfo(torch.float32).max / 4
    rows = [
        [0.0] * 17,
        [1.0] * 17,
        [-3.0] * 17,
        [big, -big] + [1.0] * 15,
        [1e-30] * 17,
        [2.5, -2.5] + [0.5] * 15,
        [FLT_MIN] * 17,
    ]
    x, parts = torch.tensor(rows), [CodePart(8, 17)]
    assert equal(norm_quantize(library, x, parts), law(x, parts))


def test_subnormal_numbers_count_as_zero(library, isa):
    x = torch.full((1, 20), 1e-40)
    got = norm_quantize(library, x, [CodePart(8, 20)])
    assert torch.equal(image(got), torch.zeros(1, 20)) and got.scale.item() == FLT_MIN


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("columns", [(504, 72), (61, 3)])
def test_norms(library, isa, norm, columns):
    k = sum(columns)
    x, weight, bias = torch.randn(7, k) * 3 + 0.5, torch.rand(k) + 0.5, torch.randn(k)
    parts = [CodePart(4, columns[0]), CodePart(8, columns[1])]
    if norm == "rms":
        got = norm_quantize(library, x, parts, "rms", weight, None, 1e-5)
        assert_close_codes(got, F.rms_norm(x, (k,), weight, 1e-5), parts)
    else:
        got = norm_quantize(library, x, parts, "layer", weight, bias, 1e-5)
        assert_close_codes(got, F.layer_norm(x, (k,), weight, bias, 1e-5), parts)


ACTIVATIONS = {
    "none": lambda t: t,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library, isa, activation):
    """Widths of 1 have no transform: what is quantized in 8 bits is the activation itself."""
    gate = torch.linspace(-12, 12, 999)[:, None].contiguous()
    got = hadamard_quantize(library, gate, None, [CodePart(8, 1)], activation)
    expected = ACTIVATIONS[activation](gate)
    # a column alone is its own scale: the image is the value to a few units in the last place, or 0
    torch.testing.assert_close(image(got), expected, rtol=2e-6, atol=1e-6)  # gelu: the error function is good to 1.5e-7


@pytest.mark.parametrize("n", [1536, 64, 8, 36, 280, 86, 172, 4864, 7])
@pytest.mark.parametrize("transpose", [False, True])
def test_transforms(library, isa, n, transpose):
    gate, up = torch.randn(3, n), torch.randn(3, n)
    parts = [CodePart(8, n)]
    got = hadamard_quantize(library, gate, up, parts, "silu", transpose)
    assert_close_codes(got, hadamard_transform(F.silu(gate) * up, hadamard_plan(n), transpose), parts)


def test_transforms_and_norms_in_groups(library, isa):
    """A transform goes over all groups of a part; every group has a scale, and both parts have as many."""
    gate, up = torch.randn(3, 192), torch.randn(3, 192)
    parts = [CodePart(4, 28, 6), CodePart(8, 4, 6)]
    got = hadamard_quantize(library, gate, up, parts, "silu")
    pieces = (F.silu(gate) * up).split([168, 24], 1)
    turned = torch.cat([hadamard_transform(piece, hadamard_plan(piece.shape[1])) for piece in pieces], 1)
    assert got.scale.shape == (3, 12)
    assert_close_codes(got, turned, parts)
    assert_close_codes(
        norm_quantize(library, gate, parts, "rms", None, None, 1e-5), F.rms_norm(gate, (192,), None, 1e-5), parts
    )


def test_parts_have_transforms_of_their_own(library, isa):
    gate, parts = torch.randn(4, 144), [CodePart(4, 128), CodePart(8, 16)]
    got = hadamard_quantize(library, gate, None, parts)
    pieces = [hadamard_transform(piece, hadamard_plan(piece.shape[1])) for piece in gate.split([128, 16], 1)]
    assert_close_codes(got, torch.cat(pieces, 1), parts)


def test_all_instruction_sets_and_threads_agree(library):
    x, gate, up = torch.randn(9, 576), torch.randn(9, 280) * 4, torch.randn(9, 280)
    results = []
    for name in (name for name, able in library.instruction_sets().items() if able):
        with library.using(name):
            for threads in (1, 2, 3, 4):
                normed = norm_quantize(
                    library, x, [CodePart(4, 504), CodePart(8, 72)], "rms", None, None, 1e-5, threads
                )
                turned = hadamard_quantize(library, gate, up, [CodePart(8, 280)], "gelu", threads=threads)
                results.append((normed, turned))
    assert all(equal(results[0][i], other[i]) for other in results for i in (0, 1))


def test_operands_that_do_not_fit(library):
    with pytest.raises(BackendError, match="x is torch.float64"):
        norm_quantize(library, torch.zeros(2, 8, dtype=torch.float64), [CodePart(4, 8)])
    with pytest.raises(BackendError, match="1 parts with 65537 columns; expected .* at most 65536"):
        norm_quantize(library, torch.zeros(1, 65537), [CodePart(4, 65537)])
    with pytest.raises(BackendError, match="up is torch.float32 .*expected contiguous torch.float32 \\(2, 8\\)"):
        hadamard_quantize(library, torch.zeros(2, 8), torch.zeros(2, 7), [CodePart(4, 8)])
