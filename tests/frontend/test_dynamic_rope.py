"""rope_type "dynamic" (NTK scaling): in the graph, a function of the positions; what cannot be captured is said in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resq_compiler
from resq_compiler.errors import CaptureError
from resq_compiler.frontend import models
from resq_compiler.frontend.capture import capture, exportable_attention
from resq_compiler.tiny import tiny_model, tiny_tokens

LENGTH = 16
FACTORS = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def dynamic_model():
    return tiny_model("llama", max_position_embeddings=LENGTH, rope_parameters=FACTORS)


@pytest.fixture(scope="module")
def exact():
    return resq_compiler.compile(dynamic_model(), recipe="rtn", weight_bits=16, activation_bits=16, kv_bits=16)


@pytest.mark.parametrize("length", [LENGTH - 2, LENGTH, LENGTH + 1, 3 * LENGTH])
def test_logits_equal_eager(exact, length):
    ids = tiny_tokens(2, length)
    with torch.no_grad():
        expected = dynamic_model()(ids).logits
    assert (exact(ids).logits - expected).norm() <= 1e-5 * expected.norm()


def test_generation_past_the_length_of_training_equals_eager(exact):
    ids = tiny_tokens(2, LENGTH - 4)
    assert torch.equal(exact.generate(ids, **GREEDY), dynamic_model().generate(ids, **GREEDY))


def test_saved_and_exported(exact, tmp_path):
    exact.save_pretrained(tmp_path / "model")
    ids = tiny_tokens(2, LENGTH + 9)
    assert torch.equal(resq_compiler.load(tmp_path / "model")(ids).logits, exact(ids).logits)
    pytest.importorskip("onnxruntime")
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    decoder = OnnxDecoder(exact.export_onnx(tmp_path / "onnx", "ort", embedding="float32"), threads=1)
    ids = tiny_tokens(2, LENGTH - 4)
    assert (
        decoder.generate(ids.numpy(), max_new_tokens=8, eos_token_id=[]).tolist()
        == exact.generate(ids, **GREEDY).tolist()
    )


class Exiting(nn.Module):
    """Stops early when the first token is large."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


def test_control_flow_over_values_is_one_sentence(capfd):
    """No graph on stderr, and the place in the model's own code."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.act_fn = Exiting(model.model.layers[0].mlp.act_fn)
    with pytest.raises(
        CaptureError,
        match=r"reached forward in test_dynamic_rope.py, line \d+; a graph cannot have Python control flow",
    ):
        capture(model)
    assert capfd.readouterr().err == ""


def test_attention_that_is_not_installed():
    """A model set to it by hand, and a directory whose configuration names it; what the model is set to stays."""
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with exportable_attention(model):
        assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "flash_attention_2"
    models.check_model(model)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_that_names_attention_that_is_not_installed(tmp_path, key):
    tiny_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", f'{{"{key}": "flash_attention_2",', 1))
    assert models.load_model(tmp_path).model(tiny_tokens(1, 4)).logits.isfinite().all()
