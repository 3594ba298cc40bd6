"""Opened models: every weight is promised, and its value is what transformers reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from resq_compiler.errors import ModelError
from resq_compiler.frontend import models, opened
from resq_compiler.frontend.models import load_model, open_model
from resq_compiler.ir.promises import Stacked
from resq_compiler.tiny import tiny_model
from tests.families import MIXTURES, MORE_MIXTURES, small
from tests.gguf_files import small_llama

STACKED = ("granitemoe", "gpt_oss", "aria_text", "flint", "gemma4_text-experts", "granitemoe_swa", "granitemoeshared")
"""Families whose checkpoints have the experts of a layer in one tensor."""


def assert_opened_as_read_whole(source):
    """Open a model that nobody reads whole, and compare it with the one that transformers reads."""
    expected = load_model(source).model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_read", lambda *_: pytest.fail("the model was read whole"))
        found = open_model(source)
        assert_as_read(found, expected)
    return found


def assert_as_read(found, model):
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert found.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found.weights[name].whole(), value.float()), name
        if value.dim() == 2:
            some = torch.tensor([len(value) - 1, 0])
            assert torch.equal(found.weights[name].rows(some), value.float()[some]), name
    buffers = dict(found.skeleton.named_buffers(remove_duplicate=False))
    assert all(torch.equal(buffers[name], b.float()) for name, b in model.named_buffers(remove_duplicate=False))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "gemma2", "opt", "phi3"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, "20KB"), (torch.float32, "1GB")], ids=["shards", "file"])
def test_directories(family, dtype, size, tmp_path):
    tiny_model(family).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    assert_opened_as_read_whole(tmp_path)


@pytest.mark.parametrize("family", (*MIXTURES, *MORE_MIXTURES))
def test_experts_that_lie_one_by_one(family, tmp_path):
    """A tensor for each expert, as checkpoints are published; transformers stacks them."""
    model = small(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    opened = assert_opened_as_read_whole(tmp_path)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    one_by_one = any(".experts.3." in name for name in files)
    assert one_by_one == any(isinstance(weight, Stacked) for weight in opened.weights.values())
    assert one_by_one == (family not in STACKED)


def test_an_expert_that_lacks_a_projection(tmp_path):
    """transformers is asked, which says what is missing."""
    small("qwen2_moe").save_pretrained(tmp_path)
    values, lost = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.experts.2.up_proj.weight"
    assert values.pop(lost).shape == (32, 64)
    save_file(values, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="transformers could not load the weights"):
        open_model(tmp_path)


@pytest.mark.parametrize("size", ["20KB", "1GB"])
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_bin_files(family, size, tmp_path):
    model = tiny_model(family).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if size == "1GB":
        torch.save(values, tmp_path / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(values)}
        for file in set(files.values()):
            torch.save({name: values[name] for name in values if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert_opened_as_read_whole(tmp_path)


def test_a_bin_file_that_is_cut_off(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="transformers could not load the weights.*downloaded again"):
        open_model(tmp_path)


def test_a_hub_id(tmp_path, monkeypatch):
    """Its files are opened where the cache has them."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(models, "_load_tokenizer", lambda location: None)
    monkeypatch.setattr(models, "check_hub", lambda name: None)
    monkeypatch.setattr(models, "_read_config", lambda location: model.config)
    monkeypatch.setattr(models, "_read", lambda *_: pytest.fail("the model was read whole"))
    monkeypatch.setattr(models, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    opened = open_model("someone/tiny")
    assert (opened.source.kind, opened.source.name) == ("hub", "someone/tiny")
    assert_as_read(opened, model)


def test_gguf(tmp_path):
    assert_opened_as_read_whole(small_llama(tmp_path / "model.gguf"))


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


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("shape", [(1, 64), (7, 32), (48, 96), (1024, 32), (16, 4096), (96,)])
def test_numbers_of_a_gguf_tensor_are_those_that_gguf_makes(kind, shape):
    """Some rows are handed to it as one, which changes no block of numbers."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = gguf.quantize(values, kind).view(np.uint8)  # bytes, as they lie in a file
    found = opened._dequantized(stored, kind)
    assert found.shape == shape and np.array_equal(found, gguf.dequantize(stored, kind))
