"""LongRoPE, as Phi-3.5 has it: short and long factors in one graph, saved, exported, and switched as transformers switches."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import resq_compiler
from resq_compiler import api
from resq_compiler.api import trace
from resq_compiler.errors import CaptureError, ResqError
from resq_compiler.frontend import capture as capture_module
from resq_compiler.frontend.capture import Captured, capture
from resq_compiler.frontend.long_rope import short_length
from resq_compiler.frontend.models import open_model
from resq_compiler.ir.graph_tools import aten, is_call, snapshot
from resq_compiler.tiny import tiny_model, tiny_tokens

SHORT = 24
FACTORS = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + i / 10 for i in range(8)],
    "long_factor": [2 + i / 3 for i in range(8)],
}  # fmt: skip
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
OPTIONS = {"calibration_samples": 4, "calibration_length": 32}


def long_rope_model():
    """Phi-3 that turns to its long factors at the 25th token."""
    return tiny_model(
        "phi3", max_position_embeddings=64, original_max_position_embeddings=SHORT, rope_parameters=FACTORS
    )


@pytest.fixture(scope="module")
def eager():
    return long_rope_model()


@pytest.fixture(scope="module", autouse=True)
def captured_once(eager):
    """torch.export takes most of a tiny compile."""
    first = capture(eager)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            api,
            "capture_promised",
            lambda skeleton, weights: Captured(snapshot(first.graph_module), first.cache, first.example_inputs),
        )
        yield first


@pytest.fixture(scope="module")
def exact(eager):
    return resq_compiler.compile(eager, None, weight_bits=16, activation_bits=16, kv_bits=16, recipe="rtn")


def test_an_instance_that_has_computed_is_captured(eager, captured_once):
    """transformers keeps its long frequencies beside the buffers then; this capture is the one that the others leave out."""
    with torch.no_grad():
        eager(tiny_tokens(1, 5))
    assert hasattr(eager.model.rotary_emb, "long_inv_freq")
    opened = open_model(eager)
    found = capture_module.capture_promised(opened.skeleton, opened.weights)
    targets = [[str(node.target) for node in one.graph_module.graph.nodes] for one in (found, captured_once)]
    assert targets[0] == targets[1]
    assert hasattr(eager.model.rotary_emb, "long_inv_freq")


@pytest.fixture(scope="module")
def quantized(eager):
    return resq_compiler.compile(eager, tiny_tokens(4, 32), weight_method="rtn", **OPTIONS)


def test_the_graph_writes_nothing(captured_once):
    graph = captured_once.graph_module.graph
    assert not any(is_call(node, aten.copy_.default) for node in graph.nodes)
    assert {str(n.target) for n in graph.find_nodes(op="get_attr") if "inv_freq" in str(n.target)} == {
        "model.rotary_emb.original_inv_freq"
    }


class Counting(nn.Module):
    """Adds to a buffer what it has seen so far: its outputs depend on the calls before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        y = x + self.seen
        self.seen.copy_(x.sum().reshape(1))
        return y


def test_a_buffer_that_is_read_before_it_is_written_is_refused():
    traced = torch.export.export(Counting(), (torch.ones(3),), strict=False).module(check_guards=False)
    with pytest.raises(
        CaptureError, match="reads the buffer seen before it is written, so the model keeps state"
    ) as raised:
        capture_module._read_what_is_written(traced.graph)
    assert raised.value.node


@pytest.mark.parametrize("length", [SHORT - 4, SHORT, SHORT + 1, 50])
def test_logits_equal_eager_on_both_sides(exact, eager, length):
    ids = tiny_tokens(2, length)
    with torch.no_grad():
        expected = eager(ids).logits
    assert (exact(ids).logits - expected).norm() <= 1e-5 * expected.norm()


def test_generation_across_the_switch_equals_eager(exact, eager):
    """The cache of short keys is computed again with the long factors."""
    ids = tiny_tokens(2, SHORT - 4)
    assert torch.equal(exact.generate(ids, **GREEDY), eager.generate(ids, **GREEDY))


def test_a_saved_model_is_the_same_on_both_sides(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "model")
    again = resq_compiler.load(tmp_path / "model")
    for length in (SHORT, SHORT + 9):
        assert torch.equal(again(tiny_tokens(2, length)).logits, quantized(tiny_tokens(2, length)).logits)
    ids = tiny_tokens(1, SHORT - 2)
    assert torch.equal(again.generate(ids, **GREEDY), quantized.generate(ids, **GREEDY))


def test_an_exported_directory_switches_too(exact, eager, tmp_path):
    """Prompts on both sides and one that grows across; chunks of a prompt would get the short factors first."""
    pytest.importorskip("onnxruntime")
    from resq_compiler.backends.onnx import runtime

    decoder = runtime.OnnxDecoder(exact.export_onnx(tmp_path / "onnx", "ort", embedding="float32"), threads=1)
    assert decoder.short_length == SHORT
    settings = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == SHORT
    assert settings["model"]["type"] == "decoder" and "chunk_size" not in settings["search"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "PREFILL_CHUNK", 8)
        for length in (SHORT - 3, SHORT + 7):
            ids = tiny_tokens(2, length, seed=length)
            expected = eager.generate(ids, **GREEDY)
            assert decoder.generate(ids.numpy(), max_new_tokens=10, eos_token_id=[]).tolist() == expected.tolist()


def test_what_cannot_be_exported_is_known_before_calibration(eager, monkeypatch):
    """What the plan prints, in a note of the compile, and at once where the backend is ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    from resq_compiler.backends.onnx import export_problem
    from resq_compiler.backends.onnx.registry import EMITTERS

    resq_compiler.compile(eager, recipe="rtn", backend="onnx")
    monkeypatch.delitem(EMITTERS, aten.max.default)
    with pytest.raises(ResqError, match=r"backend onnx: onnx: no ONNX form for 1 node\(s\): max_1"):
        resq_compiler.compile(eager, tiny_tokens(4, 32), backend="onnx", **OPTIONS)
    assert any("cannot be exported to ONNX" in note for note in resq_compiler.compile(eager, recipe="rtn").notes)
    graph, _ = trace(eager)
    assert "no ONNX form for 1 node(s): max_1" in export_problem(graph.graph)


@pytest.mark.parametrize(("config", "expected"), [
    ({"rope_parameters": FACTORS, "original_max_position_embeddings": 24}, 24), ({"rope_parameters": FACTORS}, None),
    ({"rope_parameters": {"rope_type": "default"}, "original_max_position_embeddings": 24}, None),
    ({}, None), ({"rope_parameters": None}, None),
])  # fmt: skip
def test_short_length(config, expected):
    assert short_length(config) == expected
