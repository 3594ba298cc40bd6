"""reading.py: clear errors for what is not a whole saved model, and hub ids."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import resq_compiler
from resq_compiler.errors import CheckpointError
from resq_compiler.evaluation.by_blocks import ByBlocks
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.ir import promises
from resq_compiler.ir.promises import Promised
from resq_compiler.model import CompiledModel
from resq_compiler.storage import reading, tensor_files
from resq_compiler.tiny import tiny_model, tiny_tokens
from resq_compiler.util import memory


def change_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


SCALE = "model.layers.1.mlp.up_proj.part0.scale"
CODES = "model.layers.1.mlp.up_proj.part0.qdata"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def in_graph(change):
    return lambda d: change_json(d / "resq_graph.json", change)


def in_config(change):
    return lambda d: change_json(d / "config.json", change)


def in_tensors(change):
    return lambda d: change_tensors(d / "model.safetensors", change)


def version(text):
    return in_config(lambda c: c["quantization_config"].update(format_version=text))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda d: (d / "resq_graph.json").unlink(), "resq_graph.json is missing"),
    (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    (lambda d: (d / "generation_config.json").unlink(), "generation_config.json is missing"),
    (lambda d: truncate(d / "model.safetensors"), "model.safetensors: not readable"),
    (lambda d: truncate(d / "resq_graph.json"), "not readable as JSON"),
    (lambda d: (d / "config.json").write_text("[1]"), "expected a JSON object"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "not readable as JSON"),
    (in_tensors(lambda t: t.pop(SCALE)), f"tensor {SCALE}, which is missing"),
    (in_tensors(lambda t: t.update({SCALE: t[SCALE][:3].clone()})), rf"{SCALE} should be float32 \[160\] and is float32 \[3\]"),
    (in_tensors(lambda t: t.update({SCALE: t[SCALE].half()})), "and is float16"),
    (in_tensors(lambda t: t.update({CODES: t[CODES].view(torch.int8)})), "should be uint8"),
    (in_graph(lambda g: g["nodes"][0].update(target="somewhere.else")), "somewhere.else"),
    (in_graph(lambda g: g["nodes"][-5].update(target="os.system")), "unknown operator"),
    (in_graph(lambda g: g.pop("cache")), "malformed"),
    (in_graph(lambda g: g["nodes"][0]["tensor"].pop("shape")), "malformed"),
    (version("2.0"), "format version 2.0.*upgrade"),
    (version("x"), "format version x"),
    (in_config(lambda c: c["quantization_config"]["options"].update(colour=1)), "colour"),
    (in_config(lambda c: c.pop("source_config")), "malformed"),
    (in_config(lambda c: c["source_config"].update(attention_bias=None)), "source_config in config.json cannot be read.*attention_bias"),
    (in_config(lambda c: c["quantization_config"].update(quant_method="awq")), "not compiled by resq .quantized by awq"),
])  # fmt: skip
def test_damage_is_named(copied, damage, message):
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        resq_compiler.load(copied)


def test_newer_minor_version_is_read(copied):
    expected = resq_compiler.load(copied)
    version("1.7")(copied)
    ids = torch.arange(6)[None]
    assert torch.equal(resq_compiler.load(copied)(ids).logits, expected(ids).logits)


def test_foreign_directories(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="not compiled by resq .a float model.*resq_compiler.compile"):
        resq_compiler.load(tmp_path / "float")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="config.json is missing"):
        resq_compiler.load(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such directory"):
        resq_compiler.load(tmp_path / "nothing")


def test_hub_id_that_cannot_be_reached(monkeypatch):
    def fail(name):
        raise OSError(f"offline: {name}")

    monkeypatch.setattr(reading, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="not downloaded.*offline: someone/model"):
        resq_compiler.load("someone/model")


def test_hub_id(monkeypatch, saved, tmp_path):
    asked = []
    monkeypatch.setattr(
        reading, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(saved)
    )
    assert resq_compiler.load("someone/model").options.scheme == "W4A4KV4"
    options = {"revision": "v2", "cache_dir": tmp_path, "local_files_only": True}
    model = CompiledModel.from_pretrained("someone/model", torch_dtype="auto", **options)
    assert model.options.scheme == "W4A4KV4"
    assert asked == [("someone/model", {}), ("someone/model", options)]


def test_a_model_type_that_transformers_does_not_know(copied):
    """A class of the user's own: its configuration comes back as plain values."""
    expected = resq_compiler.load(copied)
    in_config(lambda c: c["source_config"].update(model_type="my-llama"))(copied)
    again = resq_compiler.load(copied)
    assert again.config.model_type == "my-llama"
    ours, theirs = again.config.to_dict(), expected.config.to_dict()
    assert {key for key in theirs if ours.get(key) != theirs[key]} <= {"model_type", "use_cache"}
    ids = torch.arange(6)[None]
    assert torch.equal(again.generate(ids, max_new_tokens=3), expected.generate(ids, max_new_tokens=3))


def test_nothing_is_read_before_something_computes(saved, compiled):
    promises.ledger.reset()
    opened = resq_compiler.load(saved)
    tensors = dict(opened.graph_module.named_buffers())
    packed = {
        name for name, fields in tensor_files.describe(compiled("llama").graph_module).items() if "bits" in fields
    }
    assert packed and {name for name, value in tensors.items() if isinstance(value, Promised)} == packed
    assert all(memory.lies_in_a_file(value) for name, value in tensors.items() if name not in packed)
    assert promises.ledger.made == 0
    ids = tiny_tokens(2, 9)
    assert torch.equal(opened(ids).logits, compiled("llama")(ids).logits)
    assert promises.ledger.made == len(packed)
    opened(ids)
    assert promises.ledger.made == len(packed)  # codes stay, once they are there


def test_a_model_that_was_not_run_is_saved_again(saved, tmp_path):
    resq_compiler.load(saved).save_pretrained(tmp_path / "again")
    files = [(where / "model.safetensors").read_bytes() for where in (saved, tmp_path / "again")]
    assert files[0] == files[1]


def test_blocks_of_an_opened_model_are_read_one_at_a_time(saved, compiled):
    opened, windows = resq_compiler.load(saved), tiny_tokens(3, 24)
    promises.ledger.reset()
    found = evaluate(ByBlocks(opened.graph_module, opened), windows)
    codes = sum(t.nbytes for t in opened.graph_module.buffers() if isinstance(t, Promised))
    assert found.nll == evaluate(compiled("llama"), windows).nll
    assert promises.ledger.most <= codes / 2 + max(t.nbytes for t in opened.graph_module.buffers())
