"""Whole tiny models on the kernels: same tokens as the reference backend, and what is refused."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from resq_compiler.backends.triton import launch
from resq_compiler.backends.triton.backend import TritonBackend
from resq_compiler.backends.triton.cache import PagedTensor, fresh

from resq_compiler import graph_tools
from resq_compiler.errors import BackendError
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens

FAST = ("llama",)
GREEDY = dict(do_sample=False, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)


@pytest.fixture
def compiled(compile_tiny):
    """(family, **options) -> (reference model, the same on the kernels)."""

    def make(family: str, backend: TritonBackend | None = None, **options):
        reference, _ = compile_tiny(family, weight_method="rtn", **options)
        ours = copy.copy(reference)
        ours._runner = (backend or TritonBackend()).prepare(reference)
        return reference, ours

    return make


def _called(model) -> Counter:
    nodes = model._runner.graph_module.graph.nodes
    return Counter(str(n.target).split(".")[1] for n in nodes if "resq_triton" in str(n.target))


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY_FAMILIES])
def test_same_tokens_as_the_reference(family, compiled):
    reference, ours = compiled(family)
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    expected = reference(ids, attention_mask=mask).logits[:, 3:]
    difference = (ours(ids, attention_mask=mask).logits[:, 3:] - expected).abs()
    # the same integers, so float32 rounding; unless it moves a code across a rounding boundary, which shows in few tokens
    assert difference.median() < 1e-5 * expected.abs().max()
    assert (difference.amax(-1) > 1e-4 * expected.abs().max()).float().mean() < 0.35
    expected = reference.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_a_block_is_nine_launches(compiled):
    reference, ours = compiled("llama")
    calls = _called(ours)
    assert calls == dict(norm_quantize=4, mixed_linear=8, rope_cache=2, attention_quantize=2, hadamard_quantize=2)
    assert sum(calls.values()) == 2 * 9
    graph = ours._runner.graph_module.graph
    assert [n.name for n in graph_tools.placeholders(graph)][3:7] == ["cache_table", "cache_start", "key_pages_0", "value_pages_0"]


def test_operators_have_fake_implementations(compiled):
    """The lowered graph runs on fake tensors: it can be exported and compiled."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, ours = compiled("llama")
    runner = ours._runner
    pages = [fresh(2, 2, la.page_bytes, 64, torch.device("cpu")).pages for pair in runner.caches for la in pair]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    table, start = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    inputs = (ids, torch.ones(2, 5, dtype=torch.int64), ids, table, start, *pages)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        (logits,) = runner.graph_module(*[mode.from_tensor(t) for t in inputs])
    assert logits.shape == (2, 5, 131)
    assert "resq_triton.mixed_linear" in runner.graph_module.code


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(recipe="quarot"), dict(kv_bits=8), dict(low_fraction=0.125)], ids=str)
def test_other_recipes(options, compiled):
    reference, ours = compiled("llama", **options)
    ids = tiny_tokens(2, 9)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_a_float_cache_is_refused_with_the_reason(compiled):
    with pytest.raises(BackendError, match="(?s)cannot take.*not quantized .kv_bits of 16.*allow_fallback=True"):
        compiled("llama", kv_bits=16)
    reference, ours = compiled("llama", TritonBackend(allow_fallback=True), kv_bits=16)
    ids = tiny_tokens(2, 9)
    assert len(ours._runner.reasons) == 2 and ours._runner.caches == [None, None]
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_a_cache_of_another_backend_is_refused(compiled):
    reference, ours = compiled("llama")
    past = reference(tiny_tokens(1, 4)).past_key_values
    with pytest.raises(BackendError, match="float cache of 4 tokens"):
        ours(tiny_tokens(1, 1), past_key_values=past)


def test_caches_are_values():
    cache = fresh(2, 3, 640, 64, torch.device("cpu")).appended(5)
    cache.pages.fill_(1)
    first, second = cache.appended(1), cache.appended(1)
    assert first.pages.data_ptr() == cache.pages.data_ptr()
    assert second.pages.data_ptr() != cache.pages.data_ptr() and second.shape == (2, 3, 6, 1)
    assert cache[..., :3, :].shape[2] == 3 and isinstance(cache[..., :3, :], PagedTensor)
    cache.pages[0] = 7
    swapped = cache.index_select(0, torch.tensor([1, 0]))
    assert swapped.pages[1].eq(7).all() and swapped.pages[0].eq(1).all()
    grown = first.appended(100)
    assert grown.capacity == 2 and grown.pages[0].eq(7).all() and grown.pages[2].eq(1).all()


def test_without_triton_or_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        assert "no CUDA or ROCm device" in launch.unavailable()
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'resq_compiler[triton]'" in launch.unavailable()
