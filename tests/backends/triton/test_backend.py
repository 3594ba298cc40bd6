"""Whole tiny models on the kernels: same tokens as the reference backend, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import Counter

import pytest
import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.triton.formats import PagedCache
from resq_compiler.backends.triton.shapes import LLAMA3_8B
from resq_compiler.backends.triton.target import TRITON
from safetensors.torch import load_file

from resq_compiler import api
from resq_compiler.errors import BackendError
from resq_compiler.evaluation.sizes import resident_bytes
from resq_compiler.ir import graph_tools
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.tiny import TINY_FAMILIES, tiny_model, tiny_tokens
from tests.backends.comparing import ComparingKernels
from tests.conftest import with_layer_norms, with_prefix

FAST = ("llama",)
BLOCK = dict(norm_quantize=2, mixed_linear=4, rope_cache=1, attention_quantize=1, hadamard_quantize=1)
GREEDY = dict(
    do_sample=False, max_new_tokens=3, min_new_tokens=3, pad_token_id=0
)  # the last reads what a decode has cached


@pytest.fixture
def compiled(compile_tiny, sharing):
    """(family, backend options, **options) -> (reference model, the same on the kernels)."""

    def make(family: str, backend: dict | None = None, **options):
        defaults = {} if isinstance(options.get("recipe"), tuple) else {"recipe": "resq", "weight_method": "rtn"}
        reference, _ = compile_tiny(family, **{**defaults, **options})
        return reference, sharing(reference).use_backend("triton", **backend or {})

    return make


def _called(model) -> Counter:
    nodes = model.runner.graph_module.graph.nodes
    return Counter(str(n.target).split(".")[1] for n in nodes if getattr(n.target, "namespace", "") == "resq")


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in TINY_FAMILIES])
def test_every_operator_computes_its_integers_and_generates_the_same_tokens(family, compiled, monkeypatch):
    reference, ours = compiled(family)
    ids = tiny_tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    with monkeypatch.context() as patch:
        checked = ComparingKernels(TRITON)
        patch.setattr(operators, "find_target", lambda name: dataclasses.replace(TRITON, kernels=checked))
        ours(ids, attention_mask=mask)
    layers = len(ours.runner.caches)
    assert checked.counts == {name: layers * count for name, count in BLOCK.items()}
    checked.check()
    expected = reference.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **GREEDY), expected)


def test_layer_norms(compiled, monkeypatch):
    """OPT with its norms as they are: the kernel's own LayerNorm, in every block."""
    reference, ours = compiled("opt", recipe=with_layer_norms())
    quantizing = ours.runner.graph_module.graph.find_nodes(op="call_function", target=operators.norm_quantize)
    assert sum(node.args[3] == "layer" for node in quantizing) == 4
    ids, checked = tiny_tokens(2, 9), ComparingKernels(TRITON)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "find_target", lambda name: dataclasses.replace(TRITON, kernels=checked))
        ours(ids)
    checked.check()
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_the_default_recipe(sharing):
    """Down projections in two parts, each with a transform of its own; clips that differ between parts; bases and fractions of
    their own for keys and sites."""
    one_block, two_blocks = (tiny_model("llama", intermediate_size=128, num_hidden_layers=n) for n in (1, 2))
    few = dict(weight_method="rtn", calibration_samples=2, calibration_length=16)
    equal = {"allocation": "equal"}
    widths = {**equal, "site_fractions": "mlp=1/4@6,o=1/4@5,key=1/4@6,value=1/4@7,down.1=1/4@6"}
    for options in (
        equal,
        {**equal, "key_basis": "head", "site_fractions": "mlp=1/4,o=0,value=0"},
        {"average_bits": 4.75},
        widths,
    ):
        model = two_blocks if "average_bits" in options else one_block  # bits are shared out between blocks too
        reference = api.compile(model, tiny_tokens(2, 16), recipe="resq+", **few, **options)
        ours, ids = sharing(reference).use_backend("triton"), tiny_tokens(2, 9)
        if options.get("allocation") and options is not widths:
            assert _called(ours)["hadamard_quantize"] == 1 and _called(ours)["norm_quantize"] == 2
        assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_inputs_in_groups(sharing):
    """The kernels of norms and transforms quantize in groups, and no launch is added."""
    reference = api.compile(
        tiny_model("llama", intermediate_size=128, num_hidden_layers=1), tiny_tokens(2, 16), recipe="resq+", weight_method="rtn",
        calibration_samples=2, calibration_length=16, allocation="equal", activation_group_size=32,
    )  # fmt: skip
    ours, ids = sharing(reference).use_backend("triton"), tiny_tokens(2, 9)
    calls = _called(ours)
    assert calls == dict(norm_quantize=2, mixed_linear=4, rope_cache=1, attention_quantize=1, hadamard_quantize=1)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_a_block_is_nine_launches(compiled):
    reference, ours = compiled("llama")
    calls = _called(ours)
    assert calls == dict(norm_quantize=4, mixed_linear=8, rope_cache=2, attention_quantize=2, hadamard_quantize=2)
    assert sum(calls.values()) == 2 * 9
    graph = ours.runner.graph_module.graph
    assert [n.name for n in graph_tools.placeholders(graph)][3:7] == [
        "cache_table",
        "cache_start",
        "key_cache_0",
        "value_cache_0",
    ]


