"""Profile native: fused operators in ONNX Runtime; what the operators compute in PyTorch, or a refusal by node."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import build_model, export_onnx, native
from resq_compiler.backends.onnx.chain import unchained
from resq_compiler.backends.onnx.native import cache_rows
from resq_compiler.backends.onnx.runtime import OnnxDecoder

from resq_compiler.errors import BackendError
from resq_compiler.tiny import TINY_FAMILIES, tiny_tokens
from tests.backends.coded import coded
from tests.backends.onnx.conftest import relative
from tests.conftest import with_layer_norms, with_prefix

BLOCK = dict(NormLinear=2, AttentionLinear=1, HadamardLinear=1)
ENDS = {"Seen", "Angles", "Embed", "Keep"}


@pytest.fixture(autouse=True)
def built_library(library, monkeypatch):
    """The kernels are those of the tree, installed or not."""
    monkeypatch.setattr(libraries, "library", lambda: library)
    monkeypatch.setattr(libraries, "unavailable", lambda: None)


@pytest.fixture
def made(compile_tiny, tmp_path):
    """(family, **options) -> (compiled model, its export)."""

    def make(family: str = "llama", **options):
        defaults = {} if isinstance(options.get("recipe"), tuple) else {"recipe": "resq", "weight_method": "rtn"}
        compiled, _ = compile_tiny(family, **{**defaults, **options})
        return compiled, export_onnx(compiled, tmp_path / "model", "native", embedding="float32", overwrite=True)

    return make


def fused_nodes(path):
    """Operators of the kernels, those of chains too."""
    return [node for node in unchained(onnx.load(path / "model.onnx").graph.node) if node.domain == "resq"]


def padded(seed=12):
    """Two sequences, one padded on the left."""
    ids = tiny_tokens(2, 9, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def assert_same(compiled, path):
    """Logits of prompts to rounding, and greedy tokens of a batch. In one of three prompts a query or weight of attention next to the
    boundary of a code, or what follows from it, may fall to the other side."""
    decoder = OnnxDecoder(path, threads=1)
    same = [same_logits_and_tokens(compiled, decoder, *padded(seed)) for seed in (12, 13, 14)]
    assert sum(same) >= 2, same


def same_logits_and_tokens(compiled, decoder, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits, _ = decoder.forward(ids.numpy(), mask.numpy(), positions.numpy(), decoder.empty_past(2))
    with torch.no_grad():
        expected = coded(compiled, lambda model: model(ids, attention_mask=mask).logits)
    close = relative(logits.numpy()[mask.bool().numpy()], expected[mask.bool()].numpy()) < 2e-2
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = coded(compiled, lambda model: model.generate(ids, attention_mask=mask, **options))
    got = decoder.generate(ids.numpy(), mask.numpy(), max_new_tokens=6, eos_token_id=[])
    return close and np.array_equal(got, tokens.numpy())


def test_chunks_of_a_prompt_change_nothing(made, monkeypatch):
    _, path = made()
    decoder, ids = OnnxDecoder(path, threads=1), tiny_tokens(2, 20, seed=5).numpy()
    whole = decoder.generate(ids, max_new_tokens=6, eos_token_id=[])
    monkeypatch.setattr("resq_compiler.backends.onnx.runtime.NATIVE_PREFILL_CHUNK", 7)
    assert np.array_equal(decoder.generate(ids, max_new_tokens=6, eos_token_id=[]), whole)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family_is_fused_and_generates_the_same_tokens(family, made):
    compiled, path = made(family)
    layers = len(compiled.cache_specs)
    assert Counter(n.op_type for n in fused_nodes(path) if n.op_type not in ENDS) == {
        k: layers * n for k, n in BLOCK.items()
    }
    assert_same(compiled, path)


@pytest.mark.parametrize("kv_bits", [4, 8])
def test_weights_of_four_bits_are_packed_beside_activations_of_eight(kv_bits, made):
    compiled, path = made(activation_bits=8, kv_bits=kv_bits)
    graph = onnx.load(path / "model.onnx").graph
    fused = [node for node in fused_nodes(path) if node.op_type not in ENDS]
    layers = len(compiled.cache_specs)
    assert Counter(node.op_type for node in fused) == {k: layers * n for k, n in BLOCK.items()}
    for node in fused:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes.get("result_low_width", attributes["low_width"]) > 0
        assert {attributes["low_bits"], attributes.get("high_bits", 8)} == {8}
    low, high = (
        sum(len(t.raw_data) for t in graph.initializer if t.name.endswith(f".{side}")) for side in ("low", "high")
    )
    _, path = made(activation_bits=4, kv_bits=kv_bits)
    tensors = onnx.load(path / "model.onnx").graph.initializer
    assert low == sum(len(t.raw_data) for t in tensors if t.name.endswith(".low")) and high > 0


def test_quantizers_in_nodes_of_their_own(made, monkeypatch):
    """As where several linears read the codes: the same logits to the bit."""
    _, path = made()
    ids, mask = (x.numpy() for x in padded())
    positions = (mask.cumsum(-1) - 1).clip(0)
    fused = OnnxDecoder(path, threads=1)
    expected, _ = fused.forward(ids, mask, positions, fused.empty_past(2))
    monkeypatch.setattr(native, "only_linear", lambda quantizer: None)
    _, path = made()
    kinds = {n.op_type for n in fused_nodes(path)} - ENDS
    assert kinds == {"NormQuantize", "MixedLinear", "RopeCache", "AttentionQuantize", "HadamardQuantize"}
    apart = OnnxDecoder(path, threads=1)
    got, _ = apart.forward(ids, mask, positions, apart.empty_past(2))
    assert np.array_equal(got.numpy(), expected.numpy())


def test_inputs_in_groups_take_no_operator_more(made):
    compiled, path = made(recipe="quarot", activation_group_size=32)
    nodes = [n for n in fused_nodes(path) if n.op_type not in ENDS]
    layers = len(compiled.cache_specs)
    assert Counter(n.op_type for n in nodes) == {k: layers * n for k, n in BLOCK.items()}
    groups = {(n.op_type, a.i) for n in nodes for a in n.attribute if a.name in ("low_groups", "high_groups")}
    assert {("NormLinear", 2), ("HadamardLinear", 5)} <= groups


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", dict(recipe="quarot")),
        ("llama", dict(recipe="rtn")),
        ("llama", dict(recipe="resq+", allocation="equal")),
        ("llama", dict(recipe="resq+", allocation="equal", activation_group_size=32)),
        ("llama", dict(recipe="quarot", activation_group_size=32)),
        ("llama", dict(key_basis="head", site_fractions="mlp=1/4,o=0,value=0")),
        ("llama", dict(kv_bits=8, activation_bits=8)),
        ("llama", dict(activation_bits=8)),
        ("llama", dict(lm_head_bits=8)),
        ("opt", dict(recipe=with_layer_norms())),
        ("llama", dict(recipe=with_prefix())),
    ],
    ids=str,
)
def test_recipes_and_options(family, options, made):
    assert_same(*made(family, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_bits=16), r"attention\S*: the key/value cache is not quantized"),
        (dict(activation_bits=16), r"weight_only_linear\S*: 16-bit activations"),
    ],
    ids=["cache", "activations"],
)
def test_what_is_refused(options, message, made, tmp_path):
    with pytest.raises(BackendError, match=message):
        made(**options)
    assert not (tmp_path / "model").exists()


def test_weights_are_stored_as_the_kernels_read_them(made):
    """Half a byte for 4-bit codes, and nothing twice."""
    _, path = made()
    tensors = {t.name: t for t in onnx.load(path / "model.onnx").graph.initializer}
    tiles = [t for name, t in tensors.items() if name.startswith("packed.") and name.endswith((".low", ".high"))]
    assert tiles and all(t.data_type == onnx.TensorProto.UINT8 for t in tiles)
    assert not any(name.endswith("qdata") for name in tensors)


def test_the_directory_is_complete(made, library):
    compiled, path = made()
    assert (path / library.path.name).read_bytes() == library.path.read_bytes()
    decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
    (row,) = set(cache_rows(compiled.graph_module))
    assert decoder["head_size"] == row == OnnxDecoder(path).past_inputs[0].shape[3]
    assert decoder["session_options"]["custom_ops_library"] == library.path.name
    properties = {p.key: p.value for p in onnx.load(path / "model.onnx").metadata_props}
    assert properties["resq.profile"] == "native" and properties["resq.kv_cache"] == "packed"


def test_runs_unmodified_in_onnxruntime_genai(made):
    from tests.backends.onnx.test_export import by_genai

    compiled, path = made()
    ids = tiny_tokens(1, 9, seed=12).numpy()
    expected = OnnxDecoder(path, threads=1).generate(ids, max_new_tokens=8, eos_token_id=[])
    got = by_genai(path, ids, 8)
    assert np.array_equal(got, expected[0, : len(got)]) and len(got) > 9


def test_a_library_that_cannot_be_used(made, library):
    _, path = made()
    beside = path / library.path.name
    beside.write_bytes(beside.read_bytes()[:5000])
    with pytest.raises(BackendError, match="the file is cut short: 5000 bytes"):
        OnnxDecoder(path)
    beside.unlink()
    with pytest.raises(BackendError, match=f"{library.path.name} does not exist; the model needs it"):
        OnnxDecoder(path)


def test_without_kernels(compile_tiny, monkeypatch):
    def missing():
        raise BackendError("cpu kernels: the CPU kernels are not installed: pip install ./kernels")

    monkeypatch.setattr(libraries, "library", missing)
    compiled, _ = compile_tiny("llama", recipe="resq", weight_method="rtn")
    with pytest.raises(BackendError, match="pip install ./kernels"):
        build_model(compiled, "native")
