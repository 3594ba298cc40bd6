"""RoPE + U_C + append to the packed paged cache, and attention over it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from resq_compiler.backends.fused.kernels import LayerCache, Rotation, Scores
from resq_compiler.backends.triton import attention as module
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, PagedCache, PartLayout, unpack_rows
from resq_compiler.backends.triton.rope_cache import rope_cache

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops

MIXED = HeadLayout(56, 8)


class Case:
    """Two calls, a prefill of `past` tokens and one of `new`, on our cache and on the reference's."""

    def __init__(
        self, kernels, reference, generator, *, past, new, heads, kv_heads, keys=MIXED, values=MIXED, batch=2,
        rotary=None, bases=1, norm=False,
    ):  # fmt: skip
        self.kernels, self.reference, self.generator = kernels, reference, generator
        self.heads, self.kv_heads, self.d = heads, kv_heads, keys.head_dim
        self.rotary = self.d if rotary is None else rotary
        self.batch, self.total = batch, past + new
        pages = math.ceil(self.total / PAGE) + 1
        table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int()
        empty = [
            # every page starts as NaN bytes, out of order
            torch.full((batch * pages + 1, kv_heads, la.page_bytes), -1, dtype=torch.int8)
            for la in (keys, values)
        ]
        start = torch.zeros(batch, dtype=torch.int32)
        self.cache = LayerCache(*empty, table, start, keys, values)
        self.expected = LayerCache(*(t.clone() for t in empty), table, start, keys, values)
        self.u = torch.linalg.qr(torch.randn(bases, self.d, self.d, generator=generator))[0] if bases else None
        self.norms = [torch.rand(self.d, generator=generator) + 0.5 if norm else None for _ in range(2)]
        for before, count in ((0, past), (past, new)):
            if count:
                self.append(torch.full((batch,), before, dtype=torch.int32), count, self.u)

    def append(self, start, count, u):
        """`count` more tokens behind `start`, to both caches."""
        sizes = [self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.d]
        stacked = torch.randn(self.batch, count, sum(sizes), generator=self.generator)
        self.q, self.k, self.v = stacked.split(sizes, -1)
        angle = torch.randn(self.batch, count, self.rotary // 2, generator=self.generator).repeat(1, 1, 2)
        self.rotation = Rotation(angle.cos(), angle.sin(), u, *self.norms, 1e-6)
        self.cache, self.expected = (dataclasses.replace(c, start=start) for c in (self.cache, self.expected))
        operands = (self.q, self.k, self.v, self.rotation)
        self.q_out = self.kernels.rope_cache(*operands, self.cache, 1.0)
        self.q_expected = self.reference.rope_cache(*operands, self.expected, 1.0)

    def images(self, cache):
        """Keys and values, dequantized."""
        sides = ((cache.keys, cache.key_parts), (cache.values, cache.value_parts))
        return [PagedCache().read(pages, cache.table, parts, self.total) for pages, parts in sides]

    def scores(self, mask=None, **options):
        mask = torch.ones(self.batch, self.total, dtype=torch.bool) if mask is None else mask
        return Scores(mask, self.d**-0.5, **options)

    def attend(self, **options):
        arguments = (self.q_out, self.cache, self.scores(**options))
        return self.kernels.attention(*arguments), self.reference.attention(*arguments)


CASES = {
    "prefill": dict(past=0, new=5, heads=4, kv_heads=2),
    "append": dict(past=70, new=5, heads=4, kv_heads=2),
    "decode": dict(past=130, new=1, heads=6, kv_heads=2),
    "two-pages-odd-widths": dict(past=3, new=100, heads=4, kv_heads=4, keys=HeadLayout(0, 16), values=HeadLayout(13, 3), bases=2),
    "qk-norm-partial-rotary": dict(past=60, new=17, heads=6, kv_heads=2, keys=HeadLayout(28, 4), values=HeadLayout(16, 16),
                                   norm=True, rotary=16),
    "wide-heads": dict(past=3, new=5, heads=2, kv_heads=1, keys=HeadLayout(224, 32), values=HeadLayout(224, 32)),
    "basis-in-several-pieces": dict(past=3, new=5, heads=2, kv_heads=1, keys=HeadLayout(140, 20), values=HeadLayout(140, 20),
                                    norm=True, rotary=80, bases=1),
    "no-rotary-no-basis": dict(past=3, new=7, heads=4, kv_heads=4, keys=HeadLayout(24, 0), values=HeadLayout(24, 0), bases=0, rotary=0),
}  # fmt: skip


@pytest.fixture
def make(kernels, reference, generator):
    """name -> its case."""
    return lambda name: Case(kernels, reference, generator, **CASES[name])


def assert_same_caches(case):
    # sums of one head in another order move scales in their last bits; a code that moved would be off by a whole step
    for ours, expected in zip(case.images(case.cache), case.images(case.expected), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def assert_close(case, **options):
    torch.testing.assert_close(*case.attend(**options), rtol=1e-5, atol=2e-6)  # float32 softmax in blocks


@pytest.mark.parametrize("name", CASES)
def test_append_equals_the_reference(name, make):
    case = make(name)
    torch.testing.assert_close(case.q_out, case.q_expected, rtol=1e-5, atol=1e-5)  # sums of one head in another order
    assert_same_caches(case)


def test_cached_values_are_the_law(make):
    case = make("prefill")
    values = ops.split_heads(case.v, case.kv_heads)
    law = ops.quantize_dequantize(values, ((4, 0, 56), (8, 56, 64)))
    assert torch.equal(case.images(case.cache)[1], law)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(name, make):
    assert_close(make(name))


@pytest.mark.parametrize("name", CASES)
def test_over_an_expanded_cache(name, make, expanded):
    case = make(name)
    torch.testing.assert_close(*case.attend(), rtol=1e-5, atol=4e-6)  # keys are rounded when they are dequantized


@pytest.mark.parametrize("options", [dict(window=20), dict(softcap=3.0)], ids=str)
def test_window_cap_and_padding_over_an_expanded_cache(options, make, expanded):
    case = make("append")
    mask = torch.ones(case.batch, case.total, dtype=torch.bool)
    mask[0, :3] = False
    torch.testing.assert_close(*case.attend(mask=mask, **options), rtol=1e-5, atol=4e-6)  # as above


def test_sequences_of_different_lengths_over_an_expanded_cache(make, expanded):
    case = make("append")
    case.append(torch.tensor([70, 37], dtype=torch.int32), 5, None)
    torch.testing.assert_close(*case.attend(), rtol=1e-5, atol=4e-6)  # as above


def test_codes_of_an_expanded_cache(make, kernels, reference, expanded):
    case = make("append")
    layouts = (PartLayout(4, 56, case.heads), PartLayout(8, 8, case.heads))
    arguments = (case.q_out, case.cache, case.scores(), layouts, 1.0)
    ours, expected = kernels.attention_quantize(*arguments), reference.attention_quantize(*arguments)
    torch.testing.assert_close(ours.scale, expected.scale, rtol=2e-5, atol=0)
    for layout in layouts:
        difference = (unpack_rows(ours.of(layout), layout).int() - unpack_rows(expected.of(layout), layout).int()).abs()
        assert (
            difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
        )  # a float32 rounding may cross a boundary


@pytest.mark.parametrize("options", [dict(window=20), dict(softcap=3.0), dict(window=9, softcap=2.0)], ids=str)
@pytest.mark.parametrize("name", ["append", "decode"])
def test_window_cap_and_padding(name, options, make):
    case = make(name)
    mask = torch.ones(case.batch, case.total, dtype=torch.bool)
    mask[0, :3] = False
    assert_close(case, mask=mask, **options)


def test_it_is_the_attention_of_the_graph(make):
    case = make("append")
    mask = torch.ones(case.batch, case.total, dtype=torch.int64)
    mask[1, :9] = 0
    visible = ops.causal_mask(mask, torch.zeros(case.batch, 5))
    expected = ops.attention(case.q_out.transpose(1, 2), *case.images(case.cache), visible, 64**-0.5)
    ours, reference = case.attend(mask=mask != 0)
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-5, atol=2e-6)  # as above
    assert torch.equal(reference.transpose(1, 2), expected)


def test_a_query_that_sees_nothing_gives_zero(make):
    case = make("prefill")
    mask = torch.ones(case.batch, case.total, dtype=torch.bool)
    mask[0, :2] = False
    for output in case.attend(mask=mask):
        assert not output[0, :2].any() and torch.isfinite(output).all()


@pytest.mark.parametrize("name", ["append", "decode", "two-pages-odd-widths", "no-rotary-no-basis"])
def test_quantized_output(name, make, kernels, reference):
    case = make(name)
    values = case.cache.value_parts
    layouts = tuple(PartLayout(b, w, case.heads) for b, w in ((4, values.low), (8, values.high)) if w)
    arguments = (case.q_out, case.cache, case.scores(), layouts, 1.0)
    ours, expected = kernels.attention_quantize(*arguments), reference.attention_quantize(*arguments)
    for layout in layouts:
        codes, law = (unpack_rows(r.of(layout), layout).int() for r in (ours, expected))
        difference = (codes - law).abs()
        # a float32 rounding may cross a boundary
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)  # as above
    assert (ours.zero_point - expected.zero_point).abs().max() <= 1