def test_weights_are_held_once_and_packed():
    """4-bit codes take half a byte, and the int8 codes of the reference are gone; asked for, they come back bit for bit."""
    options = dict(recipe="resq", weight_method="rtn", calibration_samples=2, calibration_length=16)
    model = api.compile(tiny_model("llama", hidden_size=256, intermediate_size=512), tiny_tokens(2, 16), **options)
    expected = {name: t.clone() for name, t in model.graph_module.named_buffers()}
    alive = {n: weakref.ref(t) for n, t in model.graph_module.named_buffers() if n.endswith("qdata")}
    before, columns = resident_bytes(model), sum(t().numel() for t in alive.values())
    model.use_backend("triton")
    gc.collect()
    assert not [name for name, tensor in alive.items() if tensor() is not None]
    held = {n: t for n, t in model.named_buffers()}
    packed = sum(t.nbytes for n, t in held.items() if n.rpartition(".")[2] in ("low", "high"))
    # 4.4 bits by the recipe; rows are padded to 32 bytes, those of a head (28 and 8 bytes of 64 columns) to 32 and 16
    assert 4.4 < 8 * packed / columns < 5.2
    sums = sum(t.nbytes for n, t in held.items() if n.endswith("row_sum"))
    assert resident_bytes(model) <= before - columns + packed + sums
    back = dict(model.graph_module.named_buffers())
    assert back.keys() == expected.keys() and all(torch.equal(back[n], t) for n, t in expected.items())
    assert not [
        n for n, _ in model.named_buffers() if n.endswith("qdata")
    ]  # asking has not brought them into the model
    graph = model.use_backend("reference").graph_module
    assert graph is model.graph_module and dict(graph.named_buffers()).keys() == expected.keys()


def test_bits_of_a_weight_at_real_widths():
    """Llama-3-8B: what rows take, padding included, against 4.5, 5 (o: 56 of 64 bytes a head) and 4 bits a column."""
    bits = {name: 8 * sum(la.row_bytes for la in parts) / sum(la.columns for la in parts) for name, parts in (
        ("q/k/v", LLAMA3_8B.parts()), ("o", LLAMA3_8B.head_parts()), ("down", LLAMA3_8B.down_parts()))}  # fmt: skip
    assert bits == {"q/k/v": 4.5, "o": 5.0, "down": 4.0}


