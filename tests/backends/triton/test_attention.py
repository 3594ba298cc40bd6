"""RoPE + U_C + append to the packed paged cache, and attention over it."""

from __future__ import annotations

import math

import pytest
import torch
from resq_compiler.backends.triton import attention as module
from resq_compiler.backends.triton.attention import attention, attention_ref, read_cache_ref
from resq_compiler.backends.triton.formats import PAGE, HeadLayout, PartLayout, unpack_rows
from resq_compiler.backends.triton.rope_cache import rope_cache, rope_cache_ref

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops

MIXED = HeadLayout(56, 8)


class Case:
    """Two calls, a prefill of `past` tokens and one of `new`, on our cache and on the reference's."""

    def __init__(
        self,
        generator,
        *,
        past,
        new,
        heads,
        kv_heads,
        keys=MIXED,
        values=MIXED,
        batch=2,
        rotary=None,
        bases=1,
        norm=False,
    ):
        d = keys.head_dim
        rotary = d if rotary is None else rotary
        pages = math.ceil((past + new) / PAGE) + 1
        self.keys, self.values, self.batch, self.total = keys, values, batch, past + new
        # every page starts as NaN bytes, out of order
        self.cache = [
            torch.full((batch * pages + 1, kv_heads, la.page_bytes), -1, dtype=torch.int8) for la in (keys, values)
        ]
        self.reference = [t.clone() for t in self.cache]
        self.table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int()
        u = torch.linalg.qr(torch.randn(bases, d, d, generator=generator))[0] if bases else None
        norms = [torch.rand(d, generator=generator) + 0.5 if norm else None for _ in range(2)]
        for start, count in ((0, past), (past, new)):
            if count == 0:
                continue
            stacked = torch.randn(batch, count, (heads + 2 * kv_heads) * d, generator=generator)
            self.q, self.k, self.v = (
                x.unflatten(-1, (-1, d)) for x in stacked.split([heads * d, kv_heads * d, kv_heads * d], -1)
            )
            angle = torch.randn(batch, count, rotary // 2, generator=generator).repeat(1, 1, 2)
            self.start = torch.full((batch,), start, dtype=torch.int32)
            shared = (self.q, self.k, self.v, angle.cos(), angle.sin(), u)
            rest = (self.table, self.start, keys, values, *norms, 1e-6)
            self.q_out = rope_cache(*shared, *self.cache, *rest)
            self.q_ref = rope_cache_ref(*shared, *self.reference, *rest)

    def images(self, which):
        return [
            read_cache_ref(p, self.table, la, self.total) for p, la in zip(which, (self.keys, self.values), strict=True)
        ]

    def attend(self, **options):
        arguments = (self.q_out, *self.cache, self.table, self.start)
        mask = options.pop("mask", None)
        tail = (mask, self.keys, self.values, self.keys.head_dim**-0.5)
        return attention(*arguments, *tail, self.total, **options), attention_ref(*arguments, *tail, **options)


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


@pytest.mark.parametrize("name", CASES)
def test_append_equals_the_reference(name, generator):
    case = Case(generator, **CASES[name])
    torch.testing.assert_close(case.q_out, case.q_ref, rtol=1e-5, atol=1e-5)  # sums of one head in another order
    for ours, reference in zip(case.images(case.cache), case.images(case.reference), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)  # as above, and no code moved


def test_cached_values_are_the_law(generator):
    case = Case(generator, **CASES["prefill"])
    law = ops.quantize_dequantize(case.v.transpose(1, 2), ((4, 0, 56), (8, 56, 64)))
    assert torch.equal(case.images(case.cache)[1], law)


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_reference(name, generator):
    ours, reference = Case(generator, **CASES[name]).attend()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)  # float32 softmax in blocks


@pytest.mark.parametrize("options", [dict(window=20), dict(softcap=3.0), dict(window=9, softcap=2.0)], ids=str)
@pytest.mark.parametrize("name", ["append", "decode"])
def test_window_cap_and_padding(name, options, generator):
    case = Case(generator, **CASES[name])
    mask = torch.ones(case.batch, case.total, dtype=torch.bool)
    mask[0, :3] = False
    ours, reference = case.attend(mask=mask, **options)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)  # as above


