"""Whatever `forward` and `generate` are given: an answer of the right shape, or one ResqError (transformers: ValueError for settings)."""

from __future__ import annotations

import contextlib
import copy
import traceback
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from resq_compiler.errors import ResqError
from tests.fuzz.damage import FEW, MANY
from tests.fuzz.ends import ends_of

VOCABULARY = 131
TRANSFORMERS = str(Path(transformers.__file__).parent)
DTYPES = st.sampled_from([torch.int32, torch.uint8, torch.float32, torch.bool])
SELDOM = st.integers(0, 9).map(
    lambda drawn: drawn == 7
)  # hypothesis draws the ends of a range more often than the middle


@st.composite
def ids(draw, batch=None):
    """Mostly token ids [batch, tokens]."""
    odd = draw(SELDOM)
    shape = (
        draw(st.lists(st.integers(0, 3), max_size=3))
        if odd
        else [batch or draw(st.integers(1, 3)), draw(st.integers(1, 9))]
    )
    low, high = (-2, VOCABULARY + 2) if draw(SELDOM) else (0, VOCABULARY - 1)
    drawn = torch.randint(low, high, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return drawn.to(draw(DTYPES)) if draw(SELDOM) else drawn


@st.composite
def masks(draw, shape):
    """None, padding, or something of another shape or type."""
    kind = draw(st.sampled_from(["none", "padding", "four", "other"]))
    if kind == "none" or len(shape) != 2 or 0 in shape:
        return None
    seen = torch.randint(0, 2, tuple(shape), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if kind == "padding":
        return seen.to(draw(DTYPES)) if draw(SELDOM) else seen
    if kind == "four":
        square = torch.ones(shape[1], shape[1]).tril().bool() & seen.bool()[:, None]
        near = square.triu(-5)[:, None]  # windows of 6, as gemma2's here
        return draw(
            st.sampled_from(
                [square[:, None], square[:, None].float(), ~square[:, None], near]
                + [
                    {"full_attention": square[:, None], "sliding_attention": own}
                    for own in (near, square[:, None], None)
                ]
            )
        )
    return draw(
        st.sampled_from(
            [seen[:, :-1], seen[0], seen.tolist(), {"full_attention": seen}, seen.float() / 0, torch.ones(())]
        )
    )


@st.composite
def positions(draw, shape):
    if len(shape) != 2 or 0 in shape or draw(st.booleans()):
        return None
    rows = torch.arange(shape[1]).expand(tuple(shape))
    return draw(
        st.sampled_from(
            [rows, rows % 3, rows[:1], rows[0], rows - 2, rows + 1000, rows[:, :-1], rows.float(), rows[None]]
        )
    )


ODD = {
    "labels": st.sampled_from([None, torch.zeros(1, 1), torch.zeros(2, 3, dtype=torch.long), "text"]),
    "logits_to_keep": st.sampled_from([0, 1, 3, 99, -1, torch.tensor([0]), torch.tensor([99]), "x"]),
    "use_cache": st.sampled_from([None, True, False]),
    "return_dict": st.sampled_from([None, True, False]),
    "past_key_values": st.sampled_from([None, (), DynamicCache(), "x"]),
    "inputs_embeds": st.just(torch.zeros(1, 2, 64)),
}


def check_forward(model, data) -> str:
    given_ids = data.draw(ids())
    arguments = {
        "attention_mask": data.draw(masks(given_ids.shape)),
        "position_ids": data.draw(positions(given_ids.shape)),
    }
    names = st.lists(st.sampled_from(sorted(ODD)), max_size=2, unique=True) if data.draw(st.booleans()) else st.just([])
    for name in data.draw(names):
        arguments[name] = copy.deepcopy(data.draw(ODD[name]))
    try:
        output = model(given_ids, **arguments)
    except ResqError:
        return "refused"
    logits = output.logits if arguments.get("return_dict") is not False else output[-2 if len(output) > 1 else 0]
    assert (len(logits), logits.shape[-1]) == (len(given_ids), VOCABULARY)
    cache = getattr(output, "past_key_values", None)
    if cache is not None:
        check_continued(model, cache, len(given_ids), data)
    return "answered"


def check_continued(model, cache, batch, data):
    """More tokens on the cache that came back, of this batch or another."""
    more = data.draw(ids(batch if data.draw(st.integers(0, 3)) else None))
    with contextlib.suppress(ResqError):
        assert model(more, past_key_values=cache).logits.shape == (*more.shape, VOCABULARY)


SETTINGS = {
    "max_new_tokens": st.integers(-1, 4), "num_beams": st.integers(0, 3), "do_sample": st.booleans(), "top_k": st.integers(-1, 200),
    "temperature": st.sampled_from([0.0, 0.7, -1.0, 1e-9]), "top_p": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    "repetition_penalty": st.sampled_from([1.2, 0.0, -1.0]), "eos_token_id": st.sampled_from([None, 2, [2, 3], 500]),
    "pad_token_id": st.sampled_from([0, -1]), "num_return_sequences": st.integers(0, 3), "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from([None, "static", "dynamic", "odd"]), "min_new_tokens": st.integers(0, 2),
    "return_dict_in_generate": st.booleans(), "output_scores": st.booleans(), "prompt_lookup_num_tokens": st.integers(1, 2),
}  # fmt: skip


def check_generate(model, data) -> str:
    prompt = data.draw(ids())
    arguments = {"max_new_tokens": 3, "pad_token_id": 0, "attention_mask": data.draw(masks(prompt.shape))}
    for name in data.draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=3, unique=True)):
        arguments[name] = data.draw(SETTINGS[name])
    if data.draw(st.integers(0, 5)) == 0:
        arguments["past_key_values"] = data.draw(
            st.sampled_from([DynamicCache, lambda: StaticCache(model.config, 16)])
        )()
    try:
        found = model.generate(prompt, **arguments)
    except ResqError:
        return "refused"
    except ValueError as error:  # transformers' own word on a setting
        assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(TRANSFORMERS)
        return "refused"
    sequences = found if isinstance(found, torch.Tensor) else found.sequences
    assert sequences.dim() == 2 and sequences.shape[1] >= prompt.shape[1]
    return "answered"


CHECKS = {"forward": check_forward, "generate": check_generate}


@pytest.fixture(scope="module", params=["llama", "gemma2", "opt"])
def model(request, compiled):
    """Plain; with windows and soft-caps; with learned positions."""
    return compiled(request.param, weight_method="rtn")


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_inputs(model, check):
    ends = ends_of(lambda data: check(model, data), FEW)
    assert min(ends["answered"], ends["refused"]) > 10, ends


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_many_inputs(model, check):
    ends = ends_of(lambda data: check(model, data), MANY)
    assert min(ends["answered"], ends["refused"]) > 200, ends
