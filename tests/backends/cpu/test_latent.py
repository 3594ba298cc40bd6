"""Latent attention against torch: cache rows are the law's codes to the bit, results those of keys and values made first, to rounding."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.formats import CachedHead
from resq_compiler.backends.cpu.kernels import pack_linear
from resq_compiler.backends.cpu.latent import Entry, Expansion, cache_codes, latent_attention

from resq_compiler.errors import BackendError

CLOSE = dict(rtol=1e-4, atol=2e-5)  # float sums in another order; results are about 1

SHAPES = {  # heads, own, values, the vector's parts, rotary parts, (weight bits, columns) of the expanding linear
    "both": (4, 12, 16, CachedHead(21, 3), CachedHead(8, 0), ((4, 21), (8, 3))),
    "wide": (3, 64, 64, CachedHead(224, 32), CachedHead(24, 8), ((4, 224), (8, 32))),
    "eight": (5, 33, 20, CachedHead(0, 40), CachedHead(0, 10), ((8, 40),)),
    "cut": (2, 16, 24, CachedHead(0, 24), CachedHead(9, 0), ((3, 13), (8, 11))),
    "four": (9, 100, 72, CachedHead(136, 0), CachedHead(16, 0), ((4, 136),)),
}
STEPS = {"decode": (1, (70, 3)), "several": (5, (31, 0)), "prefill": (37, (0, 0))}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(shape, step):
    """Operands of latent_attention, and the float weight [channels, columns]."""
    heads, own, values, latent, rotary, parts = SHAPES[shape]
    new, start = STEPS[step]
    slots = max(start) + new
    generator = torch.Generator().manual_seed(3)
    channels, coded = heads * (own + values), []
    for bits, width in parts:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, width), generator=generator).to(
            torch.int8
        )
        coded.append((codes, torch.rand(channels, generator=generator) / 2**bits / width**0.5 + 1e-3, bits))
    weight = torch.cat([codes * scale[:, None] for codes, scale, _ in coded], -1)
    entries = []
    for seed, head in enumerate((latent, rotary)):
        rows = formats.pack_cache(random(2, 1, slots + 2, head.columns, seed=seed), head)
        entries.append(Entry(rows, random(2, 1, new, head.columns, seed=10 + seed), head))
    mask = torch.ones(2, slots, dtype=torch.bool)
    mask[1, :2] = False
    q = random(2, heads, new, own + rotary.columns, seed=20)
    widths = tuple(width for _, width in parts)
    row_bits = [part.bits for part in entries[0].cut(widths)]
    expansion = Expansion(pack_linear(coded, [1] * len(parts), row_bits), widths, heads, own)
    return (q, *entries, torch.tensor(start, dtype=torch.int32), mask, expansion, 0.3), weight


def appended(entry, start, clip):
    """Its rows with the new ones."""
    rows = entry.rows.clone()
    for b, first in enumerate(start.tolist()):
        rows[b, :, first : first + entry.new.shape[2]] = formats.pack_cache(entry.new[b], entry.head, clip)
    return rows


def expected(operands, weight, clip):
    """By keys and values of all tokens, in float64; 0 where a query sees nothing."""
    q, vectors, rotary, start, mask, expansion, scale = operands
    new, slots = q.shape[2], mask.shape[1]
    c, r = (formats.unpack_cache(appended(e, start, clip), e.head)[:, 0, :slots].double() for e in (vectors, rotary))
    made = (c @ weight.double().T).split([expansion.heads * expansion.own, expansion.heads * expansion.values], -1)
    k, v = (x.unflatten(-1, (expansion.heads, -1)).transpose(1, 2) for x in made)
    k = torch.cat((k, r[:, None].expand(-1, expansion.heads, -1, -1)), -1)
    seen = torch.arange(slots) <= (start[:, None] + torch.arange(new))[..., None]
    scores = (q.double() @ k.mT * scale).masked_fill(~(seen & mask[:, None])[:, None], -torch.inf)
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).transpose(1, 2).float()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("expand", [False, True])
def test_equals_keys_and_values_that_are_made(library, isa, shape, step, expand):
    operands, weight = case(shape, step)
    q, vectors, rotary, start, *_ = operands
    rows, wanted = [appended(entry, start, 0.9) for entry in (vectors, rotary)], expected(operands, weight, 0.9)
    got = latent_attention(library, *operands, clip=0.9, threads=2, expand=expand)
    assert torch.equal(vectors.rows, rows[0]) and torch.equal(rotary.rows, rows[1])
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_and_any_threads_give_the_same_bytes(library, shape, expand):
    results = []
    for name in [name for name, able in library.instruction_sets().items() if able]:
        for threads in (1, 3):
            with library.using(name):
                results.append(latent_attention(library, *case(shape, "several")[0], threads=threads, expand=expand))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_that_are_cached(library, isa, shape):
    operands, _ = case(shape, "several")
    _, vectors, _, start, mask, expansion, _ = operands
    codes = cache_codes(library, vectors, start, mask.shape[1], 1.0, expansion.widths)
    pieces = []
    for i, (rows, width) in enumerate(zip(codes.rows, codes.widths, strict=True)):
        q = formats.unpack_rows(rows, width, 1)
        assert torch.equal(q.sum(-1, dtype=torch.int32), rows[:, -4:].clone().view(torch.int32)[:, 0])
        pieces.append((q - codes.zero_point[:, i : i + 1]) * codes.scale[:, i : i + 1])
    image = formats.unpack_cache(vectors.rows, vectors.head)[:, 0, : mask.shape[1]]
    assert torch.equal(torch.cat(pieces, -1), image.flatten(0, 1))


def test_it_expands_where_there_are_many_queries(library):
    """A step turns its query; a prefill of as many tokens as a vector has columns makes keys and values."""
    from resq_compiler.backends.cpu.library import Head, LatentAttentionArgs

    def expands(tokens, total):
        arguments = LatentAttentionArgs(batch=1, tokens=tokens, heads=16, own=128, values=128, total=total)
        arguments.latent, arguments.rotary = Head(448, 64, 4, 8), Head(64, 0, 4, 8)
        return library.latent_expands(arguments)

    assert not expands(1, 64) and not expands(1, 4096) and not expands(8, 600)
    assert expands(512, 512) and expands(128, 512)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda o: (o[0][..., 1:].contiguous(), *o[1:]), r"q is torch.float32 \(2, 4, 1, 19\)"),
        (lambda o: (*o[:4], o[4][:, :5], *o[5:]), r"mask \(2, 5\), room for 73 tokens; expected \[2, at least 71\]"),
        (lambda o: (*o[:5], Expansion(o[5].weight, (21, 4), 4, 12), o[6]), r"parts \(21, 4\); expected .* of 24 columns"),
        (lambda o: (*o[:3], o[3] + 10, *o[4:]), r"room for 73 tokens; expected \[2, at least 81\]"),
    ],
    ids=["q", "mask", "parts", "room"],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused(library, change, said):
    operands, _ = case("both", "decode")
    with pytest.raises(BackendError, match=said):
        latent_attention(library, *change(operands))