def test_it_is_the_attention_of_the_graph(generator):
    case = Case(generator, **CASES["append"])
    mask = torch.ones(case.batch, case.total, dtype=torch.int64)
    mask[1, :9] = 0
    visible = ops.causal_mask(mask, torch.zeros(case.batch, 5))
    expected = ops.attention(case.q_out.transpose(1, 2), *case.images(case.cache), visible, 64**-0.5)
    ours, _ = case.attend(mask=mask != 0)
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-5, atol=2e-6)  # as above


def test_a_query_that_sees_nothing_gives_zero(generator):
    case = Case(generator, **CASES["prefill"])
    mask = torch.ones(case.batch, case.total, dtype=torch.bool)
    mask[0, :2] = False
    ours, _ = case.attend(mask=mask)
    assert not ours[0, :2].any() and torch.isfinite(ours).all()


@pytest.mark.parametrize("name", ["append", "decode", "two-pages-odd-widths", "no-rotary-no-basis"])
def test_quantized_output(name, generator):
    case = Case(generator, **CASES[name])
    heads, values = case.q.shape[2], case.values
    layouts = tuple(PartLayout(b, w, heads) for b, w in ((4, values.low), (8, values.high)) if w)
    ours, reference = case.attend(out_layouts=layouts)
    for layout in layouts:
        codes, expected = (unpack_rows(r[0 if layout.packed else 1], layout).int() for r in (ours, reference))
        difference = (codes - expected).abs()
        assert (
            difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
        )  # a float32 rounding may cross a boundary
    torch.testing.assert_close(ours[2], reference[2], rtol=1e-5, atol=0)  # as above
    assert (ours[3] - reference[3]).abs().max() <= 1


@pytest.mark.parametrize("split", [1, 3, 7])
def test_every_split_of_the_cache_gives_the_same(split, generator, monkeypatch):
    """131 tokens in blocks of 16: even and uneven shares, and programs that have none."""
    usual = module.attention_tiles
    monkeypatch.setattr(module, "attention_tiles", lambda *a: usual(*a) | dict(SPLIT=split))
    case = Case(generator, **CASES["decode"])
    for options in ({}, dict(window=20)):  # the second launch finds the arrival counters reset
        ours, reference = case.attend(**options)
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)  # as above


def test_sequences_of_different_lengths(generator):
    """One is 33 tokens behind: what an earlier use left in its slots is neither read nor kept."""
    case = Case(generator, **CASES["append"])
    case.start = torch.tensor([70, 37], dtype=torch.int32)
    angle = torch.randn(2, 5, 32, generator=generator).repeat(1, 1, 2)
    for cache, append in ((case.cache, rope_cache), (case.reference, rope_cache_ref)):
        q = append(
            case.q,
            case.k,
            case.v,
            angle.cos(),
            angle.sin(),
            None,
            *cache,
            case.table,
            case.start,
            case.keys,
            case.values,
        )
        case.q_out = q if append is rope_cache else case.q_out
    torch.testing.assert_close(case.q_out, q, rtol=1e-5, atol=1e-5)  # as above
    for ours, reference in zip(case.images(case.cache), case.images(case.reference), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)  # as above
    ours, reference = case.attend()
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=2e-6)  # as above


def test_no_new_tokens(generator):
    case = Case(generator, **CASES["prefill"])
    nothing, none, angle = torch.zeros(2, 0, 4, 64), torch.zeros(2, 0, 2, 64), torch.zeros(2, 0, 64)
    q = rope_cache(nothing, none, none, angle, angle, None, *case.cache, case.table, case.start, case.keys, case.values)
    assert q.shape == nothing.shape
    assert (
        attention(q, *case.cache, case.table, case.start, None, case.keys, case.values, 1.0, 5).shape == nothing.shape
    )


def test_refusals(generator):
    case = Case(generator, **CASES["prefill"])
    with pytest.raises(BackendError, match="the values are split as"):
        case.attend(out_layouts=(PartLayout(4, 64, 4),))
    with pytest.raises(BackendError, match="key pages"):
        rope_cache(case.q, case.k, case.v, *[torch.zeros(1, 5, 64)] * 2, None, case.cache[0][..., 1:], case.cache[1], case.table,
                   case.start, case.keys, case.values)  # fmt: skip