def test_a_model_on_the_kernels_is_saved_as_any_other(compiled, tmp_path):
    reference, ours = compiled("llama")
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "reference")
    for name in ("resq_graph.json", "model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_packed_rows_hold_the_bytes_of_the_file(compiled, tmp_path):
    """Memory and disk share one nibble order: a row of packed memory starts with the row in the file."""
    _, ours = compiled("llama")
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    places = ours.runner.source.places
    assert {at.part.is_low for at in places.values()} == {True, False}
    buffers = dict(ours.runner.graph_module.named_buffers())
    for name, at in places.items():
        rows = buffers[at.tensor][at.start : at.stop].unflatten(-1, (at.part.groups, -1))
        width = -(-at.part.width // 2) if at.part.is_low else at.part.width
        assert torch.equal(rows[..., :width].flatten(1).view(saved[name].dtype), saved[name]), name


def test_everything_moves_with_the_module(compiled):
    """As `.to("cuda")`, with the device that needs no GPU: no tensor of the lowered graph stays behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    reference, _ = compiled("llama")
    own = dataclasses.replace(reference.result, graph_module=graph_tools.snapshot(reference.graph_module))
    ours = CompiledModel(own).use_backend("triton").to("meta")
    graph = ours.runner.graph_module
    tensors = [graph_tools.get_tensor(graph, node) for node in graph.graph.find_nodes(op="get_attr")]
    assert tensors and all(t.is_meta for t in tensors) and ours.device.type == "meta"
    cache, parts = PagedCache(), [of for pair in ours.runner.caches for of in pair]
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    pages = [cache.allocate(2, 2, of, 64, torch.device("meta")) for of in parts]
    table, start = (torch.zeros(*shape, dtype=torch.int32, device="meta") for shape in ((2, 1), (2,)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        (logits,) = graph(ids, torch.ones_like(ids), ids, table, start, *pages)
    assert logits.device.type == "meta" and logits.shape == (
        2,
        5,
        131,
    )  # so no operator makes a tensor on a fixed device


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(recipe="quarot"), dict(recipe="resq+"), dict(kv_bits=8)], ids=str)
def test_other_recipes(options, compiled):
    reference, ours = compiled("llama", **options)
    ids = tiny_tokens(2, 9)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


@pytest.mark.slow
def test_three_widths(compiled):
    """Linears of three parts are two launches; a cache of three has no kernel, and torch takes it where that is allowed."""
    with pytest.raises(
        BackendError, match=r"(?s)cache parts \(\(2, 0, 2\), \(4, 2, 14\), \(8, 14, 16\)\).*allow_fallback=True"
    ):
        compiled("llama", low_fraction=0.125)
    reference, ours = compiled("llama", dict(allow_fallback=True), low_fraction=0.125)
    assert _called(ours)["mixed_linear"] > 8
    ids = tiny_tokens(2, 9)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_a_float_cache_is_refused_with_the_reason(compiled):
    with pytest.raises(BackendError, match="(?s)cannot take.*not quantized .kv_bits of 16.*allow_fallback=True"):
        compiled("llama", kv_bits=16)
    reference, ours = compiled("llama", dict(allow_fallback=True), kv_bits=16)
    ids = tiny_tokens(2, 9)
    assert len(ours.runner.reasons) == 2 and ours.runner.caches == (None, None)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_prefix_tokens_are_refused_or_left_to_pytorch(compiled):
    with pytest.raises(BackendError, match="(?s)attention.*prefix tokens.*prefix_tokens=none.*allow_fallback=True"):
        compiled("llama", recipe=with_prefix())
    reference, ours = compiled("llama", dict(allow_fallback=True), recipe=with_prefix())
    ids = tiny_tokens(2, 9)
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_block_pca_is_multiplied_by_pytorch(compiled):
    """Everything else goes to the kernels."""
    reference, ours = compiled("llama", down_proj="block-pca")
    ids = tiny_tokens(2, 9)
    assert _called(ours)["mixed_linear"] >= 8 and _called(ours)["attention_quantize"] == 2
    assert torch.equal(ours.generate(ids, **GREEDY), reference.generate(ids, **GREEDY))


def test_a_cache_of_another_backend_is_refused(compiled):
    reference, ours = compiled("llama")
    past = reference(tiny_tokens(1, 4)).past_key_values
    with pytest.raises(BackendError, match="float cache of 4 tokens"):
        ours(tiny_tokens(1, 1), past_key_values=past)
