"""Checkpoints that see or hear too: their language model is compiled, and the user is told what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma4Config

import resq_compiler
from resq_compiler import tiny as tiny_module
from resq_compiler.cli.main import main
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from tests.families import EIGHT, EXACT, FLOAT, GEMMA_4_LAYERS

TEXT = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGES = {"mm_tokens_per_image": 4, "boi_token_index": 120, "eoi_token_index": 121, "image_token_index": 122}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Gemma 3 with a vision tower, as its checkpoints from 4 billion parameters on are."""
    with torch.random.fork_rng():
        model = (
            AutoModelForCausalLM.from_config(Gemma3Config(text_config=TEXT, vision_config=VISION, **IMAGES))
            .float()
            .eval()
        )
    tiny_module._fill(model, seed=0)
    path = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(path)
    return path, model


def test_the_language_model_is_compiled_and_the_rest_named(checkpoint):
    path, model = checkpoint
    exact = resq_compiler.compile(path, tiny_tokens(4, 32), calibration_samples=4, calibration_length=32, **FLOAT)
    ids = tiny_tokens(2, 20, seed=5)
    with torch.no_grad():
        assert relative_error(exact(ids).logits, model(input_ids=ids).logits) <= EXACT
    left = [note for note in exact.notes if note.startswith("left out: ")]
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert left == [
        f"left out: model.{name} ({weights[name]:,} weights), which text does not reach; the compiled model takes text alone"
        for name in ("vision_tower", "multi_modal_projector")
    ]


def test_its_export_knows_what_the_text_part_says(checkpoint, tmp_path, capsys):
    """Vocabulary and ends of text stand in a part of the configuration."""
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    compiled = resq_compiler.compile(checkpoint[0], tiny_tokens(4, 32), **EIGHT)
    compiled.export_onnx(tmp_path / "ort", profile="ort")
    decoder = OnnxDecoder(tmp_path / "ort", threads=1)
    assert decoder.settings["vocab_size"] == 131
    prompt = tiny_tokens(1, 8, seed=3)
    expected = compiled.generate(prompt, max_new_tokens=6, do_sample=False)
    assert np.array_equal(decoder.generate(prompt.numpy(), max_new_tokens=6), expected.numpy())
    assert main(["bench", str(tmp_path / "ort"), "--prompt", "8", "-n", "2", "--rounds", "1", "--threads", "1"]) == 0
    assert "decode tokens/s" in capsys.readouterr().out


def test_gemma_4_with_embeddings_of_each_layer(tmp_path):
    """As its small checkpoints are: bfloat16 in several files, both lookups behind a choice between tokens and padding; and exported."""
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    tokens = {
        "image_token_id": 122,
        "video_token_id": 123,
        "audio_token_id": 124,
        "boi_token_id": 120,
        "eoi_token_id": 121,
    }
    config = Gemma4Config(text_config={**TEXT, **GEMMA_4_LAYERS}, vision_config=vision, audio_config=None, **tokens)
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config).float().eval()
    tiny_module._fill(model, seed=0)
    model.bfloat16().save_pretrained(tmp_path / "gemma4", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma4", dtype=torch.float32).eval()
    assert len(list((tmp_path / "gemma4").glob("*.safetensors"))) > 3
    ids = tiny_tokens(2, 20, seed=5) % 100  # none of the tokens that stand for images
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    settings = {"calibration_samples": 4, "calibration_length": 32}
    exact = resq_compiler.compile(tmp_path / "gemma4", tiny_tokens(4, 32), **settings, **FLOAT)
    assert relative_error(exact(ids).logits, expected) <= EXACT
    compiled = resq_compiler.compile(tmp_path / "gemma4", tiny_tokens(4, 32), **settings)
    compiled.save_pretrained(tmp_path / "saved")
    loaded = resq_compiler.load(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, compiled(ids).logits)
    compiled.export_onnx(tmp_path / "ort", profile="ort", embedding="int8")
    assert not (tmp_path / "ort" / "genai_config.json").exists()  # heads of two widths
    found = OnnxDecoder(tmp_path / "ort", threads=1).generate(ids[:1].numpy(), max_new_tokens=4)
    assert found.shape == (1, 24)
