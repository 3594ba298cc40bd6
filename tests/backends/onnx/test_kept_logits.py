"""Profile native gives logits for the positions that are asked for, by default the last token's, and writes its cache in place."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import export_onnx, shared_buffers
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.shared_buffers import ROOM, BoundSession, GrowingCache

from resq_compiler.tiny import tiny_tokens


@pytest.fixture(scope="module")
def decoder(library, compile_tiny, tmp_path_factory):
    """An integer lm_head behind a quantizer, and random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "library", lambda: library)
        compiled, _ = compile_tiny("llama", recipe="resq", weight_method="rtn", lm_head_bits=8)
        path = export_onnx(compiled, tmp_path_factory.mktemp("native") / "model", "native")
        yield OnnxDecoder(path, threads=1)


def inputs(mask):
    """Two sequences and what a client feeds beside them."""
    ids = tiny_tokens(2, mask.shape[1], seed=12).numpy()
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def logits_of(decoder, tensors, **options):
    feeds = dict(zip(("input_ids", "attention_mask", "position_ids"), tensors, strict=True))
    past = {name: value.numpy() for name, value in decoder.empty_past(len(tensors[0])).items()}
    return decoder.session.run(["logits"], feeds | past | options)[0]


MASKS = {
    "left": np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
    "right": np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
}
LAST = {"left": (6, 6), "right": (4, 6)}


@pytest.mark.parametrize("padding", MASKS)
def test_the_last_tokens_of_every_sequence(decoder, padding):
    tensors = inputs(MASKS[padding])
    every = logits_of(decoder, tensors, logits_to_keep=np.zeros(1, np.int64))
    assert every.shape[:2] == (2, 7)
    expected = np.stack([every[row, [last]] for row, last in enumerate(LAST[padding])])
    assert np.array_equal(logits_of(decoder, tensors), expected)
    three = logits_of(decoder, tensors, logits_to_keep=np.array([3]))
    assert np.array_equal(three[0], every[0, LAST[padding][0] - 2 : LAST[padding][0] + 1])
    assert np.array_equal(logits_of(decoder, tensors, logits_to_keep=np.array([99])).shape, (2, 7, every.shape[2]))


def test_what_clients_see(decoder):
    """The shape that onnxruntime-genai takes for a model of last logits, and an input that may be left out."""
    assert decoder.session.get_outputs()[0].shape[1] == 1
    assert [i.name for i in decoder.session.get_overridable_initializers()] == ["logits_to_keep"]
    assert "logits_to_keep" not in [i.name for i in decoder.session.get_inputs()]


def test_a_cache_in_place_is_the_cache_that_is_passed_on(decoder, monkeypatch):
    """Greedy tokens, through two growths of the buffers, of steps that copy and steps that do not."""
    monkeypatch.setattr(shared_buffers, "ROOM", 8)
    ids, mask, positions = inputs(MASKS["left"])
    got = decoder.generate(ids, mask, max_new_tokens=12, eos_token_id=[])
    past, new = decoder.empty_past(2), ids
    for _ in range(12):
        logits, past = decoder.forward(new, mask, positions, past)
        new = logits.numpy()[:, -1].argmax(-1)[:, None]
        ids, mask = np.concatenate([ids, new], 1), np.concatenate([mask, np.ones_like(new)], 1)
        positions = mask.sum(1, keepdims=True) - 1
    assert np.array_equal(got, ids)


def test_tokens_behind_a_long_prompt_find_room(decoder):
    """The first one does not wait for a copy of all that came before."""
    cache, prompt = GrowingCache(BoundSession(decoder.session), 1), ROOM + 1
    ids = tiny_tokens(1, prompt, seed=12).numpy()
    cache.step(ids, np.ones_like(ids), np.arange(prompt)[None])
    buffers = cache.buffers
    for length in (prompt, prompt + ROOM - 1):
        cache.length = length
        cache.step(np.array([[3]]), np.ones((1, length + 1), np.int64), np.array([[length]]))
        assert cache.buffers is buffers


def test_buffers_are_written_where_they_are(decoder):
    bound = BoundSession(decoder.session)
    buffers = [buffer.fill_(85) for buffer in bound.buffers(2, 20)]
    first = bound.run(*inputs(MASKS["left"]), buffers, 0)
    assert first.shape[:2] == (2, 7) and bound.keeps
    assert all(bool((b[:, :, 7:] == 85).all()) and not bool((b[:, :, :7] == 85).all()) for b in buffers)
    kept = [b[:, :, :7].clone() for b in buffers]
    mask = np.concatenate([MASKS["left"], np.ones((2, 1), np.int64)], 1)
    bound.run(np.array([[3], [4]]), mask, mask.sum(1, keepdims=True) - 1, buffers, 1)
    assert all(
        torch.equal(a, b[:, :, :7]) and not bool((b[:, :, 7] == 85).all()) for a, b in zip(kept, buffers, strict=True)
    )


def test_what_is_bound_stays_bound(decoder):
    """A step binds anew what has another shape than in the step before; what the caller gave stays the caller's."""
    bound, asked = BoundSession(decoder.session), []
    bind = bound._binding.bind_ortvalue_input
    bound._binding.bind_ortvalue_input = lambda name, value: (asked.append(name), bind(name, value))
    cache = GrowingCache(bound, 1)
    ids = tiny_tokens(1, 5, seed=12).numpy()
    got = [cache.step(ids, np.ones_like(ids), np.arange(5)[None])]
    for at in (5, 6, 7):
        asked.clear()
        tokens = np.array([[at]])
        got.append(cache.step(tokens, np.ones((1, at + 1), np.int64), np.array([[at]])))
        tokens[:] = 0
    assert asked == ["attention_mask"]
    assert bound._inputs["input_ids"] == [[7]]
    whole = np.concatenate([ids, [[5, 6, 7]]], 1)
    for expected, length in zip(got, (5, 6, 7, 8), strict=True):
        one = GrowingCache(BoundSession(decoder.session), 1)
        for start, stop in [(0, 5), *((at, at + 1) for at in range(5, length))]:
            logits = one.step(whole[:, start:stop], np.ones((1, stop), np.int64), np.arange(start, stop)[None])
        assert np.array_equal(logits, expected)


def test_a_buffer_without_room(decoder):
    """What a client that shares buffers does wrong is an error of ONNX Runtime that names the node."""
    bound = BoundSession(decoder.session)
    with pytest.raises(Exception, match="AttentionLinear.*") as raised:
        bound.run(*inputs(MASKS["left"]), bound.buffers(2, 5), 1)
    assert isinstance(raised.value, (RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument))
