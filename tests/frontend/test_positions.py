"""Texts longer than a model's learned positions: shortened with a note, or one clear error, at every entry."""

from __future__ import annotations

import warnings

import pytest
import torch

import resq_compiler
from resq_compiler.cli import main
from resq_compiler.cli.commands import common
from resq_compiler.cli.commands import eval as eval_command
from resq_compiler.errors import BackendError, ConfigError, DataError
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.frontend.positions import longest_text, longest_text_of_graph
from resq_compiler.tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tests.families import compiled as compiled_family
from tests.families import small

LIMIT = 48


@pytest.fixture(scope="module")
def float_model():
    """OPT, whose table of positions has two rows more than positions."""
    return tiny_model("opt", max_position_embeddings=LIMIT)


@pytest.fixture(scope="module")
def compiled(float_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return resq_compiler.compile(
            float_model, tiny_tokens(4, LIMIT), recipe="resq", weight_method="rtn", calibration_samples=4, calibration_length=64,
            tokenizer=tiny_tokenizer(),
        )  # fmt: skip


@pytest.mark.parametrize(("name", "limit"), [
    ("gpt2", 256), ("gpt_neo", 256), ("gpt_bigcode", 256), ("biogpt", 256), ("gptj", 256), ("phi", None), ("falcon-alibi", None),
    ("bloom", None), ("mpt", 256),
])  # fmt: skip
def test_families(name, limit):
    assert longest_text(small(name)) == limit


def test_rotary_embeddings_have_no_end(tiny, captured):
    assert longest_text(tiny("llama")) is None and longest_text(lambda ids: ids) is None
    assert longest_text_of_graph(captured("llama").graph_module.graph, tiny("llama").config) is None


def test_calibration_windows_are_shortened_and_it_is_told(compiled, float_model):
    assert longest_text(float_model) == longest_text(compiled) == LIMIT
    assert compiled.sample_ids.shape == (1, LIMIT)
    assert f"calibration: windows of {LIMIT} tokens instead of 64: there are no more positions" in compiled.notes


def test_a_model_writes_no_longer_text_than_it_can(float_model):
    with pytest.raises(resq_compiler.ResqError, match="stop"):
        resq_compiler.compile(float_model, calibration_samples=1, calibration_length=64, on_stage=stop)


def stop(stage):
    """The calibration text is written by now."""
    raise resq_compiler.ResqError("stop")


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_forward_and_generate(compiled, backend):
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    compiled.use_backend(backend)
    try:
        assert compiled(tiny_tokens(1, LIMIT)).logits.isfinite().all()
        with pytest.raises(BackendError, match=f"position {LIMIT}: this model has learned {LIMIT} positions"):
            compiled(tiny_tokens(1, LIMIT + 1))
        with pytest.raises(BackendError, match=f"position {LIMIT}: this model has learned"):
            compiled.generate(tiny_tokens(1, LIMIT - 1), max_new_tokens=5, do_sample=False, eos_token_id=None)
    finally:
        compiled.use_backend("reference")


def test_an_exported_directory(compiled, tmp_path):
    pytest.importorskip("onnxruntime")
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    decoder = OnnxDecoder(compiled.export_onnx(tmp_path / "onnx", "ort"), threads=1)
    assert decoder.longest_text == LIMIT
    assert decoder.generate(tiny_tokens(1, LIMIT - 2).numpy(), max_new_tokens=3, eos_token_id=[]).shape == (
        1,
        LIMIT + 1,
    )
    with pytest.raises(BackendError, match=f"position {LIMIT}: this model has learned {LIMIT} positions"):
        decoder.generate(tiny_tokens(1, LIMIT - 2).numpy(), max_new_tokens=5, eos_token_id=[])
    assert main.main(["generate", str(tmp_path / "onnx"), "--prompt", "a" * 40, "--max-new-tokens", "9"]) == 2


def test_biases_of_a_table(tmp_path):
    """MPT's reach back over `max_seq_len` tokens, padding among them; in transformers longer rows end in shapes that do not fit."""
    pytest.importorskip("onnxruntime")
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    model = compiled_family("mpt")
    ids, padding = tiny_tokens(2, 257), torch.ones(2, 257, dtype=torch.long)
    padding[:, :3] = 0
    assert model.longest_text == 256 and model(ids[:, :256]).logits.isfinite().all()
    with pytest.raises(BackendError, match="position 256: this model has learned 256 positions"):
        model(ids)
    with pytest.raises(BackendError, match="a row of 257 tokens, padding among them: this model has biases for 256"):
        model(ids, attention_mask=padding)
    decoder = OnnxDecoder(model.export_onnx(tmp_path / "onnx", "ort"), threads=1)
    for mask in (None, padding.numpy()):
        with pytest.raises(BackendError, match="this model has .* 256"):
            decoder.generate(ids.numpy(), mask, max_new_tokens=1)
    assert decoder.generate(ids[:, :250].numpy(), max_new_tokens=2, eos_token_id=[]).shape == (2, 252)


def test_evaluation(compiled, float_model, capsys):
    with pytest.raises(DataError, match=f"windows of 49 tokens; the reference has learned {LIMIT} positions"):
        evaluate(lambda ids: None, tiny_tokens(2, LIMIT + 1), float_model)
    opened = common.OpenModel(compiled, None, "mine", True)
    assert eval_command.window_length(None, opened, None) == LIMIT
    assert f"note: windows of {LIMIT} tokens, not 2048: mine has learned no more positions" in capsys.readouterr().err
    assert eval_command.window_length(40, opened, opened) == 40
    with pytest.raises(ConfigError, match=f"--length 49: mine has learned {LIMIT} positions; give at most {LIMIT}"):
        eval_command.window_length(LIMIT + 1, None, opened)
    other = common.OpenModel(torch.nn.Identity(), None, "rotary", False)
    assert eval_command.window_length(None, other) == 2048


def test_the_command_line(compiled, tmp_path, capsys):
    """`resq eval` with its default length, and prompts that are too long."""
    compiled.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("one and two and three. " * 20)
    assert main.main(["eval", str(tmp_path / "model"), "--text", str(text), "--no-noise"]) == 0
    assert f"windows of {LIMIT} tokens" in capsys.readouterr().out
    assert main.main(["eval", str(tmp_path / "model"), "--text", str(text), "--length", "64"]) == 2
    assert main.main(["generate", str(tmp_path / "model"), "--prompt", "a" * 40, "--max-new-tokens", "9"]) == 2
    assert "40 tokens of prompt and 9 new ones, but the model has learned 48 positions" in capsys.readouterr().err
