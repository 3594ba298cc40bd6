"""Decoding with fixed shapes: what a CUDA graph needs, without a GPU."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.triton.decode import StaticDecoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokens

SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "item", "equal")


class Recorder(TorchDispatchMode):
    """Every operator with its arguments; a tensor by its shape, its strides and, when it is one of `fixed`, its address."""

    def __init__(self, fixed: set[int]):
        super().__init__()
        self.fixed, self.calls = fixed, []

    def describe(self, value):
        if not isinstance(value, Tensor):
            return str(value)
        address = value.data_ptr() if value.data_ptr() in self.fixed else None
        return tuple(value.shape), value.stride(), str(value.dtype), address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), tree_map(self.describe, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def prompt() -> tuple[Tensor, Tensor]:
    ids = tiny_tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


@pytest.fixture
def model(compiled, sharing):
    return sharing(compiled("llama", recipe="resq", weight_method="rtn")).use_backend("triton")


def test_the_tokens_of_generate_by_steps_that_are_all_alike(model, prompt):
    ids, mask = prompt
    decoder = StaticDecoder(model, ids, mask, new_tokens=2)
    buffers = [
        decoder.logits,
        decoder._ids,
        decoder._positions,
        decoder._mask,
        decoder._start,
        *decoder._tables,
        *decoder._caches,
    ]
    fixed = {t.data_ptr() for t in [*buffers, *model.buffers()]}
    tokens, calls = [], []
    for _ in range(2):
        tokens.append(decoder.logits.argmax(-1))
        with Recorder(fixed) as recorder:
            decoder.step(tokens[-1])
        calls.append(recorder.calls)
    assert calls[1] == calls[0]  # the same operators, shapes, constants and addresses
    assert sum(name.startswith("resq.") for name, _ in calls[0]) == 18
    assert not [name for name, _ in calls[0] if any(word in name for word in SYNCHRONIZING)]
    options = dict(do_sample=False, max_new_tokens=2, min_new_tokens=2, pad_token_id=0, eos_token_id=None)
    assert torch.equal(torch.stack(tokens, 1), model.generate(ids, attention_mask=mask, **options)[:, 7:])
    with pytest.raises(BackendError, match="no room left"):
        decoder.step(tokens[-1])


def test_logits_do_not_depend_on_the_room(model, prompt):
    """The mask is as long as the cache; what lies beyond the last token must not be seen."""
    ids, mask = prompt
    small, large = StaticDecoder(model, ids, mask, new_tokens=2), StaticDecoder(model, ids, mask, new_tokens=400)
    assert small._mask.shape[1] < large._mask.shape[1]
    assert torch.equal(small.generate(1), large.generate(1))
    torch.testing.assert_close(
        small.logits, large.logits, rtol=1e-5, atol=1e-5
    )  # softmax split over another number of programs


def test_refusals(model, compiled, prompt):
    ids, mask = prompt
    with pytest.raises(BackendError, match="use_backend"):
        StaticDecoder(compiled("llama", recipe="resq", weight_method="rtn"), ids, mask)
    with pytest.raises(BackendError, match="CUDA graphs need a GPU"):
        StaticDecoder(model, ids[:, :1]).capture()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_gives_the_same_tokens(model, prompt):
    ids, mask = (t.cuda() for t in prompt)
    plain, captured = (StaticDecoder(model.cuda(), ids, mask, new_tokens=8) for _ in range(2))
    captured.capture()
    assert torch.equal(captured.generate(), plain.generate())
