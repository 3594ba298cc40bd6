"""source_files.py and load_model: adapters, Git LFS, damaged files, weights left over, scaled rotary positions in GGUF files."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from resq_compiler.cli.commands import common
from resq_compiler.errors import ModelError
from resq_compiler.frontend import source_files
from resq_compiler.frontend.models import load_model
from resq_compiler.tiny import tiny_model, tiny_tokens
from tests.gguf_files import small_llama

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n"


@pytest.fixture
def directory(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def edit_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_a_pointer_of_git_lfs_is_named(directory, name):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(POINTER)
    with pytest.raises(ModelError, match=f"{name}: is a pointer of Git LFS.*git lfs pull"):
        load_model(directory / name if name.endswith("gguf") else directory)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_cut_off(directory, name):
    whole = (directory / "model.safetensors").read_bytes()
    if name == "pytorch_model.bin":
        torch.save(tiny_model("llama").state_dict(), directory / name)
        (directory / "model.safetensors").unlink()
        whole = (directory / name).read_bytes()
    for length in (0, 5, len(whole) // 2):
        (directory / name).write_bytes(whole[:length])
        with pytest.raises(ModelError, match="could not load the weights: .*cut off is downloaded again"):
            load_model(directory)


def test_weights_that_the_configuration_has_no_place_for(directory, caplog):
    edit_config(directory, num_hidden_layers=1)
    with pytest.raises(
        ModelError, match=r"holds 9 weights .* model\.layers\.1\.input_layernorm.*accept_unused_weights"
    ):
        load_model(directory)
    model = load_model(directory, accept_unused_weights=True).model
    assert len(model.model.layers) == 1 and "9 weights" in caplog.text and "left out" in caplog.text


def test_biases_that_the_configuration_leaves_out(tmp_path):
    config = LlamaConfig(**{**tiny_model("llama").config.to_dict(), "mlp_bias": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    edit_config(tmp_path, mlp_bias=False)
    with pytest.raises(ModelError, match=r"holds 6 weights .*mlp\.down_proj\.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize("base", [True, False], ids=["beside the base", "alone"])
def test_an_adapter_is_to_be_merged_first(directory, base):
    (directory / "adapter_config.json").write_text("{}")
    if not base:
        (directory / "config.json").unlink()
    with pytest.raises(ModelError, match="holds an adapter .*merge_and_unload"):
        load_model(directory)


def test_models_that_carry_an_adapter():
    class PeftModelForCausalLM(torch.nn.Module):
        def merge_and_unload(self):
            """As peft's."""

    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    for carrying in (PeftModelForCausalLM(), model):
        with pytest.raises(ModelError, match="carries an adapter .*merge_and_unload"):
            load_model(carrying)


@pytest.fixture
def gguf_file(tmp_path):
    """(**keys, factors=None) -> a GGUF file of a small llama, with more keys and rope_freqs.weight where asked."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    return functools.partial(small_llama, tmp_path / "model.gguf")


def frequencies(path):
    return load_model(path).model.model.rotary_emb.inv_freq


def test_rotary_scaling_of_gguf_files_is_applied(gguf_file):
    plain = frequencies(gguf_file())
    assert torch.equal(
        plain, AutoModelForCausalLM.from_config(load_model(gguf_file()).model.config).model.rotary_emb.inv_freq
    )
    factors = [1.0, 1.0, 4.0, 8.0]
    assert torch.equal(frequencies(gguf_file({"rope_freqs.weight": factors})), plain / torch.tensor(factors))
    linear = gguf_file(llama__rope__scaling__type="linear", llama__rope__scaling__factor=2.0)
    assert torch.equal(frequencies(linear), plain / 2)
    scaled, ids = load_model(gguf_file({"rope_freqs.weight": factors})).model, tiny_tokens(1, 9) % 16
    with torch.no_grad():
        assert not torch.equal(scaled(ids).logits, load_model(gguf_file()).model(ids).logits)


def test_other_rotary_scaling_of_gguf_files_is_refused(gguf_file):
    with pytest.raises(ModelError, match="rope.scaling.type = yarn.*original safetensors"):
        load_model(gguf_file(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0))
    with pytest.raises(ModelError, match="has rope_factors_long.weight"):
        load_model(gguf_file({"rope_factors_long.weight": [1.0] * 4}))
    with pytest.raises(ModelError, match="scaled by 3 factors that do not fit"):
        load_model(gguf_file({"rope_freqs.weight": [1.0, 2.0, 3.0]}))


def test_a_gguf_file_that_was_cut_off(gguf_file):
    path = gguf_file()
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.gguf"):
            load_model(path)


def test_plain_directories_pass(directory):
    source_files.check_directory(directory)


def test_an_adapter_in_a_repository_is_noticed_before_the_download(monkeypatch, tmp_path):
    """By load_model and by what reads the configuration alone; a repository without one goes on to its configuration."""
    asked = []

    def find(name):
        asked.append(name)
        return str(tmp_path / "adapter_config.json") if name == "someone/adapter" else None

    monkeypatch.setattr("transformers.utils.peft_utils.find_adapter_config_file", find)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda name, **options: pytest.fail("read"))
    for load in (load_model, common.meta_model):
        with pytest.raises(
            ModelError, match="model someone/adapter: the repository holds an adapter .*merge_and_unload"
        ):
            load("someone/adapter")
        with pytest.raises(pytest.fail.Exception):
            load("someone/model")
    assert asked == ["someone/adapter", "someone/model"] * 2


def test_a_configuration_beside_an_adapter(directory):
    (directory / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        common.meta_model(str(directory))
