"""Mixtures of experts in standard operators, and on the CPU kernels: the logits of the reference backend, whatever the bits are."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import build_model, export_onnx
from resq_compiler.backends.onnx.chain import unchained

import resq_compiler
from resq_compiler import load
from resq_compiler.errors import BackendError
from resq_compiler.ir import promises
from resq_compiler.tiny import tiny_tokens
from tests.families import EIGHT, ONE_CODE, ROUNDING, native_errors, onnx_errors, small

PLAIN = {**EIGHT, "recipe": "rtn"}
OPTIONS = {
    "gpt_oss": {**EIGHT, "recipe": "resq"},  # biases of experts, attention with sinks
    "mixtral": {**PLAIN, "weight_group_size": 32, "weight_bits": 4},
    "qwen3_moe": {**PLAIN, "activation_bits": 16, "weight_bits": 5},
    "olmoe": {**PLAIN, "activation_bits": 16, "weight_bits": 16, "kv_bits": 4},
}


@pytest.fixture(scope="module", params=OPTIONS)
def compiled(request):
    return resq_compiler.compile(small(request.param), tiny_tokens(4, 32), **OPTIONS[request.param])


@pytest.mark.parametrize("profile", ["ort", "qdq", "weight-only"])
def test_logits(compiled, profile):
    """Two rows with padding, prefill and decode, tokens that share experts and that do not."""
    errors = onnx_errors(compiled, profile)
    assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE


def test_experts_are_written_one_at_a_time(compiled, tmp_path):
    """Of a saved model, whose tensors are promised or lie in its file; the same graph."""
    compiled.save_pretrained(tmp_path / "saved")
    result = load(tmp_path / "saved").result
    sizes = [tensor.nbytes for tensor in result.graph_module.buffers()]
    promises.ledger.reset()
    before = promises.ledger.held
    model = build_model(result, "ort")
    assert promises.ledger.most - before <= max(sizes) / 2
    assert model.graph.SerializeToString() == build_model(compiled, "ort").graph.SerializeToString()


def test_one_loop_for_all_linears_of_one_input(compiled):
    """Gate and up in one, down in another; weights lie outside, once."""
    model = build_model(compiled, "ort")
    onnx.checker.check_model(model)
    loops = [node for node in model.graph.node if node.op_type == "Loop"]
    assert len(loops) == 2 * 2
    assert not any(attribute.g.initializer for loop in loops for attribute in loop.attribute)


def test_on_the_cpu_kernels(compiled, library, monkeypatch):
    """All of a mixture but its router is one node; what no kernel takes is refused."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(libraries, "unavailable", lambda: None)
    if compiled.options.recipe != "resq" and compiled.options.weight_bits < 16:
        with pytest.raises(
            BackendError, match="16-bit activations|float weights|a scale for every 32 columns"
        ) as refused:
            compiled.use_backend("cpu")
        assert "expert" not in str(refused.value)
        return
    kinds = Counter(node.op_type for node in unchained(build_model(compiled, "native").graph.node))
    assert kinds["Experts"] == (2 if compiled.options.weight_bits < 16 else 0) and (kinds["Loop"] > 0) == (
        kinds["Experts"] == 0
    )
    try:
        errors = native_errors(compiled)
    finally:
        compiled.use_backend("reference")
    assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE


def test_in_onnxruntime_genai(library, monkeypatch, tmp_path):
    """Unmodified: the library lies beside the model, the router is part of the graph."""
    pytest.importorskip("onnxruntime_genai")
    from tests.backends.onnx.test_export import by_genai

    monkeypatch.setattr(libraries, "library", lambda: library)
    options = {"calibration_samples": 8, "calibration_length": 32, "weight_method": "rtn", "unreached_experts": "layer"}
    compiled = resq_compiler.compile(small("qwen3_moe"), tiny_tokens(8, 32), recipe="resq", **options)
    path = export_onnx(compiled, tmp_path / "model", "native", embedding="float32")
    ids = tiny_tokens(1, 9, seed=12)
    expected = compiled.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = by_genai(path, ids.numpy(), 8)
    assert len(got) > 9 and got.tolist() == expected[0, : len(got)].tolist()
