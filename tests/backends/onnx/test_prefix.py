"""A prefix of massive tokens in ONNX: every profile and both caches compute what the reference backend computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from resq_compiler.backends.onnx import build_model, export_onnx
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.backends.onnx.session import open_session

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.tiny import tiny_tokens
from tests.backends.onnx.conftest import example, reference, visible
from tests.conftest import with_prefix


@pytest.fixture
def prefixed(compile_tiny):
    """family -> a compiled model with a prefix."""

    def make(family):
        compiled, _ = compile_tiny(family, recipe=with_prefix(weight_method="rtn", lm_head_bits=8))
        assert any(is_call(n, ops.prepend) for n in compiled.graph_module.graph.nodes)
        return compiled

    return make


@pytest.mark.parametrize("profile", ["ort", "qdq", "weight-only"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_same_logits_and_cache(prefixed, family, profile):
    compiled = prefixed(family)
    model = build_model(compiled, profile, embedding="float32")
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), threads=1)
    errors: list[float] = []
    for past, new in ((7, 5), (0, 6), (9, 1)):
        tensors, feeds = example(compiled, past, new)
        got, expected, seen = session.run(None, feeds), reference(compiled, tensors), visible(tensors)
        difference = np.linalg.norm((got[0] - expected[0])[seen], axis=-1)
        errors += list(difference / np.linalg.norm(expected[0][seen], axis=-1))
        assert [v.shape for v in got] == [v.shape for v in expected]  # the prefix takes no place in the cache
    assert np.mean(np.array(errors) < 1e-5) > 0.9  # float32 sums in another order; a code at a tie moves one token
    assert max(errors) < 0.1


@pytest.mark.parametrize("cache", ["float", "packed"])
def test_generation(prefixed, tmp_path, cache):
    compiled = prefixed("llama")
    path = export_onnx(compiled, tmp_path / "model", "ort", embedding="float32", kv_cache=cache)
    ids = tiny_tokens(2, 9, seed=12)
    expected = compiled.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = OnnxDecoder(path, threads=1).generate(ids.numpy(), max_new_tokens=8, eos_token_id=[])
    assert np.array_equal(got, expected.numpy())
