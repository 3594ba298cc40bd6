"""backend="cpu" in ONNX Runtime, and "auto": the reference backend's tokens, caches that behave as values, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from resq_compiler.backends import backends_for
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx.shared_buffers import ROOM
from transformers import DynamicCache

from resq_compiler.errors import BackendError
from resq_compiler.model.cache import filled
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens
from tests.backends.coded import coded
from tests.families import compiled as compiled_family

GREEDY = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)


@pytest.fixture(autouse=True)
def built_library(library, monkeypatch):
    """The kernels are those of the tree, installed or not."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(libraries, "unavailable", lambda: None)


@pytest.fixture
def compiled(compile_tiny, sharing):
    """(family, **options) -> (reference model, another model with its tensors)."""

    def make(family: str = "llama", **options):
        reference, _ = compile_tiny(family, **{"recipe": "resq", "weight_method": "rtn", **options})
        return reference, sharing(reference)

    return make


def padded():
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_generates_the_same_tokens(family, compiled):
    reference, ours = compiled(family)
    ids, mask = padded()
    expected = coded(reference, lambda model: model.generate(ids, attention_mask=mask, **GREEDY))
    assert torch.equal(ours.use_backend("cpu").generate(ids, attention_mask=mask, **GREEDY), expected)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_positions_behind_the_past(engine):
    """A model that counts its positions from the length of the cache, which has room for more."""
    model = compiled_family("blenderbot")
    ids = tiny_tokens(2, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.use_backend("cpu", engine=engine).generate(ids, **GREEDY), expected)


def test_beams_and_a_cache_that_is_continued_twice(compiled):
    reference, ours = compiled()
    ours.use_backend("cpu")
    ids, _ = padded()
    beams = dict(GREEDY, num_beams=3)
    assert torch.equal(ours.generate(ids, **beams), reference.generate(ids, **beams))
    cache = ours(ids).past_key_values
    assert cache.get_seq_length() == 9 and cache.layers[0].keys.packed.dtype == torch.uint8
    assert cache.layers[0].keys.capacity == 9 + ROOM  # tokens behind a prompt wait for no copy
    handles = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    first = ours(ids[:, :1], past_key_values=filled(DynamicCache(), handles)).logits
    ours(ids[:, 1:2], past_key_values=filled(DynamicCache(), handles))
    assert torch.equal(ours(ids[:, :1], past_key_values=filled(DynamicCache(), handles)).logits, first)


def test_logits_that_are_not_asked_for_are_not_computed(compiled):
    """A prompt's last logits, and all of them where the last token of a row is padding."""
    _, ours = compiled()
    runner = ours.use_backend("cpu").runner
    ids, mask = padded()
    every = ours(ids, attention_mask=mask).logits
    assert torch.equal(ours(ids, attention_mask=mask, logits_to_keep=2).logits, every[:, -2:])
    right = mask.flip(1)
    assert torch.equal(
        ours(ids, attention_mask=right, logits_to_keep=2).logits, ours(ids, attention_mask=right).logits[:, -2:]
    )
    computed = []
    run = runner.bound.run
    runner.bound.run = lambda *given: computed.append(given[-1]) or run(*given)
    ours.generate(ids, attention_mask=mask, **GREEDY)
    assert set(computed) == {1}


def test_the_weights_are_held_once(compiled):
    """The session reads the tensors of the lowered graph, which give the quantized graph back bit for bit."""
    reference, ours = compiled()
    runner = ours.use_backend("cpu").runner
    assert ours.execution._graph is None and ours.stages[-1].name == "lower-cpu"
    again, expected = dict(ours.graph_module.named_buffers()), dict(reference.graph_module.named_buffers())
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    ids, _ = padded()
    before = ours(ids).logits
    packed = next(
        b for name, b in runner.graph_module.named_buffers() if name.endswith(("low", "high")) and b.numel() > 1024
    )
    kept = packed.clone()
    packed.zero_()
    assert not torch.equal(ours(ids).logits, before)
    packed.copy_(kept)
    assert torch.equal(ours(ids).logits, before)


def test_both_engines_compute_the_same(compiled):
    """The same kernels on the same operands; what lies between them is ONNX Runtime's and PyTorch's."""
    _, ours = compiled()
    ids, mask = padded()
    logits = [
        ours.use_backend("cpu", engine=name)(ids, attention_mask=mask).logits for name in ("onnxruntime", "torch")
    ]
    seen = mask.bool()
    assert (logits[0] - logits[1])[seen].abs().max() < 1e-3 * logits[1][seen].abs().max()


def test_a_cache_of_another_backend(compiled):
    reference, ours = compiled()
    ids, _ = padded()
    cache = reference(ids).past_key_values
    with pytest.raises(BackendError, match="layer 0 got a torch.float32 cache of 9 tokens"):
        ours.use_backend("cpu")(ids[:, :1], past_key_values=cache)


def test_options(compiled):
    _, ours = compiled()
    with pytest.raises(BackendError, match="engine expected one of onnxruntime, torch; got 'numpy'"):
        ours.use_backend("cpu", engine="numpy")
    with pytest.raises(BackendError, match="allow_fallback needs engine='torch'"):
        ours.use_backend("cpu", allow_fallback=True)
    with pytest.raises(BackendError, match="backend auto: options"):
        ours.use_backend("auto", engine="torch")


def test_auto_takes_the_kernels(compiled):
    assert compiled()[1].use_backend("auto").backend == "cpu"
    assert backends_for("cuda") == ("triton", "reference")


def test_auto_says_why_it_is_the_reference(compiled, caplog, monkeypatch):
    _, ours = compiled(kv_bits=16)
    with caplog.at_level(logging.WARNING, "resq_compiler"):
        assert ours.use_backend("auto").backend == "reference"
    assert "backend auto: not cpu: " in caplog.text and "the key/value cache is not quantized" in caplog.text
    monkeypatch.setattr(libraries, "unavailable", lambda: "the CPU kernels are not installed")
    with caplog.at_level(logging.WARNING, "resq_compiler"):
        assert compiled()[1].use_backend("auto").backend == "reference"
    assert "the CPU kernels are not installed" in caplog.text
