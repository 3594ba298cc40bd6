"""Masks of four dimensions: those that say causality, windows and padding give what transformers computes with them, others an error."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph
from transformers.masking_utils import create_masks_for_generate

from resq_compiler.errors import BackendError
from resq_compiler.model.masks import checked_mask, windows_of
from resq_compiler.tiny import tiny_tokens

IDS = tiny_tokens(2, 5)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
ALL, THREE, BOTH = frozenset({None}), frozenset({3}), frozenset({None, 3})


def four(mask, new: int = 5, window: int = 99):
    """[B, 1, S, T]: causality, a window and padding."""
    total = mask.shape[1]
    shape = torch.ones(new, total).tril(total - new).triu(total - new - window + 1)
    return (shape.bool() & mask.bool()[:, None])[:, None]


def additive(seen, low: float = torch.finfo(torch.float32).min):
    return torch.zeros(seen.shape).masked_fill(~seen, low)


@pytest.mark.parametrize("mask", [
    MASK, MASK.bool(), MASK.float(), four(MASK), four(MASK).expand(2, 3, 5, 5), additive(four(MASK)), additive(four(MASK), -torch.inf),
    torch.cat((four(MASK), torch.zeros(2, 1, 5, 7, dtype=torch.bool)), 3), {"full_attention": four(MASK)},
], ids=str)  # fmt: skip
def test_masks_that_say_padding(mask):
    assert checked_mask(mask, IDS, 0, ALL).equal(MASK)


def test_a_mask_over_a_cache():
    assert checked_mask(four(MASK, 2), IDS[:, :2], 3, ALL).equal(MASK)
    assert checked_mask(None, IDS, 3, THREE).equal(torch.ones(2, 8, dtype=torch.long))
    assert checked_mask(four(torch.ones(1, 5)), IDS, 0, ALL).equal(torch.ones_like(IDS))


def test_windows():
    """Tokens that lie before every window count as no padding: nothing sees them."""
    assert checked_mask(four(MASK, window=3), IDS, 0, THREE).equal(MASK)
    assert checked_mask(four(MASK, 1, window=3), IDS[:, :1], 4, THREE).tolist() == [[1, 1, 1, 1, 1]] * 2
    types = {"full_attention": four(MASK), "sliding_attention": additive(four(MASK, window=3))}
    assert checked_mask(types, IDS, 0, BOTH).equal(MASK)
    assert checked_mask(four(MASK[:, 2:], 3), IDS[:, 2:], 0, BOTH).equal(MASK[:, 2:])  # no longer than the window
    assert checked_mask({**types, "full_attention": four(MASK, window=3)}, IDS, 0, THREE).equal(MASK)


TWO_TEXTS = four(MASK) & (torch.tensor([0, 0, 1, 1, 1]) == torch.tensor([0, 0, 1, 1, 1])[:, None])


@pytest.mark.parametrize(("mask", "windows", "message"), [
    (MASK[:, :4], ALL, r"expected \[2, 5\], a column for each of 0 cached and 5 new tokens; got \[2, 4\]"),
    (MASK[0], ALL, r"expected \[2, 5\]"), (MASK.tolist(), ALL, "expected a tensor; got list"),
    ({"full_attention": MASK}, ALL, r"tensors of four dimensions.*; got \{'full_attention': '\[2, 5\]'\}"),
    ({}, ALL, "full_attention: no mask"),
    ({"full_attention": None}, ALL, "'NoneType'"), ({"chunked_attention": four(MASK)}, ALL, "for full_attention and sliding_attention"),
    (four(MASK)[:, :, :3], ALL, r"expected \[2, 1, 5, 5\]"), (four(MASK), frozenset(), "its graph does not name"),
    (torch.ones(2, 1, 5, 5).bool(), ALL, "more than causality and padding"), (TWO_TEXTS, ALL, "position_ids"),
    (additive(four(MASK)) - 0.5, ALL, "more than causality"),
    (torch.cat((four(MASK), four(MASK).roll(1, 3)), 1), ALL, "more than causality"),
    (four(MASK), THREE, "the window of 3 tokens and padding"),
    (four(MASK), BOTH, "the windows of 3 tokens that some layers see.* give a dict"),
    (four(MASK, window=3), BOTH, "give a dict"),
    ({"full_attention": four(MASK)}, BOTH, "sliding_attention: no mask for layers of this type"),
    ({"full_attention": four(MASK), "sliding_attention": four(torch.ones(2, 5), window=3)}, BOTH, "different padding"),
], ids=str)  # fmt: skip
def test_masks_that_are_refused(mask, windows, message):
    with pytest.raises(BackendError, match=f"forward: attention_mask.*{message}"):
        checked_mask(mask, IDS, 0, windows)


def masks_of(model, mask):
    """What transformers makes of a mask of padding before it calls a model's layers: one tensor, or a dict by their type."""
    return create_masks_for_generate(model.config, torch.zeros(*mask.shape, 1), mask, None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_masks_of_transformers(compiled, tiny, family):
    """As the mask of padding, for texts that are longer than the windows (6 tokens)."""
    ids, padding = tiny_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    padding[0, :2] = 0
    float_model, model = tiny(family), compiled(family, weight_method="rtn")
    given = masks_of(float_model, padding)
    real = padding.bool()
    for attend, own in ((float_model, padding), (model, padding)):
        expected, found = attend(ids, attention_mask=own).logits[real], attend(ids, attention_mask=given).logits[real]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32 sums in another order


def test_full_masks_where_layers_have_windows(compiled):
    """Transformers would let the layers see all; a graph has its windows."""
    with pytest.raises(
        BackendError, match=r"attention_mask \[2, 1, 9, 9\]: says more than causality, the window of 6 tokens"
    ):
        compiled("mistral", weight_method="rtn")(tiny_tokens(2, 9), attention_mask=four(torch.ones(2, 9), 9))


def test_windows_that_a_graph_does_not_name(compiled):
    model = compiled("gemma2", weight_method="rtn")
    assert windows_of(model.graph_module.graph, model.config) == frozenset({None, 6})
    assert windows_of(Graph(), model.config) == frozenset()
    assert windows_of(Graph(), compiled("llama", weight_method="rtn").config) == ALL
