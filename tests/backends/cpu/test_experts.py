"""The kernels of mixtures: exact sums of every expert's rows, whatever its bits, and one ONNX Runtime node for what they do together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.experts import ExpertWeight, RowGroups, combined_linear, grouped_linear, sort_rows
from resq_compiler.backends.cpu.kernels import CodePart, RowParts, hadamard_quantize, norm_quantize

from resq_compiler.errors import BackendError
from resq_compiler.numerics.hadamard import hadamard_plan, hadamard_transform
from resq_compiler.numerics.hadamard_orders import is_power_of_two
from resq_compiler.numerics.quantized import QuantizedActivation, integer_linear, quantize_activation
from tests.backends.cpu.test_onnx_operators import Node

PARTS = [CodePart(4, 40), CodePart(8, 24)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(bits, channels, widths=(40, 24), seed=0, bias=True):
    """A packed linear of experts with `bits` for every expert and part, and its plain codes [expert][part]."""
    g = torch.Generator().manual_seed(seed)
    codes = [
        [
            torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (channels, w), generator=g, dtype=torch.int8)
            for b, w in zip(of, widths, strict=True)
        ]
        for of in bits
    ]
    tiles = [
        formats.pack_weight(q, b).flatten()
        for of, each in zip(bits, codes, strict=True)
        for b, q in zip(of, each, strict=True)
    ]
    sums = torch.stack([each[1].sum(-1, dtype=torch.int32)[None] for each in codes])  # low rows are centred
    scale = torch.rand(len(bits), len(widths), channels, generator=g) * 0.01 + 1e-4
    packed = ExpertWeight(torch.cat(tiles), scale, sums, torch.tensor(bits, dtype=torch.int32))
    return (replace(packed, bias=random(len(bits), channels, seed=seed)) if bias else packed), codes


def law(x: RowParts, weight, codes, groups: RowGroups):
    """Every group's rows by the integer law."""
    found = []
    edges = groups.first_row.tolist()
    for expert, start, stop in zip(groups.expert.tolist(), edges, edges[1:], strict=False):
        y = None
        for i, width in enumerate(x.widths):
            rows = formats.unpack_rows(x.rows[i][start:stop], width)
            part = QuantizedActivation(rows, x.scale[start:stop, i : i + 1], x.zero_point[start:stop, i : i + 1], 8)
            product = integer_linear(part, codes[expert][i], weight.scale[expert, i])
            y = product if y is None else y + product
        found.append(y if weight.bias is None else y + weight.bias[expert])
    return torch.cat(found) if found else torch.empty(0, weight.shape[2])


BITS = {"same": [[4, 8]] * 6, "unlike": [[4, 8], [8, 8], [2, 6], [3, 4], [5, 8], [4, 2]]}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("tokens", "choices"), [(1, 2), (7, 3), (60, 2)])
def test_equals_the_integer_law_to_the_bit(library, isa, bits, tokens, choices):
    """Few and many rows, more than a unit has; experts without rows."""
    indices = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(tokens)).topk(choices).indices
    groups, order = sort_rows(indices, 6)
    weight, codes = weights_of(BITS[bits], 100)
    x = norm_quantize(library, random(tokens * choices, 64), PARTS)
    assert 5 not in groups.expert.tolist() and len(order) == tokens * choices
    assert torch.equal(grouped_linear(library, x, weight, groups), law(x, weight, codes, groups))