@pytest.mark.parametrize("split", [1, 3, 7])
def test_every_split_of_the_cache_gives_the_same(split, make, monkeypatch):
    """131 tokens in blocks of 16: even and uneven shares, and programs that have none."""
    usual = module.attention_tiles
    monkeypatch.setattr(module, "attention_tiles", lambda *a: usual(*a) | dict(SPLIT=split))
    case = make("decode")
    for options in ({}, dict(window=20)):  # the second launch finds the arrival counters reset
        assert_close(case, **options)


def test_sequences_of_different_lengths(make):
    """One is 33 tokens behind: what an earlier use left in its slots is neither read nor kept."""
    case = make("append")
    case.append(torch.tensor([70, 37], dtype=torch.int32), 5, None)
    torch.testing.assert_close(case.q_out, case.q_expected, rtol=1e-5, atol=1e-5)  # as above
    assert_same_caches(case)
    assert_close(case)


def test_no_new_tokens(make, kernels):
    case = make("prefill")
    nothing, angle = torch.zeros(2, 0, 2 * 64), torch.zeros(2, 0, 64)
    q = kernels.rope_cache(torch.zeros(2, 0, 4 * 64), nothing, nothing, Rotation(angle, angle), case.cache, 1.0)
    assert q.shape == (2, 0, 4, 64)
    assert kernels.attention(q, case.cache, case.scores()).shape == q.shape


def test_refusals(make, kernels):
    case = make("prefill")
    with pytest.raises(BackendError, match="the values are split as"):
        kernels.attention_quantize(case.q_out, case.cache, case.scores(), (PartLayout(4, 64, 4),), 1.0)
    with pytest.raises(BackendError, match="key pages"):
        narrow = dataclasses.replace(case.cache, keys=case.cache.keys[..., 1:])
        kernels.rope_cache(case.q, case.k, case.v, case.rotation, narrow, 1.0)
    strided = torch.zeros(2, 4, 5, 64).transpose(1, 2)
    with pytest.raises(BackendError, match="heads are contiguous"):
        rope_cache(strided, strided, strided, case.rotation, case.cache)
