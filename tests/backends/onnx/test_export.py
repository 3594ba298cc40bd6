"""The exported directory: complete, small, honest about failures; runs in our runtime and in onnxruntime-genai."""

from __future__ import annotations

import importlib.metadata
import json
import os
import stat
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from resq_compiler.backends.onnx import build_model, export, export_onnx
from resq_compiler.backends.onnx.genai import genai_config
from resq_compiler.backends.onnx.runtime import OnnxDecoder, Sampling
from resq_compiler.backends.onnx.session import open_session
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.views import Embedding
from resq_compiler.tiny import tiny_tokens
from tests.backends.onnx.conftest import example, relative, visible


@pytest.fixture(scope="module")
def compiled(compile_tiny):
    return compile_tiny("llama", weight_method="rtn", lm_head_bits=8)[0]


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(131)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    )


@pytest.fixture(scope="module")
def directory(compiled, tokenizer, tmp_path_factory):
    return export_onnx(
        compiled, tmp_path_factory.mktemp("exported") / "model", "ort", embedding="float32", tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def decoder(directory):
    return OnnxDecoder(directory, threads=1)


def greedy(compiled, ids, mask=None, new=12):
    """transformers' own greedy search over the reference backend."""
    ids = torch.as_tensor(ids)
    mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
    return compiled.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    ).numpy()


def test_directory_is_complete(directory):
    names = {p.name for p in directory.iterdir()}
    assert {"model.onnx", "config.json", "generation_config.json", "genai_config.json", "tokenizer.json"} <= names
    properties = {p.key: p.value for p in onnx.load(directory / "model.onnx").metadata_props}
    assert properties["resq.profile"] == "ort" and json.loads(properties["resq.options"])["weight_bits"] == 4
    assert oct(directory.stat().st_mode)[-3:] == "755"


