"""saving.py: the same numbers after loading, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import resq_compiler
from resq_compiler.errors import CheckpointError, ModelError
from resq_compiler.storage import saving, tensor_files
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens

VARIANTS = {
    "llama": {},
    "gemma2": {"activation_bits": 16, "kv_bits": 16, "weight_method": "rtn"},
    "qwen2": {"weight_group_size": 32, "weight_method": "rtn"},
    "opt": {"low_fraction": 0.125, "lm_head_bits": 8, "weight_method": "rtn"},
}


def assert_same(model, again):
    """Bit for bit: logits, cache, generated tokens; and the same graph, facts and options."""
    ids, mask = tiny_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    ours, theirs = model(ids, mask), again(ids, mask)
    assert torch.equal(ours.logits, theirs.logits)
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    generate = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **generate), again.generate(ids, **generate))
    assert again.options == model.options and again.config.to_dict() == model.config.to_dict()
    assert again.notes == model.notes and again.generation_config == model.generation_config
    assert [n.format_node() for n in again.graph_module.graph.nodes] == [
        n.format_node() for n in model.graph_module.graph.nodes
    ]


@pytest.mark.parametrize("family", VARIANTS)
def test_round_trip_is_bit_identical(compiled, family, tmp_path):
    model = compiled(family, **VARIANTS[family])
    model.save_pretrained(tmp_path / "model")
    assert_same(model, resq_compiler.load(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"recipe": "quarot"}, {"recipe": "quik"}, {"recipe": "rtn", "weight_bits": 3},
                                     {"down_proj": "energy-split", "low_fraction": 0.125}])  # fmt: skip
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_bit_identical(compiled, family, options, tmp_path):
    model = compiled(family, **{"weight_method": "rtn", **options})
    model.save_pretrained(tmp_path / "model")
    assert_same(model, resq_compiler.load(tmp_path / "model"))


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    resq_compiler.load(saved).save_pretrained(tmp_path / "again")
    for file in sorted(saved.iterdir()):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_codes_are_packed_and_scales_are_float32(saved):
    tensors = load_file(saved / "model.safetensors")
    down = "model.layers.0.mlp.down_proj.part0"
    assert tensors[f"{down}.qdata"].dtype == torch.uint8 and tensors[f"{down}.qdata"].shape == (64, 80)  # 160 codes
    assert tensors[f"{down}.scale"].dtype == torch.float32
    assert tensors["model.layers.0.mlp.up_proj.part1.qdata"].dtype == torch.int8  # 8 bits


def test_all_files_have_the_same_permissions(saved):
    assert len({file.stat().st_mode for file in saved.iterdir()}) == 1


def test_shards(compiled, tmp_path):
    model = compiled("llama", **VARIANTS["llama"])
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert_same(model, resq_compiler.load(tmp_path / "model"))
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002.* is missing"):
        resq_compiler.load(tmp_path / "model")


def test_shared_tensors_are_stored_once(compiled, tmp_path):
    model = compiled("llama", recipe="rtn", weight_bits=16, activation_bits=16, kv_bits=16)
    gm = model.graph_module
    info = tensor_files.describe(gm)
    shared = [name for name, fields in info.items() if "same_as" in fields]
    tensor_files.write(gm, info, tmp_path, "5GB")
    stored, again = load_file(tmp_path / "model.safetensors"), tensor_files.read(tmp_path, info)
    assert set(stored) == set(info) - set(shared) and set(again) == set(info)
    assert all(torch.equal(again[name], gm.get_buffer(name)) for name in info)


def test_tokenizer_is_kept(compiled, tmp_path):
    model = compiled("llama", **VARIANTS["llama"])
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        model.tokenizer = None
    again = resq_compiler.load(tmp_path / "model")
    assert again.tokenizer("a b c").input_ids == [1, 2, 0]
    run_without_resq(tmp_path / "model")


def run_without_resq(directory):
    """Plain transformers opens the tokenizer and refuses the model; it must not make up weights."""
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
assert AutoTokenizer.from_pretrained({str(directory)!r})("b a").input_ids == [2, 1]
try:
    AutoModelForCausalLM.from_pretrained({str(directory)!r})
except ValueError as error:
    assert "resq_compiled" in str(error), error
else:
    raise SystemExit("a model was made up")
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_auto_classes_open_it(saved, compiled):
    again = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", device_map="cpu")
    assert_same(compiled("llama", **VARIANTS["llama"]), again)
    assert AutoConfig.from_pretrained(saved).quantization_config["quant_method"] == "resq"
    with pytest.raises(ModelError, match="resq_compiler.load"):
        resq_compiler.compile(saved, tiny_tokens(1, 8))
    with pytest.raises(ModelError, match="already compiled"):
        resq_compiler.compile(again, tiny_tokens(1, 8))


def test_quantization_config(saved):
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == "1.1" and config["scheme"] == "W4A4KV4"
    groups = config["transform_config"]["config_groups"]
    assert {name: group["online"] for name, group in groups.items()} == {
        "U_A": False, "U_B": False, "U_C": True, "U_D": True,
    }  # fmt: skip
    places = {p["location"] for group in groups.values() for p in group["apply"]}
    assert places == {"weight_input", "weight_output", "q_attn", "k_cache", "input"}


def test_recipe_reproduces_the_options(saved, compiled):
    import yaml

    options = yaml.safe_load((saved / "resq_recipe.yaml").read_text())
    assert resq_compiler.CompileConfig.from_dict(options) == compiled("llama", **VARIANTS["llama"]).options


def tree(directory):
    return {p.relative_to(directory): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


@pytest.mark.parametrize("broken", ["tensor_files.write", "serialize.to_text", "quantization_config.build"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
)
def test_failed_save_changes_nothing(compiled, copied, monkeypatch, broken, error):
    before = tree(copied.parent)

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(f"resq_compiler.storage.saving.{broken}", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    for target in (copied, copied.parent / "new"):
        with pytest.raises(expected):
            saving.save(compiled("llama", **VARIANTS["llama"]).result, target)
        assert tree(copied.parent) == before


def test_full_disk_in_the_middle_of_a_tensor_file(compiled, tmp_path, monkeypatch):
    def half(like, path, make, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", half)
    with pytest.raises(CheckpointError, match="No space left.*nothing was changed"):
        compiled("llama", **VARIANTS["llama"]).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_failed_replacement_brings_the_former_back(compiled, copied, monkeypatch):
    before, rename, failed = tree(copied.parent), os.rename, []

    def fail(source, destination):
        if Path(destination) == copied / "config.json" and not failed:
            failed.append(destination)
            raise OSError(errno.EIO, "input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="input/output"):
        saving.save(compiled("llama", **VARIANTS["llama"]).result, copied)
    monkeypatch.undo()
    assert tree(copied.parent) == before


def test_replacement_leaves_what_is_not_its_own(compiled, copied):
    (copied / "onnx").mkdir()
    (copied / "onnx" / "model.onnx").write_text("mine")
    (copied / "model-old.safetensors").write_text("mine")
    model = compiled("opt", **VARIANTS["opt"])
    model.save_pretrained(copied)
    assert (copied / "onnx" / "model.onnx").read_text() == (copied / "model-old.safetensors").read_text() == "mine"
    assert_same(model, resq_compiler.load(copied))
    assert [p.name for p in copied.parent.iterdir()] == ["copy"]


def test_other_contents_are_not_replaced(compiled, tmp_path):
    model = compiled("llama", **VARIANTS["llama"])
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="this is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="another directory"):
        model.save_pretrained(tmp_path / "folder")
    assert tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    resq_compiler.load(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(compiled, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            compiled("llama", **VARIANTS["llama"]).save_pretrained(tmp_path / "model")
    finally:
        tmp_path.chmod(0o700)


def test_options_that_mean_nothing_are_refused(saved, compiled, tmp_path):
    from resq_compiler.errors import BackendError

    with pytest.raises(BackendError, match="push_to_hub"):
        compiled("llama", **VARIANTS["llama"]).save_pretrained(tmp_path / "x", push_to_hub=True)
    with pytest.raises(BackendError, match="dtype"):
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float16)


def test_a_directory_that_cannot_be_renamed(compiled, copied, monkeypatch):
    """A volume of a container: it is written to from within, and is the working directory besides."""
    rename = os.rename

    def busy(source, destination):
        if str(copied) in (str(source), str(destination)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.chdir(copied)
    model = compiled("opt", **VARIANTS["opt"])
    model.save_pretrained(".")
    assert os.getcwd() == str(copied)
    assert_same(model, resq_compiler.load("."))
    assert not list(copied.glob(".resq-*"))