def test_sums_over_the_choices_of_a_token(library, isa):
    indices = torch.tensor([[2, 0], [2, 1], [0, 2], [1, 0]])
    groups, order = sort_rows(indices, 3)
    assert groups.expert.tolist() == [0, 1, 2] and groups.first_row.tolist() == [0, 3, 5, 8]
    assert order.tolist() == [1, 4, 7, 3, 6, 0, 2, 5]
    weight, codes = weights_of(BITS["unlike"][:3], 70)
    x, share = norm_quantize(library, random(8, 64), PARTS), random(8, seed=1)
    token, residual = (order // 2).int(), random(4, 70, seed=2)
    y, expected = law(x, weight, codes, groups), residual.clone()
    for row in range(8):
        expected[token[row]] += share[row] * y[row]
    assert torch.equal(combined_linear(library, x, weight, groups, token, share, 4, residual), expected)


@given(
    tokens=st.integers(0, 30), choices=st.integers(1, 3), channels=st.integers(1, 140), low=st.integers(1, 50), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_all_instruction_sets_and_threads_agree(library, tokens, choices, channels, low, seed):
    indices = torch.randint(0, 6, (tokens, choices), generator=torch.Generator().manual_seed(seed))
    groups, order = sort_rows(indices, 6)
    weight, codes = weights_of(BITS["unlike"], channels, (low, 24), seed)
    x = norm_quantize(library, random(tokens * choices, low + 24), [CodePart(4, low), PARTS[1]])
    token, share = (order // choices).int(), random(tokens * choices, seed=1)
    results = []
    for name in (name for name, able in library.instruction_sets().items() if able):
        with library.using(name):
            for threads in (1, 3):
                y = combined_linear(library, x, weight, groups, token, share, tokens, threads=threads)
                results.append((grouped_linear(library, x, weight, groups, threads), y))
    assert torch.equal(results[0][0], law(x, weight, codes, groups))
    assert all(torch.equal(a, b) for each in results for a, b in zip(each, results[0], strict=True))


def test_clamped_gates(library, isa):
    """gpt-oss: values beyond the limit on both sides, with a transform and without."""
    gate, up, limit, slope = random(9, 44) * 4, random(9, 44, seed=1) * 4, 3.0, 1.702
    g = gate.clamp(max=limit)
    y = (up.clamp(-limit, limit) + 1) * (g * torch.sigmoid(g * slope))
    for transpose, expected in ((None, y), (False, hadamard_transform(y, hadamard_plan(44)))):
        got = hadamard_quantize(library, gate, up, [CodePart(8, 44)], "clamped", transpose, 1, limit, slope)
        known = quantize_activation(expected, 8)
        torch.testing.assert_close(got.scale, known.scale, rtol=1e-5, atol=0)
        assert (formats.unpack_rows(got.rows[0], 44).int() - known.qdata.int()).abs().max() <= 1
        assert (formats.unpack_rows(got.rows[0], 44) != known.qdata).float().mean() < 0.02


def mixture(bits=BITS["unlike"], hidden=40, parts=2):
    """Operands of an Experts node behind codes and routing, and the weights they are of."""
    gate_up = weights_of(bits, 2 * hidden)[0]
    down = weights_of(bits, 70, (hidden - 8, 8), seed=1)[0]
    return gate_up, down


def test_one_node_for_all(library):
    """In bytes what its kernels give one after the other; more rows than gate and up are computed for at a time."""
    hidden, tokens, choices = 560, 700, 2  # 1400 rows of 2 x 560 floats are more than 4 MiB
    gate_up = weights_of(BITS["unlike"], 2 * hidden)[0]
    down = weights_of(BITS["unlike"], 70, (hidden - 8, 8), seed=1)[0]
    rows = norm_quantize(library, random(tokens, 64), PARTS)
    indices = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(3)).topk(choices).indices
    shares = random(tokens, choices, seed=4)
    groups, order = sort_rows(indices, 6)
    token = order // choices
    mine = replace(
        rows, rows=tuple(r[token] for r in rows.rows), scale=rows.scale[token], zero_point=rows.zero_point[token]
    )
    gate, up = (piece.contiguous() for piece in grouped_linear(library, mine, gate_up, groups).chunk(2, -1))
    parts = [CodePart(4, hidden - 8, 1, 0.9), CodePart(8, 8)]
    codes = hadamard_quantize(library, gate, up, parts, "silu")
    expected = combined_linear(library, codes, down, groups, token.int(), shares.flatten()[order], tokens)
    plans = {"low": hadamard_plan(hidden - 8), "high": hadamard_plan(8)}
    orders = {f"{side}_order{i}": n for side, plan in plans.items() for i, n in enumerate(plan.orders)}
    dense = [
        f.float().flatten()
        for p in plans.values()
        for f, n in zip(p.factors, p.orders, strict=True)
        if not is_power_of_two(n)
    ]
    operands = [
        *(r[None] for r in rows.rows), rows.scale[None], rows.zero_point[None], indices, shares, *tensors(gate_up), *tensors(down),
        torch.cat(dense),
    ]  # fmt: skip
    attributes = dict(
        low_width=40, high_width=24, hidden_low_width=hidden - 8, hidden_high_width=8, hidden_low_clip=0.9, activation=1, gated=1,
        low_blocks=plans["low"].blocks, high_blocks=plans["high"].blocks,
    )  # fmt: skip
    (got,) = Node(library, "Experts", operands, 1, **attributes, **orders).run()
    assert got.shape == (1, tokens, 70) and torch.equal(got[0], expected)


def tensors(weight: ExpertWeight):
    return [weight.codes, weight.scale, weight.row_sum, weight.bits, weight.bias]


def test_errors_name_the_node(library):
    gate_up, down = mixture()
    rows = norm_quantize(library, random(3, 64), PARTS)
    indices = torch.tensor([[0, 5], [1, 2], [3, 4]])
    plain = dict(
        low_width=40, high_width=24, hidden_low_width=32, hidden_high_width=8, low_blocks=32, high_blocks=8, gated=1
    )

    def fails(message, indices=indices, weights=None, gate_up=gate_up, down=down, **attributes):
        weights = random(*indices.shape) if weights is None else weights
        operands = [*rows.rows, rows.scale, rows.zero_point, indices, weights, *tensors(gate_up), *tensors(down)]
        with pytest.raises(Exception, match=f"(?s){message}") as caught:
            Node(library, "Experts", operands, 1, **(plain | attributes)).run()
        assert "the_node" in str(caught.value) or "attributes" in message

    fails("indices does not fit: expected numbers of experts", indices=indices + 1)
    fails("indices does not fit: expected as many choices and weights", weights=random(3, 3))
    fails("indices does not fit: expected as many choices and weights", indices=indices[:2])
    fails("weights of gate and up does not fit: expected a channel for every column that down reads", gated=0)
    fails("weights of down does not fit: expected tiles of packed codes", down=replace(down, codes=down.codes[:-1]))
    fails("weights of down does not fit: expected bits 2 to 8", down=replace(down, bits=down.bits + 1))
    few = replace(down, scale=down.scale[:, :1].contiguous())
    fails("weights of down does not fit: expected scales .experts, parts, channels", down=few)
    fails(
        "weights of gate and up does not fit: expected sums for every part with zero points",
        gate_up=replace(gate_up, row_sum=gate_up.row_sum[1:]),
    )
    fails("a transform does not fit", low_blocks=31)
    fails("attributes of a Experts node do not fit", hidden_low_bits=9)


def test_operands_that_do_not_fit(library):
    gate_up, _ = mixture()
    groups, _ = sort_rows(torch.tensor([[0, 5]]), 6)
    x = norm_quantize(library, random(2, 64), PARTS)
    with pytest.raises(BackendError, match="indices from 0 to 6; expected 0 to 5"):
        sort_rows(torch.tensor([[0, 6]]), 6)
    with pytest.raises(BackendError, match="groups do not cover 2 rows with experts 0 to 5"):
        grouped_linear(library, x, gate_up, replace(groups, expert=groups.expert + 1))
    with pytest.raises(BackendError, match="groups do not cover 2 rows"):
        grouped_linear(library, x, gate_up, replace(groups, first_row=groups.first_row * 2))
    with pytest.raises(BackendError, match=r"weight codes is torch.uint8 .*expected contiguous"):
        grouped_linear(library, x, replace(gate_up, codes=gate_up.codes[:-1]), groups)
    with pytest.raises(BackendError, match="token has values outside of 0 to 0"):
        combined_linear(library, x, gate_up, groups, torch.tensor([0, 1], dtype=torch.int32), torch.ones(2), 1)
