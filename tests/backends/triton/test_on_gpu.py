"""Whole tiny models with everything on a GPU: every operator's integers, logits in float32 and float16."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.triton.target import TRITON

from resq_compiler.ir import graph_tools
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.tiny import TINY_FAMILIES, tiny_model, tiny_tokens
from tests.backends.comparing import ComparingKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


@pytest.fixture
def there(compiled):
    """(family, dtype) -> its model on the kernels, on the GPU; what other tests share stays where it is."""

    def make(family: str, dtype: torch.dtype) -> CompiledModel:
        reference = compiled(family, recipe="resq", weight_method="rtn")
        own = dataclasses.replace(reference.result, graph_module=graph_tools.snapshot(reference.graph_module))
        return CompiledModel(own).use_backend("triton", dtype=dtype).to("cuda")

    return make


def relative_error(ours, expected):
    return float((ours.cpu().float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_operator_computes_its_integers(family, there, compiled, monkeypatch):
    ours, ids = there(family, torch.float32), tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    with monkeypatch.context() as patch:
        checked = ComparingKernels(TRITON)
        patch.setattr(operators, "find_target", lambda name: dataclasses.replace(TRITON, kernels=checked))
        ours(ids.cuda(), attention_mask=mask.cuda())
    checked.check()
    reference = compiled(family, recipe="resq", weight_method="rtn")
    real = mask.bool()  # of the others Gemma 2 normalizes a rounding error to size 1
    expected = reference(ids, attention_mask=mask).logits[real]
    found = ours(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[real]
    assert relative_error(found, expected) < 0.01  # a code at a tie may move


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_float16_is_as_good_as_the_reference(family, there, compiled):
    ids = tiny_tokens(4, 48, seed=1)
    exact = tiny_model(family)(ids).logits.detach()
    reference = compiled(family, recipe="resq", weight_method="rtn")(ids).logits
    found = there(family, torch.float16)(ids.cuda()).logits
    assert relative_error(found, exact) < 1.05 * relative_error(reference, exact)
