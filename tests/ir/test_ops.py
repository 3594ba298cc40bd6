"""ops.py against torch and transformers: every operator's formula, not ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from resq_compiler.ir import ops

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def test_rms_norm(randn):
    norm = LlamaRMSNorm(24, eps=1e-3)
    norm.weight.data = randn(24)
    x = randn(2, 5, 24)
    torch.testing.assert_close(ops.rms_norm(x, norm.weight, 1e-3), norm(x), **ROUNDING)
    torch.testing.assert_close(
        ops.rms_norm(x, None, 0.0).square().mean(-1), torch.ones(2, 5), **ROUNDING
    )  # closed form
    assert ops.rms_norm(x.bfloat16(), None, 1e-6).dtype == torch.bfloat16
    assert ops.rms_norm(x.double(), None, 1e-6).dtype == torch.float64


def test_rope(randn):
    q, k, angle = randn(2, 4, 5, 16), randn(2, 2, 5, 16), randn(2, 5, 8)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for x, y in zip((q, k), expected, strict=True):
        got = ops.rope(x, cos[:, None], sin[:, None])
        torch.testing.assert_close(got, y, **ROUNDING)
        torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), **ROUNDING)  # a rotation keeps lengths


def test_rope_is_to_the_bit_what_joined_halves_make(randn):
    """Its gradient too: sensitivities come from it."""
    x = randn(2, 5, 3, 8).transpose(1, 2).requires_grad_()
    angle = randn(2, 1, 5, 8)
    joined = x * angle.cos() + torch.cat((-x[..., 4:], x[..., :4]), -1) * angle.sin()
    found = ops.rope(x, angle.cos(), angle.sin())
    assert torch.equal(found, joined) and found.stride() == joined.stride()
    (expected,), (gradient,) = (torch.autograd.grad(y.square().sum(), x) for y in (joined, found))
    assert torch.equal(gradient, expected)


def test_partial_rope_passes_the_rest_through(randn):
    x, angle = randn(2, 4, 5, 16), randn(2, 1, 5, 8)
    got = ops.rope(x, angle.cos(), angle.sin())
    assert torch.equal(got[..., 8:], x[..., 8:])
    assert torch.equal(got[..., :8], ops.rope(x[..., :8], angle.cos(), angle.sin()))


def test_heads_split_and_merge(randn):
    x = randn(2, 3, 24)
    heads = ops.split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 6) and torch.equal(heads[:, 1], x[..., 6:12])
    assert torch.equal(ops.merge_heads(heads), x)


def test_append_cache(randn):
    past, new = randn(2, 3, 4, 5), randn(2, 3, 1, 5)
    both = ops.append_cache(past, new)
    assert torch.equal(both[:, :, :4], past) and torch.equal(both[:, :, 4:], new)
    assert torch.equal(ops.append_cache(past[:, :, :0], new), new)


@pytest.mark.parametrize(
    "new, total, window", [(4, 4, None), (1, 9, None), (3, 8, None), (3, 8, 2), (6, 6, 3), (1, 9, 4), (5, 5, 99)]
)
def test_causal_mask_says_what_the_words_say(new, total, window):
    padding = torch.ones(2, total, dtype=torch.long)
    padding[0, :2] = 0
    mask = ops.causal_mask(padding, torch.zeros(2, new, dtype=torch.long), window)
    assert mask.shape == (2, 1, new, total) and mask.dtype == torch.bool
    for b in range(2):
        for i in range(new):
            for j in range(total):
                place = total - new + i
                expected = j <= place and (window is None or j > place - window) and bool(padding[b, j])
                assert bool(mask[b, 0, i, j]) is expected


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("boolean", [True, False])
def test_attention_is_eager_attention_of_transformers(softcap, kv_heads, boolean, randn):
    q, k, v = randn(2, 4, 3, 8), randn(2, kv_heads, 7, 8), randn(2, kv_heads, 7, 8)
    mask = ops.causal_mask(torch.ones(2, 7, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long))
    additive = torch.zeros(2, 1, 3, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups, module.training = 4 // kv_heads, False
    expected, _ = eager_attention_forward(module, q, k, v, additive, scaling=0.3, softcap=softcap)
    got = ops.attention(q, k, v, mask if boolean else additive, 0.3, softcap)
    torch.testing.assert_close(ops.merge_heads(got), expected.flatten(2), **ROUNDING)


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_triangles_take_the_kernel_that_skips_half_and_other_masks_do_not(randn, kv_heads, monkeypatch):
    """Bit for bit what the mask gives; padding, a window, a past or one token more is no triangle."""
    seen = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        ops.F, "scaled_dot_product_attention", lambda *a, **k: (seen.append(k["is_causal"]), sdpa(*a, **k))[1]
    )
    q, k, v = randn(2, 3, 70, 16), randn(2, kv_heads, 70, 16), randn(2, kv_heads, 70, 16)
    ids, ones = torch.zeros(2, 70, dtype=torch.long), torch.ones(2, 70, dtype=torch.long)
    mask = ops.causal_mask(ones, ids)
    expected = sdpa(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=kv_heads != 3)
    assert torch.equal(ops.attention(q, k, v, mask, 0.3), expected) and seen.pop()
    padded = ones.clone()
    padded[1, :2] = 0
    for other in (ops.causal_mask(padded, ids), ops.causal_mask(ones, ids, 20), mask.float().log()):
        ops.attention(q, k, v, other, 0.3)
        assert not seen.pop()
    ops.attention(q[:, :, :9], k, v, ops.causal_mask(ones, ids[:, :9]), 0.3)
    assert not seen.pop()


def test_attention_without_a_mask_and_one_key_returns_its_value(randn):
    v = randn(1, 1, 1, 8)
    got = ops.attention(randn(1, 2, 3, 8), randn(1, 1, 1, 8), v, None, 1.0)
    torch.testing.assert_close(got, v.expand(1, 2, 3, 8), rtol=0, atol=1e-6)  # softmax over one key is one


@pytest.mark.parametrize("inverse", [False, True])
def test_project(inverse, randn):
    x, u = randn(2, 3, 8), torch.linalg.qr(randn(8, 8))[0]
    expected = torch.einsum("bsd,ed->bse" if inverse else "bsd,de->bse", x, u)
    torch.testing.assert_close(ops.project(x, u, inverse), expected, **ROUNDING)


@pytest.mark.parametrize("inverse", [False, True])
def test_project_heads_gives_query_heads_the_basis_of_their_group(inverse, randn):
    x, u = randn(2, 4, 3, 8), randn(2, 8, 8)
    got = ops.project_heads(x, u, inverse)
    for head in range(4):
        basis = u[head // 2].T if inverse else u[head // 2]
        torch.testing.assert_close(got[:, head], x[:, head] @ basis, **ROUNDING)


def test_project_blocks_is_a_block_diagonal_product_with_columns_in_order(randn):
    x, u, order = (
        randn(2, 5, 12),
        torch.linalg.qr(randn(3, 4, 4))[0],
        torch.tensor([11, 0, 5, 2, 9, 1, 3, 10, 4, 8, 6, 7]),
    )
    got = ops.project_blocks(x, u, order)
    torch.testing.assert_close(got, (x @ torch.block_diag(*u))[..., order], **ROUNDING)
    torch.testing.assert_close(ops.project_blocks(got, u, order, True), x, rtol=1e-5, atol=1e-5)  # two float32 products


@pytest.mark.parametrize("sizes", [None, (12, 4), (20,)])
def test_hadamard_is_orthogonal_and_transpose_is_its_inverse(sizes, randn):
    x = randn(3, sum(sizes) if sizes else 24)
    turned = ops.hadamard(x, False, sizes)
    torch.testing.assert_close(ops.hadamard(turned, True, sizes), x, rtol=1e-5, atol=1e-5)  # two float32 transforms
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **ROUNDING)
    if sizes and len(sizes) > 1:
        torch.testing.assert_close(turned[:, :12], ops.hadamard(x[:, :12]), **ROUNDING)  # block by block


def test_columns(randn):
    x = randn(2, 3, 8)
    assert torch.equal(ops.columns(x, 2, 5), x[..., 2:5])


def weight_codes():
    return torch.randint(-8, 8, (5, 16), generator=torch.Generator().manual_seed(1)).to(torch.int8)


def test_quantized_linear_is_the_float_linear_of_the_images(randn):
    """Exact integers: float64 arithmetic on the codes is the law's formula without rounding."""
    x, codes, scale = randn(2, 3, 16), weight_codes(), randn(5).abs()
    xq = ops.quantize(x, 4)
    exact = ((xq.qdata.double() - xq.zero_point.double()) @ codes.double().T) * xq.scale.double() * scale.double()
    torch.testing.assert_close(
        ops.quantized_linear(xq, codes, scale).double(), exact, rtol=1e-6, atol=0
    )  # two float32 products
    image = F.linear(ops.dequantize(xq), codes.float() * scale[:, None])
    torch.testing.assert_close(ops.quantized_linear(xq, codes, scale), image, **ROUNDING)


def test_weight_only_linear(randn):
    x, codes, scale = randn(2, 3, 16), weight_codes(), randn(5).abs()
    expected = F.linear(x, codes.float() * scale[:, None])
    torch.testing.assert_close(ops.weight_only_linear(x, codes, scale), expected, **ROUNDING)


def test_quantize_dequantize_is_part_by_part(randn):
    x = randn(2, 2, 3, 16)
    got = ops.quantize_dequantize(x, ((4, 0, 12), (8, 12, 16)))
    for bits, start, stop in ((4, 0, 12), (8, 12, 16)):
        assert torch.equal(got[..., start:stop], ops.dequantize(ops.quantize(x[..., start:stop], bits)))


def test_registry_has_every_operator_under_its_name():
    assert all(OP.__name__ == name and getattr(ops, name) is OP for name, OP in ops.OPS.items())
    assert {"rms_norm", "rope", "attention", "quantized_linear", "hadamard", "project_heads"} <= set(ops.OPS)
