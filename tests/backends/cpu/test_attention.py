"""rope_cache and attention against torch: cache rows are the law's codes of the float heads, the rest to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.attention import attention, cache_image, empty_cache, rope_cache
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import CodePart, norm_quantize

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops

CLOSE = dict(rtol=1e-4, atol=2e-6)  # float sums in another order
HEADS = {
    "both": CachedHead(56, 8),
    "odd": CachedHead(13, 3),
    "low": CachedHead(32, 0),
    "high": CachedHead(0, 24),
    "3+6": CachedHead(21, 11, 3, 6),
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(batch, heads, slots, head, value_head=None):
    """A cache that holds random keys and values, `start` still 0."""
    cache = empty_cache(batch, heads, slots, head, value_head or head)
    cache.keys.copy_(formats.pack_cache(random(batch, heads, slots, head.columns, seed=1), head))
    cache.values.copy_(
        formats.pack_cache(random(batch, heads, slots, cache.value_head.columns, seed=2), cache.value_head)
    )
    return cache


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_cache_rows_come_back(library, head):
    x = random(3, 5, head.columns)
    rows = formats.pack_cache(x, head)
    assert rows.shape == (3, 5, head.row_bytes)
    parts = [(bits, a, b) for bits, a, b in head.spans]
    assert torch.equal(formats.unpack_cache(rows, head), ops.quantize_dequantize(x, parts))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_values_are_appended_as_the_law_says(library, isa, head, clip):
    """Without norm, rotation and basis, keys and values are the codes of what comes in, to the bit; other slots stay."""
    batch, new, g, d = 2, 3, 2, head.columns
    q, k, v = random(batch, new, 4, d), random(batch, new, g, d, seed=1), random(batch, new, g, d, seed=2)
    cache = empty_cache(batch, g, 10, head, head)
    cache.start.copy_(torch.tensor([2, 7]))
    assert torch.equal(rope_cache(library, q, k, v, None, cache, clip=clip), q)
    for x, stored in ((k, cache.keys), (v, cache.values)):
        expected = torch.zeros_like(stored)
        for b, start in enumerate((2, 7)):
            expected[b, :, start : start + new] = formats.pack_cache(x[b].transpose(0, 1), head, clip)
        assert torch.equal(stored, expected)


@pytest.mark.parametrize("bases", [None, 1, 2])
@pytest.mark.parametrize("rotary", [0, 16, 64])
@pytest.mark.parametrize("norm", [False, True])
def test_queries_are_normed_rotated_and_turned(library, isa, bases, rotary, norm):
    batch, new, heads, g, head = 2, 5, 4, 2, HEADS["both"]
    d = head.columns
    stacked = random(batch, new, (heads + 2 * g) * d)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in stacked.split([heads * d, g * d, g * d], -1))
    basis = None if bases is None else torch.linalg.qr(random(bases, d, d, seed=3))[0].contiguous()
    q_norm, k_norm = (random(d, seed=4), random(d, seed=5)) if norm else (None, None)
    angles = random(1, new, rotary, seed=6)
    tables = (angles.cos(), angles.sin()) if rotary else None
    cache = empty_cache(batch, g, new, head, head)
    shared = basis[0] if bases == 1 else basis
    got = rope_cache(library, q, k, v, tables, cache, shared, q_norm, k_norm, 1e-6)

    def expected(x, weight):
        y = ops.rms_norm(x, weight, 1e-6) if norm else x
        y = ops.rope(y.transpose(1, 2), tables[0][:, None], tables[1][:, None]) if rotary else y.transpose(1, 2)
        return y if basis is None else ops.project_heads(y, basis)

    torch.testing.assert_close(got.transpose(1, 2), expected(q, q_norm), rtol=1e-5, atol=1e-5)
    steps = formats.unpack_cache(cache.keys, head) - formats.unpack_cache(
        formats.pack_cache(expected(k, k_norm), head), head
    )
    assert (steps.abs() > 1e-4).float().mean() < 0.01  # a key that rounding put on the other side of a step


def coded(q, head):
    """Queries as the kernel multiplies them with cached keys: signed codes of 8 bits, a scale for each part."""
    parts = []
    for part in (part for part in q.split([head.low, head.high], -1) if part.shape[-1]):
        largest = part.abs().amax(-1, keepdim=True)
        parts.append(torch.round(part * (127 / largest)) * (largest / 127))
    return torch.cat(parts, -1)


def value_codes(cache, total):
    """Images of values, and the scale that each column of them has."""
    head, v = cache.value_head, formats.unpack_cache(cache.values[:, :, :total], cache.value_head)
    parts = len(head.spans)
    scales = (
        cache.values[:, :, :total, head.row_bytes - 4 * parts :]
        .clone(memory_format=torch.contiguous_format)
        .view(torch.float32)
    )
    return v, torch.cat(
        [scales[..., i : i + 1].expand(*v.shape[:3], b - a) for i, (_, a, b) in enumerate(head.spans)], -1
    )


def check(got, q, cache, *options, **more):
    """Float attention, but for the rounding of weights: codes of 8 bits of a row's weights times the scales of their values, a tile at a
    time. Rounding errors are as good as independent, each at most half a step and 1 / sqrt(12) of one in the mean."""
    expected, seen, p = reference(q, cache, *options, **more)
    group = q.shape[2] // cache.keys.shape[1]
    v, scale = (x.repeat_interleave(group, 1) for x in value_codes(cache, options[-1]))
    largest = torch.stack(
        [(p * scale[:, :, None, :, e]).amax(-1) for e in range(v.shape[-1])], -1
    )  # [B, H, S, columns]
    squares = torch.einsum("bst,bhtd->bhsd", seen.float(), (v / scale).square())
    error = (largest / 255 * (squares / 12).sqrt()).transpose(1, 2)
    assert ((got - expected).abs() <= 6 * error + 1e-4 * expected.abs() + 2e-6).all()
    few = 4 / (got.numel() / got.shape[-1]) ** 0.5  # rows, which have errors of their own
    assert (got - expected).square().mean().sqrt() <= (1.1 + few) * error.square().mean().sqrt() + 2e-6


def reference(q, cache, scale, mask, window, softcap, sinks, total, prefix=None, slopes=None):
    """Float attention over the images, rows that see nothing are 0; which cached keys are seen [B, S, total], and their weights [B, H, S,
    total]."""
    batch, heads = q.shape[0], q.shape[2]
    group = heads // cache.keys.shape[1]
    k, v = (
        formats.unpack_cache(x[:, :, :total], h).repeat_interleave(group, 1)
        for x, h in ((cache.keys, cache.key_head), (cache.values, cache.value_head))
    )
    scores = torch.einsum("bshd,bhtd->bhst", coded(q, cache.key_head), k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    slots = cache.start[:, None] + torch.arange(q.shape[1])
    keys = torch.arange(total)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (keys - slots[..., None])[:, None]
    seen = keys <= slots[..., None]
    seen = seen & (slots[..., None] - keys < window) if window else seen
    seen = seen if mask is None else seen & mask[:, None, :total]
    if prefix is not None:
        first = [x.repeat_interleave(group, 0).expand(batch, -1, -1, -1) for x in prefix]
        before = torch.einsum("bshd,bhtd->bhst", q, first[0]) * scale
        before = softcap * torch.tanh(before / softcap) if softcap else before
        scores, v = torch.cat((before, scores), -1), torch.cat((first[1], v), 2)
        seen = torch.cat((seen.new_ones(*seen.shape[:2], before.shape[-1]), seen), -1)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    p = torch.softmax(scores, -1).nan_to_num(0.0)[..., : v.shape[2]]
    return torch.einsum("bhst,bhtd->bshd", p, v), seen[..., -total:], p[..., -total:]


CASES = {
    "decode": dict(new=1, start=(130, 37), heads=6, g=2),
    "prefill": dict(new=70, start=(0, 0), heads=6, g=2),
    "chunk": dict(new=9, start=(40, 3), heads=6, g=2),
    "mqa": dict(new=33, start=(5, 5), heads=8, g=1),
    "mha": dict(new=20, start=(0, 11), heads=3, g=3),
    "window": dict(new=50, start=(60, 0), heads=4, g=2, window=17),
    "window_decode": dict(new=1, start=(100, 3), heads=4, g=2, window=17),
    "softcap": dict(new=12, start=(7, 0), heads=4, g=2, softcap=2.0),
    "softcap_decode": dict(new=2, start=(40, 9), heads=4, g=2, softcap=2.0),
    "padding": dict(new=40, start=(0, 0), heads=4, g=2, padding=9),
    "padding_decode": dict(new=1, start=(50, 50), heads=4, g=2, padding=9),
    "sinks": dict(new=40, start=(0, 0), heads=4, g=2, sinks=True, padding=5),
    "sinks_decode": dict(new=1, start=(50, 2), heads=4, g=2, sinks=True),
}


def case(name, head=HEADS["both"], value_head=None):
    c = CASES[name]
    total = max(c["start"]) + c["new"]
    cache = filled(2, c["g"], total + 3, head, value_head)
    cache.start.copy_(torch.tensor(c["start"]))
    mask = None
    if "padding" in c:
        mask = torch.ones(2, total, dtype=torch.bool)
        mask[1, : c["padding"]] = False
    sinks = random(c["heads"], seed=9) if "sinks" in c else None
    options = (0.2, mask, c.get("window", 0), c.get("softcap", 0.0), sinks)
    return random(2, c["new"], c["heads"], head.columns, seed=3), cache, options, total


@pytest.mark.parametrize("name", CASES)
def test_attention(library, isa, name):
    q, cache, options, total = case(name)
    got = attention(library, q, cache, *options)
    check(got, q, cache, *options, total)


@pytest.mark.parametrize("name", ["decode", "prefill", "window", "softcap", "padding", "sinks", "sinks_decode"])
def test_prefix(library, isa, name):
    """Tokens in front that every query sees, padding and windows or not."""
    q, cache, options, total = case(name)
    g = cache.keys.shape[1]
    prefix = random(g, 3, 64, seed=4), random(g, 3, 64, seed=5)
    got = attention(library, q, cache, *options, prefix=prefix)
    check(got, q, cache, *options, total, prefix=prefix)


@pytest.mark.parametrize("name", ["decode", "prefill", "window", "softcap", "padding", "sinks"])
def test_slopes(library, isa, name):
    """A multiple of the distance, of each head, is added to its scores."""
    q, cache, options, total = case(name)
    slopes = random(q.shape[2], seed=6).abs()
    got = attention(library, q, cache, *options, slopes=slopes)
    check(got, q, cache, *options, total, slopes=slopes)


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("heads", [2, 6, 40])  # of two key heads: 20 queries a key head and token are a unit like 3
def test_long_contexts_are_shared_in_chunks(library, isa, heads, window):
    """Two sequences of different length, one with padding; the same bytes for any number of threads."""
    start, slots = (1500, 70), 1502
    cache = filled(2, 2, slots, HEADS["both"])
    cache.start.copy_(torch.tensor(start))
    mask = torch.ones(2, slots, dtype=torch.bool)
    mask[1, :5] = False
    q, sinks, prefix = (
        random(2, 2, heads, 64, seed=3),
        random(heads, seed=9),
        (random(2, 1, 64), random(2, 1, 64, seed=1)),
    )
    options = (0.125, mask, window, 0.0, sinks)
    got = [attention(library, q, cache, *options, threads=threads, prefix=prefix) for threads in (1, 2, 5)]
    check(got[0], q, cache, *options, slots, prefix=prefix)
    assert all(torch.equal(got[0], other) for other in got)


@pytest.mark.parametrize(
    ("key_head", "value_head"), [*(("3+6", other) for other in HEADS), *((other, "odd") for other in HEADS)]
)
def test_all_instruction_sets_agree(library, key_head, value_head):
    """One that multiplies what few queries see of the cache where it lies, and others that unpack it."""
    for name in CASES:
        q, cache, options, _ = case(name, HEADS[key_head], HEADS[value_head])
        results = []
        for isa in (isa for isa, able in library.instruction_sets().items() if able):
            with library.using(isa):
                results.append(attention(library, q, cache, *options))
        assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["both", "low", "high", "128"])
def test_few_queries_see_nothing_behind_their_keys(library, name, queries):
    """Whatever lies there (here not a number), and wherever a tile of keys ends, also at the end of the cache: the same bytes."""
    head = HEADS.get(name, CachedHead(112, 16))
    q = random(1, 1, 2 * queries, head.columns, seed=3)
    for keys in (1, 5, 8, 9, 16, 17, 31, 33, 48, 64, 65, 100, 112, 128, 129, 144, 300):
        results = []
        for behind in (0, 1, 40):
            cache = filled(1, 2, keys + behind, head)
            for stored in (cache.keys, cache.values):
                stored.copy_(formats.pack_cache(random(1, 2, 400, head.columns, seed=7), head)[:, :, : keys + behind])
                stored[:, :, keys:] = 255
            cache.start.fill_(keys - 1)
            for isa in (isa for isa, able in library.instruction_sets().items() if able):
                with library.using(isa):
                    results.append(attention(library, q, cache, 0.125))
        assert results[0].isfinite().all()
        assert all(torch.equal(results[0], other) for other in results)


def test_a_token_that_outweighs_all_others(library, isa):
    """Its weight must not take the bits of the others': each row and tile of keys has a scale of its own."""
    head, slots = HEADS["both"], 400
    k, v = random(1, 1, slots, 64, seed=1), random(1, 1, slots, 64, seed=2)
    k[:, :, 0] *= 12
    v[:, :, 0] *= 1e-3
    cache = empty_cache(1, 1, slots, head, head)
    cache.keys.copy_(formats.pack_cache(k, head))
    cache.values.copy_(formats.pack_cache(v, head))
    cache.start.fill_(slots - 1)
    q = formats.unpack_cache(cache.keys, head)[:, :, :1] * 0.1
    got, expected = attention(library, q, cache, 0.125), reference(q, cache, 0.125, None, 0, 0.0, None, slots)[0]
    assert ((got - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("name", ["decode", "chunk"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads_of_other_shapes(library, isa, name, head):
    q, cache, options, total = case(name, head, CachedHead(21, 11))
    got = attention(library, q, cache, *options)
    check(got, q, cache, *options, total)


@pytest.mark.parametrize(("low", "high"), [(448, 64), (0, 33), (7, 0), (21, 3)])
def test_a_cache_that_is_read_as_floats(library, isa, low, high):
    """More columns than a head may have; new rows behind three that are there, in both sequences."""
    head, x = CachedHead(low, high), torch.randn(2, 1, 5, low + high)
    cache = torch.zeros(2, 1, 9, head.row_bytes, dtype=torch.uint8)
    cache[:, :, :3] = formats.pack_cache(torch.randn(2, 1, 3, low + high), head, 0.9)
    expected = cache.clone()
    expected[:, :, 3:8] = formats.pack_cache(x, head, 0.9)
    start = torch.full((2,), 3, dtype=torch.int32)
    got = cache_image(library, x, cache, head, start, 8, 0.9, threads=2)
    assert torch.equal(cache, expected) and torch.equal(got, formats.unpack_cache(expected[:, :, :8], head))
    with pytest.raises(BackendError, match="read up to 7; the cache has room for 9"):
        cache_image(library, x, cache, head, start, 7)


@pytest.mark.parametrize("split", [((4, 56), (8, 8)), ((8, 40), (8, 24))], ids=["of values", "another"])
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_codes_for_the_output_projection(library, isa, name, split):
    """The same as quantizing the float result, heads in order, all runs of a part before those of the next."""
    q, cache, options, _ = case(name)
    heads, parts = q.shape[2], [CodePart(bits, width, q.shape[2]) for bits, width in split]
    got = attention(library, q, cache, *options, parts)
    y = attention(library, q, cache, *options)
    columns = torch.cat([piece.flatten(2) for piece in y.split([p.width for p in parts], -1)], -1).flatten(0, 1)
    expected = norm_quantize(library, columns.contiguous(), parts)
    assert all(torch.equal(a, b) for a, b in zip(got.rows, expected.rows, strict=True))
    assert torch.equal(got.scale, expected.scale) and torch.equal(got.zero_point, expected.zero_point)
    assert got.scale.shape == (2 * q.shape[1], len(parts) * heads)


@given(
    new=st.integers(1, 40), start=st.integers(0, 50), group=st.integers(1, 4), g=st.integers(1, 3), low=st.integers(0, 40),
    high=st.integers(1, 20), window=st.sampled_from([0, 1, 7]), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_sizes_and_threads(library, new, start, group, g, low, high, window, seed):
    head = CachedHead(low, high)
    cache = filled(1, g, start + new, head)
    cache.start.fill_(start)
    q = random(1, new, g * group, head.columns, seed=seed)
    options = (0.3, None, window, 0.0, None)
    results = []
    for name in (name for name, able in library.instruction_sets().items() if able):
        with library.using(name):
            got = [attention(library, q, cache, *options, threads=threads) for threads in (1, 2, 3, 4)]
        check(got[0], q, cache, *options, start + new)
        results.extend(got)
    assert all(torch.equal(results[0], other) for other in results)


def test_a_sequence_in_pieces_is_the_sequence_at_once(library):
    """Tokens one by one, behind each other in one cache, see what a prompt sees."""
    head, d = HEADS["both"], 64
    q, k, v = random(1, 20, 4, d), random(1, 20, 2, d, seed=1), random(1, 20, 2, d, seed=2)
    whole, pieces, outputs = empty_cache(1, 2, 20, head, head), empty_cache(1, 2, 20, head, head), []
    expected = attention(library, rope_cache(library, q, k, v, None, whole), whole, 0.125)
    for i in range(20):
        step = [x[:, i : i + 1].contiguous() for x in (q, k, v)]
        outputs.append(attention(library, rope_cache(library, *step, None, pieces), pieces, 0.125))
        pieces.start.add_(1)
    assert torch.equal(pieces.keys, whole.keys) and torch.equal(pieces.values, whole.values)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **CLOSE)


def test_what_is_expected_is_torch_attention(library):
    q, cache, _, total = case("prefill")
    k, v = (formats.unpack_cache(x[:, :, :total], cache.key_head) for x in (cache.keys, cache.values))
    queries = coded(q, cache.key_head).transpose(1, 2)
    expected = F.scaled_dot_product_attention(queries, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    options = (0.125, None, 0, 0.0, None, total)
    torch.testing.assert_close(reference(q, cache, *options)[0], expected, **CLOSE)
    check(attention(library, q, cache, 0.125), q, cache, *options)


def test_operands_that_do_not_fit(library):
    q, cache, _, _ = case("decode")
    with pytest.raises(BackendError, match=r"9 tokens behind \[130, 37\] need room for 139, the cache has 134"):
        attention(library, random(2, 9, 6, 64), cache, 1.0)
    with pytest.raises(BackendError, match=r"mask \(2, 4\); expected \[2, at least 131\]"):
        attention(library, q, cache, 1.0, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(BackendError, match="output parts .*expected 64 columns in all and 6 groups"):
        attention(library, q, cache, 1.0, parts=[CodePart(4, 60, 6)])
    with pytest.raises(BackendError, match=r"prefix values is .*expected contiguous torch.float32 \(2, 1, 64\)"):
        attention(library, q, cache, 1.0, prefix=(random(2, 1, 64), random(2, 2, 64)))
    with pytest.raises(BackendError, match="5 query heads for 2 key heads"):
        attention(library, random(2, 1, 5, 64), cache, 1.0)
    with pytest.raises(BackendError, match="tokens evenly spaced"):
        rope_cache(library, q, random(2, 1, 64, 2).transpose(2, 3), q[:, :, :2], None, cache)
