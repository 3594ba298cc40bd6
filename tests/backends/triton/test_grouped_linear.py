"""Mixtures on Triton's kernels: integers exact, rows of a token or of a choice, blocks that are not full or not used."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from resq_compiler.backends.fused.experts import Between, ExpertPart, PackedExperts, Routing, pack_experts
from resq_compiler.backends.fused.formats import InputPart
from resq_compiler.backends.fused.runner import prepare
from resq_compiler.backends.fused.torch_kernels import TorchKernels
from resq_compiler.backends.triton.formats import PaddedRows, PagedCache
from resq_compiler.backends.triton.grouped_linear import grouped_linear, row_blocks
from resq_compiler.backends.triton.target import TRITON

import resq_compiler
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.tiny import tiny_tokens
from tests.backends.fused.test_lower import calls
from tests.families import small

REFERENCE = TorchKernels(PaddedRows(), PagedCache())
MIXED = (InputPart(4, 40), InputPart(8, 24))


def weights_of(experts, channels, parts, generator, bias=True) -> PackedExperts:
    given = [
        ExpertPart(
            torch.randint(-(2 ** (p.bits - 1)), 2 ** (p.bits - 1), (experts, channels, p.columns), generator=generator, dtype=torch.int8),
            torch.rand(experts, channels, generator=generator) * 0.01 + 1e-4,
            (p.bits,) * experts,
        )
        for p in parts
    ]  # fmt: skip
    return pack_experts(
        PaddedRows(), given, parts, torch.randn(experts, channels, generator=generator) if bias else None
    )


def codes_of(x, parts):
    return REFERENCE._quantized(x.split([p.columns for p in parts], -1), parts, (1.0,) * len(parts))


def test_blocks_hold_every_row_once():
    indices = torch.tensor([5, 0, 5, 5, 2, 0])
    blocks = row_blocks(indices.repeat(20), 8)
    size = blocks.rows.shape[1]
    assert size == 16 and blocks.rows.dtype == blocks.expert.dtype == torch.int32
    held = [(int(e), int(r)) for e, rows in zip(blocks.expert, blocks.rows, strict=True) for r in rows if r < 120]
    assert sorted(r for _, r in held) == list(range(120)) and all(int(indices[r % 6]) == e for e, r in held)
    used = blocks.expert[blocks.expert < 8].tolist()
    assert used == [0] * 3 + [2] * 2 + [5] * 4 and not (blocks.rows[len(used) :] < 120).any()


@pytest.mark.parametrize(("tokens", "choices"), [(1, 2), (70, 2)])
@pytest.mark.parametrize("parts", [MIXED, (InputPart(8, 33),), (InputPart(3, 50),)], ids=["both", "high", "low"])
def test_equals_the_integer_law_to_the_bit(tokens, choices, parts, generator):
    weight = weights_of(5, 70, parts, generator)
    x = codes_of(torch.randn(tokens, sum(p.columns for p in parts), generator=generator), parts)
    indices = torch.rand(tokens, 4, generator=generator).topk(choices).indices
    rows = [REFERENCE._rows_of(type(x)(*(t[None] for t in x)), i, part) for i, part in enumerate(parts)]
    expected = REFERENCE._expert_linear(rows, weight, indices)[0].flatten(0, 1)
    got = grouped_linear(x, weight, row_blocks(indices.flatten(), 5), choices, tokens * choices)
    assert torch.equal(got, expected)


HIDDEN = {
    "hadamard": ("silu", True, "hadamard", (InputPart(4, 56), InputPart(8, 8))),
    "transposed": ("gelu", False, "transposed", (InputPart(4, 64),)),
    "clamped": ("clamped", True, "hadamard", (InputPart(8, 64),)),
    "plain": ("relu", True, "none", (InputPart(4, 56), InputPart(8, 8))),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_whole_mixture(name, generator):
    """Beside a step of a code at ties, the torch form's sums."""
    activation, gated, transform, parts = HIDDEN[name]
    gate_up = weights_of(5, 128 if gated else 64, MIXED, generator)
    down = weights_of(5, 70, parts, generator, bias=False)
    x = torch.randn(2, 9, 64, generator=generator)
    quantized = codes_of(x, MIXED)
    routing = Routing(torch.rand(18, 5, generator=generator).topk(2).indices, torch.rand(18, 2, generator=generator))
    between = Between(activation, gated, 0.5, 1.7, transform, parts, (1.0,) * len(parts))
    arguments = (quantized, routing, gate_up, down, between, torch.float32)
    got, expected = TRITON.kernels.experts(*arguments), REFERENCE.experts(*arguments)
    assert got.shape == (2, 9, 70)
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 1e-6 and float(errors.max()) < 0.1


@functools.cache
def mixtral():
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip(f"transformers {transformers.__version__} writes mixtures in another way than 5.23 and later")
    options = {"calibration_samples": 8, "calibration_length": 32, "weight_method": "rtn", "unreached_experts": "layer"}
    return resq_compiler.compile(small("mixtral"), tiny_tokens(8, 32), recipe="resq", **options)


def test_all_of_a_model_is_taken_and_its_codes_come_back():
    gm = mixtral().graph_module
    runner = prepare(gm, TRITON, torch.float32, False, 1)
    assert calls(runner)["experts"] == 2 and not runner.reasons
    restored, expected = dict(runner.quantized_graph().named_buffers()), dict(gm.named_buffers())
    assert restored.keys() == expected.keys() and all(torch.equal(restored[n], t) for n, t in expected.items())


@pytest.mark.slow
def test_a_model_generates_the_same_tokens():
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = mixtral().generate(tiny_tokens(1, 5), **greedy)
    ours = CompiledModel(mixtral().result).use_backend("triton")
    assert torch.equal(ours.generate(tiny_tokens(1, 5), **greedy), expected)