def test_names_are_those_of_optimum_and_genai(directory):
    graph = onnx.load(directory / "model.onnx").graph
    assert [i.name for i in graph.input][:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [o.name for o in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert [d.dim_param or d.dim_value for d in graph.input[3].type.tensor_type.shape.dim] == ["batch", 2, "past", 16]


@pytest.mark.parametrize("profile", ["ort", "qdq", "weight-only"])
def test_four_bits_on_disk(compiled, profile):
    """Codes, scales, correction rows and biases of the block linears: bits per weight. Tiny widths carry more overhead."""
    model = build_model(compiled, profile)
    block = [t for t in model.graph.initializer if "layers" in t.name or "correction" in t.name]
    stored = sum(len(t.raw_data) for t in block) * 8
    weights = sum(int(np.prod(t.dims)) for t in block if t.name.endswith(".codes"))
    codes = sum(len(t.raw_data) for t in block if t.name.endswith(".codes")) * 8
    assert codes / weights < 4.75  # 7/8 at 4 bits, 1/8 at 8, correction rows of the 8-bit part
    assert stored / weights < 8


def test_generation_matches_reference(compiled, decoder):
    ids = tiny_tokens(2, 9, seed=3).numpy()
    assert np.array_equal(decoder.generate(ids, max_new_tokens=12, eos_token_id=[]), greedy(compiled, ids))


def test_left_padded_batch_matches_rows_alone(compiled, decoder):
    ids = tiny_tokens(2, 8, seed=4).numpy()
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    both = decoder.generate(ids, mask, max_new_tokens=8, eos_token_id=[])
    alone = decoder.generate(ids[:1, 3:], max_new_tokens=8, eos_token_id=[])
    assert np.array_equal(both[0, 8:], alone[0, 5:])
    assert np.array_equal(both, greedy(compiled, ids, mask, 8))


def test_chunked_prefill_changes_nothing(decoder):
    ids = tiny_tokens(1, 40, seed=5).numpy()
    whole = decoder.generate(ids, max_new_tokens=6, eos_token_id=[])
    with mock.patch("resq_compiler.backends.onnx.runtime.PREFILL_CHUNK", 7):
        assert np.array_equal(decoder.generate(ids, max_new_tokens=6, eos_token_id=[]), whole)


def test_end_of_sequence_stops_a_row(decoder):
    ids = tiny_tokens(2, 5, seed=6).numpy()
    free = decoder.generate(ids, max_new_tokens=8, eos_token_id=[])
    end = int(free[0, 6])
    got = decoder.generate(ids, max_new_tokens=8, eos_token_id=end)
    first = np.flatnonzero(free[0, 5:] == end)[0]
    assert (got[0, 5 + first + 1 :] == 0).all() and np.array_equal(got[0, : 5 + first + 1], free[0, : 5 + first + 1])


def test_sampling_is_seeded_and_streams(decoder):
    ids = tiny_tokens(1, 5, seed=7).numpy()
    options = {
        "max_new_tokens": 6,
        "eos_token_id": [],
        "sampling": Sampling(True, temperature=2.0, top_k=50, top_p=0.95, seed=1),
    }
    seen: list[int] = []
    first = decoder.generate(ids, streamer=lambda t: seen.append(int(t[0])), **options)
    assert np.array_equal(first, decoder.generate(ids, **options)) and seen == list(first[0, 5:])
    other = decoder.generate(ids, **{**options, "sampling": Sampling(True, temperature=2.0, seed=2)})
    assert not np.array_equal(first, other)


def test_text_streaming(decoder):
    assert "".join(decoder.generate_text("w5 w9 w30", max_new_tokens=4, eos_token_id=[])).split()


def by_genai(path, ids, new=12) -> np.ndarray:
    """Prompt and greedy continuation by onnxruntime-genai."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=ids.shape[1] + new, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids[0].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.array(generator.get_sequence(0))


def test_genai_does_not_stop_where_a_model_has_no_end(compiled, tokenizer, tmp_path, monkeypatch):
    for holder in (compiled.config, compiled.generation_config):
        monkeypatch.setattr(holder, "eos_token_id", None)
        monkeypatch.setattr(holder, "pad_token_id", None)
    path = export_onnx(compiled, tmp_path / "model", "ort", embedding="float32", tokenizer=tokenizer)
    prompts = tiny_tokens(1024, 3)
    likeliest = compiled(prompts, logits_to_keep=1).logits[:, -1].argmax(-1)
    ids = prompts[likeliest == 0][:1].numpy()
    expected = greedy(compiled, ids, new=6)[0]
    assert expected[3] == 0 and np.array_equal(by_genai(path, ids, 6), expected)


@pytest.mark.parametrize("profile", ["ort", "qdq"])
def test_runs_unmodified_in_onnxruntime_genai(compiled, tokenizer, tmp_path, profile):
    path = export_onnx(compiled, tmp_path / "model", profile, embedding="float32", tokenizer=tokenizer)
    ids = tiny_tokens(1, 9, seed=8).numpy()
    got = by_genai(path, ids)
    expected = greedy(compiled, ids)[0]
    ends = np.flatnonzero(expected[9:] == 2)
    assert np.array_equal(got, expected[: 9 + ends[0] + 1] if ends.size else expected)


def test_special_tokens_that_a_model_has_not_are_left_out(compiled, monkeypatch):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        monkeypatch.setattr(compiled.config, name, None)
        monkeypatch.setattr(compiled.generation_config, name, None)
    model = genai_config(compiled, "ort")["model"]
    assert {k: v for k, v in model.items() if k.endswith("_token_id")} == {"pad_token_id": 130}
    monkeypatch.setattr(compiled.generation_config, "pad_token_id", -1)
    monkeypatch.setattr(compiled.generation_config, "eos_token_id", [7, 9])
    model = genai_config(compiled, "ort")["model"]
    assert model["eos_token_id"] == [7, 9] and model["pad_token_id"] == 7 and "bos_token_id" not in model


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"pad_token_id": -1}, {"top_p": 0.9, "do_sample": False}])
def test_generation_settings_that_transformers_would_not_save(compiled, tmp_path, monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setattr(compiled.generation_config, name, value)
    path = export_onnx(compiled, tmp_path / "model", "ort")
    assert settings.items() <= json.loads((path / "generation_config.json").read_text()).items() | {
        ("do_sample", False)
    }
    tokens = OnnxDecoder(path, threads=1).generate([[5, 6]], max_new_tokens=2, eos_token_id=[])
    assert tokens.shape == (1, 4) and tokens.min() >= 0


def test_files_are_as_readable_as_the_umask_says(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_DATA_ABOVE", 0)
    before = os.umask(0o027)
    try:
        path = export_onnx(compiled, tmp_path / "model", "ort")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {p.name: 0o640 for p in path.iterdir()}
    assert (path / "model.onnx.data").is_file()


def test_backend_onnx_computes_the_same(compiled):
    ids = tiny_tokens(2, 9, seed=9)
    expected_logits, expected = compiled(ids).logits, greedy(compiled, ids)
    try:
        compiled.use_backend("onnx")
        got = compiled(ids).logits
        assert torch.equal(compiled(ids.int(), attention_mask=torch.ones_like(ids).int()).logits, got)
        assert np.array_equal(greedy(compiled, ids), expected)
    finally:
        compiled.use_backend("reference")
    assert float((got - expected_logits).norm() / expected_logits.norm()) < 1e-5  # float32 sums in another order


@pytest.mark.parametrize("embedding", ["float16", "int8"])
def test_small_embeddings_are_the_rounded_table(compiled, embedding):
    """The export computes what the quantized graph computes with its table rounded."""
    models = {kind: build_model(compiled, "ort", embedding=kind) for kind in ("float32", embedding)}
    assert models[embedding].ByteSize() < models["float32"].ByteSize()
    gm = graph_tools.snapshot(compiled.graph_module)
    (view,) = (v for v in map(Embedding.of, gm.graph.nodes) if v is not None)
    table = view.table_tensor(gm)
    step = table.abs().amax(1, keepdim=True) / 127
    value = table.half().float() if embedding == "float16" else (table / step).round() * step
    graph_tools.set_tensor(gm, str(view.table.target), value)
    tensors, feeds = example(compiled)
    with torch.no_grad():
        expected = gm(*tensors)[0].numpy()
    got = open_session(models[embedding].SerializeToString(), threads=1).run(["logits"], feeds)[0]
    assert relative(got[visible(tensors)], expected[visible(tensors)]) < 1e-5


class TestRefusals:
    def test_unknown_profile(self, compiled):
        with pytest.raises(BackendError, match="expected one of qdq"):
            build_model(compiled, "int3")

    def test_unknown_choice(self, compiled):
        with pytest.raises(BackendError, match="embedding expected one of float16"):
            build_model(compiled, embedding="bfloat16")

    def test_operator_without_onnx_form(self, compile_tiny, tmp_path):
        compiled, _ = compile_tiny("llama", weight_method="rtn", lm_head_bits=8)
        node = next(n for n in compiled.graph_module.graph.nodes if n.target is torch.ops.aten.silu.default)
        node.target = torch.ops.aten.erfinv.default
        try:
            with pytest.raises(BackendError, match=f"{node.name}.*erfinv"):
                export_onnx(compiled, tmp_path / "model")
        finally:
            node.target = torch.ops.aten.silu.default
        assert not (tmp_path / "model").exists()

    def test_target_not_empty(self, compiled, tmp_path):
        (tmp_path / "mine.txt").write_text("keep")
        with pytest.raises(BackendError, match="not empty"):
            export_onnx(compiled, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

    def test_target_is_a_file(self, compiled, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BackendError, match="is a file"):
            export_onnx(compiled, tmp_path / "file")

    def test_target_read_only(self, compiled, tmp_path):
        with (
            mock.patch.object(Path, "mkdir", side_effect=PermissionError("denied")),
            mock.patch.object(export, "draft_model", side_effect=AssertionError("checked before any work")),
            pytest.raises(BackendError, match="not writable .denied"),
        ):
            export_onnx(compiled, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_failed_overwrite_leaves_the_former_export(self, compiled, tmp_path):
        """Of a directory that cannot be renamed, as a mount point."""
        (tmp_path / "old.onnx").write_text("old")
        rename = os.rename

        def full(source, destination):
            if Path(destination).name == "config.json":
                raise OSError("Device or resource busy")
            rename(source, destination)

        with mock.patch.object(os, "rename", full), pytest.raises(BackendError, match="busy; nothing was changed"):
            export_onnx(compiled, tmp_path, overwrite=True)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.onnx", "old")]
        export_onnx(compiled, tmp_path, overwrite=True)
        assert (tmp_path / "model.onnx").exists() and not (tmp_path / "old.onnx").exists()

    def test_target_full(self, compiled, tmp_path):
        with (
            mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
            pytest.raises(BackendError, match="MiB free"),
        ):
            export_onnx(compiled, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_write_failure_leaves_nothing(self, compiled, tmp_path):
        with (
            mock.patch.object(export, "save_model", side_effect=OSError("disk error")),
            pytest.raises(BackendError, match="disk error"),
        ):
            export_onnx(compiled, tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_onnxruntime_too_old(self, compiled):
        with (
            mock.patch("importlib.metadata.version", return_value="1.17.0"),
            pytest.raises(BackendError, match="1.23 or newer, found 1.17.0"),
        ):
            build_model(compiled, "ort")

    def test_onnx_missing(self, compiled):
        with mock.patch.dict("sys.modules", {"onnx": None}), pytest.raises(BackendError, match="pip install"):
            build_model(compiled)

    def test_onnxruntime_missing(self, compiled):
        with (
            mock.patch(
                "importlib.metadata.version", side_effect=importlib.metadata.PackageNotFoundError("onnxruntime")
            ),
            pytest.raises(BackendError, match=r"onnx.*needs onnxruntime.*pip install"),
        ):
            compiled.use_backend("onnx")

    def test_onnxruntime_cannot_load(self, tmp_path):
        (tmp_path / "model.onnx").write_bytes(b"not a model")
        with pytest.raises(BackendError, match=r"model\.onnx"):
            OnnxDecoder(tmp_path)

    def test_no_model_in_directory(self, tmp_path):
        with pytest.raises(BackendError, match="does not exist"):
            OnnxDecoder(tmp_path)
