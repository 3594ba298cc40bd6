"""Opened models: every weight is promised, and its value is what transformers reads."""

from __future__ import annotations

import json

import pytest
import torch

from resq_compiler.errors import ModelError
from resq_compiler.frontend import models
from resq_compiler.frontend.models import load_model, open_model
from resq_compiler.tiny import tiny_model
from tests.gguf_files import small_llama


def compared(source):
    """Open a model that nobody reads whole, and compare it with the one that transformers reads."""
    expected = load_model(source).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_read", lambda *_: pytest.fail("the model was read whole"))
        assert_as_read(open_model(source), expected)


def assert_as_read(opened, model):
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert opened.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(opened.weights[name].whole(), value.float()), name
    buffers = dict(opened.skeleton.named_buffers(remove_duplicate=False))
    assert all(torch.equal(buffers[name], b.float()) for name, b in model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "gemma2", "opt", "phi3"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, "20KB"), (torch.float32, "1GB")], ids=["shards", "file"])
def test_directories(family, dtype, size, tmp_path):
    tiny_model(family).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    compared(tmp_path)


def test_gguf(tmp_path):
    compared(small_llama(tmp_path / "model.gguf"))


def test_a_missing_and_a_cut_shard(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-10])
    with pytest.raises(ModelError, match=rf"{files[1].name}: not readable.*cut off: download it again"):
        open_model(tmp_path)
    files[1].unlink()
    with pytest.raises(ModelError, match=rf"1 are not there, the first is {files[1].name}; download"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"map": {}}))
    with pytest.raises(ModelError, match=r"index.json is not readable"):
        open_model(tmp_path)
