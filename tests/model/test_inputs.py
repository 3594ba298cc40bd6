"""What forward takes: checked, with one clear error for what it is not."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from resq_compiler.errors import BackendError
from resq_compiler.model import inputs
from resq_compiler.tiny import tiny_tokens

IDS = tiny_tokens(2, 5)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(("bad", "message"), [
    ([[1, 2]], "got list"), (IDS[0], r"got \[5\]"), (IDS[:, :0], r"got \[2, 0\]"), (IDS.float(), "expected integers; got torch.float32"),
    (IDS == 3, "expected integers; got torch.bool"), (IDS - 131, "below the vocabulary size 131; got -"), (IDS + 131, "131; got 2"),
])  # fmt: skip
def test_ids(bad, message):
    with pytest.raises(BackendError, match=f"forward: input_ids: .*{message}"):
        inputs.checked_ids(bad, 131)
    assert inputs.checked_ids(IDS.to(torch.int32), 131).equal(IDS)


def test_positions():
    given = torch.arange(5)
    for shape in (given, given[None], given.expand(2, 5)):
        assert inputs.checked_positions(shape, MASK, 5).equal(given.expand(2, 5))
    assert inputs.checked_positions(None, MASK, 5)[0].tolist() == [0, 0, 0, 1, 2]
    for bad in (given[:3], given.expand(3, 5), given.expand(1, 2, 5), given[0]):
        with pytest.raises(BackendError, match=r"forward: position_ids: expected \[2, 5\]"):
            inputs.checked_positions(bad, MASK, 5)


def test_packed_texts():
    """Rows of 2 + 3 tokens and of 5; a jump begins a text as well."""
    packed = inputs.packed_texts(IDS, torch.tensor([[0, 1, 0, 1, 2], [3, 4, 5, 6, 7]]))
    assert packed.mask.tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert packed.positions.tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 1, 2], [3, 4, 5, 6, 7]]
    assert packed.ids[packed.row, packed.column].equal(IDS)
    assert inputs.packed_texts(IDS, torch.arange(5)) is None
    assert inputs.packed_texts(IDS, torch.tensor([[0, 1, 2, 4, 5]])).mask.shape == (4, 3)


def test_caches_of_another_model_or_batch(compiled):
    model, other = compiled("llama"), compiled("gemma2")
    cache = model(IDS).past_key_values
    with pytest.raises(
        BackendError, match=r"expected 2 layers with 2 heads for a batch of 1; got 2 layers, the first \[2, 2, 5, 16\]"
    ):
        model(IDS[:1], past_key_values=cache)
    with pytest.raises(BackendError, match="it is of another model or batch"):
        (other if len(other.cache_specs) != 2 else compiled("gemma3"))(IDS, past_key_values=cache)
    for bad in ((), tuple(IDS), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        with pytest.raises(BackendError, match="expected a cache of one decoder; got"):
            model(IDS, past_key_values=bad)


@pytest.mark.parametrize(("options", "message"), [
    ({"inputs": IDS[0]}, "input_ids: expected a tensor"), ({"input_ids": IDS.float()}, "input_ids: expected integers"),
    ({"inputs": IDS, "attention_mask": MASK[0]}, r"generate: attention_mask: expected \[2, 5\], as input_ids; got \[5\]"),
    ({"inputs": IDS, "attention_mask": {"full_attention": MASK}}, "got dict"),
    ({"inputs": IDS, "num_beams": 0}, "num_beams: expected at least 1"),
])  # fmt: skip
def test_generate_checks_first(compiled, options, message):
    with pytest.raises(BackendError, match=message):
        compiled("llama").generate(**options)


@pytest.mark.parametrize("labels", ["text", IDS.float(), IDS[:1], IDS + 131])
def test_labels(compiled, labels):
    with pytest.raises(BackendError, match="forward: labels: expected"):
        compiled("llama")(IDS, labels=labels)


@pytest.mark.parametrize("kept", [-1, "x", None, torch.tensor([5]), torch.tensor([0.5]), torch.tensor([[0]])], ids=str)
def test_logits_that_cannot_be_kept(kept):
    with pytest.raises(BackendError, match="forward: logits_to_keep: expected"):
        inputs.checked_kept(kept, 5)
    assert inputs.checked_kept(7, 5) == 7


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_prompts_of_other_integers(compiled, dtype):
    """Penalties of transformers take int64 alone."""
    options = {"max_new_tokens": 3, "pad_token_id": 0, "repetition_penalty": 1.2}
    expected = compiled("llama").generate(IDS, **options)
    assert torch.equal(compiled("llama").generate(IDS.to(dtype), **options), expected)
    assert torch.equal(compiled("llama").generate(input_ids=IDS.to(dtype), **options), expected)
