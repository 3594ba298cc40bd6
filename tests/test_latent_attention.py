"""Latent attention: DeepSeek-V3, whose queries are compressed too, with experts; DeepSeek-V2 and MiniCPM3 are in the tests of families."""

from __future__ import annotations

import re
from collections import Counter

import onnx
import pytest
import torch
from resq_compiler.backends.fused import lowering_latent
from resq_compiler.backends.fused.plain import TORCH
from resq_compiler.backends.fused.runner import prepare
from resq_compiler.backends.onnx import export_onnx
from resq_compiler.backends.onnx.chain import unchained
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from resq_compiler.passes import InsertPrefix
from resq_compiler.passes.insert_prefix import insert

import resq_compiler
from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.errors import BackendError, TopologyError
from resq_compiler.evaluation.sizes import cache_bytes_per_token
from resq_compiler.frontend.latent import is_quantized_vector
from resq_compiler.inspection.topology_view import topology_dict, topology_text
from resq_compiler.ir import meta, ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.ir.views import AppendCache, CodedLinear, QuantizeDequantize
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from tests.backends.fused.test_lower import assert_same_bits, calls
from tests.conftest import with_prefix
from tests.families import ONE_CODE, ROUNDING, native_errors, small

IDS = tiny_tokens(2, 20, seed=5)
OPTIONS = {"calibration_samples": 8, "calibration_length": 32, "calibration_dtype": "float32", "weight_method": "rtn"}


@pytest.fixture(scope="module")
def traced():
    """The named float graph and its topology."""
    return trace(small("deepseek_v3"))


@pytest.fixture(scope="module")
def deepseek():
    """Of 4 heads of 12 + 8 columns, made from 24 + 8 cached ones; at 4 bits."""
    return resq_compiler.compile(small("deepseek_v3"), tiny_tokens(8, 32), **OPTIONS)


def facts(compiled, kind):
    return [fact for node in compiled.graph_module.graph.nodes if (fact := meta.get(node, kind)) is not None]


def test_the_topology_has_vectors_and_what_reads_them(traced):
    topology = traced[1].facts.get(Topology)
    attention = topology.blocks[0].attention
    assert tuple(attention.linears) == ("q_a", "kv_a", "q_b", "q_b_rope", "k_rope", "k_b", "v_b", "o")
    assert attention.compressed == {"qlatent": 32, "latent": 24, "rotary": 8}
    assert [(v.site, v.role, len(v.linears), v.cache is not None) for v in attention.vectors] == [
        ("qlatent", "q_a", 2, False),
        ("latent", "kv_a", 2, True),
    ]
    text = topology_text("deepseek", topology_dict(topology))
    assert "latent attention: 4 heads of 20; keys and values compressed to 24 + 8 rotary columns, queries to 32" in text


def test_what_is_inspected_can_be_stated(traced):
    found = topology_dict(traced[1].facts.get(Topology))
    stated = trace(small("deepseek_v3"), found)[1]
    assert topology_dict(stated.facts.get(Topology)) == found
    found["blocks"][0]["attention"]["q_b"] = "lm_head"
    with pytest.raises(
        TopologyError, match=r"block 0, attention q_b: the linears of latent attention are those of the graph"
    ):
        trace(small("deepseek_v3"), found)


def test_the_cache_holds_one_quantized_vector_a_token(deepseek):
    spec = deepseek.cache_specs[0]
    assert (spec.num_heads, spec.key_dim, spec.value_dim) == (1, 24, 8)
    appends = deepseek.graph_module.graph.find_nodes(op="call_function", target=ops.append_cache)
    entries = [AppendCache.require(node).new for node in appends]
    parts = {meta.require(n, meta.QuantizerSite).name: QuantizeDequantize.require(n).parts for n in entries}
    assert parts["blocks.1.latent"] == ((4, 0, 21), (8, 21, 24))
    assert parts["blocks.1.key"] == ((4, 0, 8),)
    assert (
        cache_bytes_per_token(deepseek) < 2 * 4 * (20 + 16) / 2
    )  # codes of whole keys and values of four heads, without scales


def test_bases_of_vectors_are_in_the_weights(deepseek):
    """A rotation passes a norm without gain; only what stands behind rotary embeddings and activations stays an operator."""
    assert {p.basis for p in facts(deepseek, meta.Projection)} == {"U_C", "U_D"}
    assert not any("latent attention stays online" in note for note in deepseek.notes)


def test_linears_read_the_codes_that_are_cached(deepseek):
    """What keys and values are made from is the image of the cache; nothing quantizes it again."""
    gm = deepseek.graph_module
    names = {site.name for site in facts(deepseek, meta.QuantizerSite)}
    assert "blocks.0.latent" in names and not any(".latent_input" in name for name in names)
    made = [n for n in gm.graph.nodes if (p := meta.get(n, meta.LinearPart)) and p.site.role in ("k_b", "v_b")]
    assert len(made) == 8 and all(n.target is ops.weight_only_linear and is_quantized_vector(n.args[0]) for n in made)


@pytest.mark.parametrize("first", [True, False], ids=["activations first", "weights first"])
def test_no_order_of_passes_leaves_a_quantizer(first):
    compiled = resq_compiler.compile(
        small("minicpm3"),
        tiny_tokens(8, 32),
        **{**OPTIONS, "weight_method": "gptq"},
        gptq_on_quantized_activations=first,
    )
    made = [
        n for n in compiled.graph_module.graph.nodes if (p := meta.get(n, meta.LinearPart)) and p.site.role == "k_b"
    ]
    assert len(made) == 4 and all(n.target is ops.weight_only_linear and is_quantized_vector(n.args[0]) for n in made)


def test_linears_of_a_float_cache_have_quantizers():
    gm = resq_compiler.compile(small("minicpm3"), tiny_tokens(8, 32), **OPTIONS, kv_bits=16).graph_module
    made = [n for n in gm.graph.nodes if (p := meta.get(n, meta.LinearPart)) and p.site.role == "k_b"]
    assert len(made) == 4 and all(n.target is ops.quantized_linear for n in made)


def test_every_linear_but_routers_has_codes(deepseek):
    nodes = deepseek.graph_module.graph.nodes
    assert {p.site.role for n in nodes if CodedLinear.of(n) is not None and (p := meta.require(n, meta.LinearPart))} >= {
        "q_a", "kv_a", "q_b", "q_b_rope", "k_rope", "k_b", "v_b", "o", "gate", "up", "down",
    }  # fmt: skip
    assert len([n for n in nodes if n.target is aten.linear.default]) == 2  # a router, lm_head


def test_decoding_computes_what_a_prefill_does(deepseek):
    whole = deepseek(IDS).logits
    first = deepseek(IDS[:, :13], use_cache=True)
    second = deepseek(IDS[:, 13:], past_key_values=first.past_key_values).logits
    assert relative_error(second, whole[:, 13:]) < 1e-5
    text = deepseek.generate(IDS[:1, :5], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(text[:, 5:], deepseek(text[:, :-1]).logits[:, 4:].argmax(-1))


def test_saved_and_loaded_it_computes_the_same(deepseek, tmp_path):
    deepseek.save_pretrained(tmp_path)
    assert torch.equal(resq_compiler.load(tmp_path)(IDS).logits, deepseek(IDS).logits)


def test_onnx_generates_the_same_on_a_packed_cache(deepseek, tmp_path):
    path = export_onnx(deepseek, tmp_path / "model", "ort", embedding="float32", kv_cache="packed")
    expected = deepseek.generate(IDS[:1, :9], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = OnnxDecoder(path, threads=1).generate(IDS[:1, :9].numpy(), max_new_tokens=4, eos_token_id=[])
    assert got.tolist() == expected.tolist()


def test_no_settings_for_a_runtime_that_knows_one_width(deepseek, tmp_path, caplog):
    path = export_onnx(deepseek, tmp_path / "model", "qdq")
    assert not (path / "genai_config.json").exists()
    assert (
        "genai_config.json is left out: parts of this model's cache have different shapes (heads x width: 1 x 8, 1 x 24)"
        in caplog.text
    )


def test_a_backend_without_a_kernel_says_so(deepseek):
    with pytest.raises(BackendError, match=r"attention: latent attention, whose keys and values are made from a cache"):
        deepseek.use_backend("triton")


def test_on_the_cpu_kernels(deepseek, tmp_path):
    """Packed vectors, and every linear but routers on the kernels: the tokens of the reference backend, in a directory too."""
    pytest.importorskip("resq_kernels")
    expected = deepseek.generate(IDS[:1, :9], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    try:
        errors = native_errors(deepseek)
        assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE
    finally:
        deepseek.use_backend("reference")
    path = export_onnx(deepseek, tmp_path / "model", "native", embedding="float32")
    nodes = onnx.load(path / "model.onnx", load_external_data=False).graph.node
    kinds = Counter(node.op_type for node in unchained(nodes))
    assert kinds["LatentAttention"] == 2 and not kinds["CacheImage"] and kinds["Experts"] == 1 and not kinds["Loop"]
    assert not (path / "genai_config.json").exists()
    got = OnnxDecoder(path, threads=1).generate(IDS[:1, :9].numpy(), max_new_tokens=4, eos_token_id=[])
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"recipe": "rtn"}], ids=str)
def test_fused_operators_compute_the_same_bits(options):
    gm = resq_compiler.compile(small("minicpm3"), tiny_tokens(8, 32), **{**OPTIONS, **options}).graph_module
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert calls(runner)["latent_attention"] == 2 and not calls(runner)["cache_image"] and not runner.left
    assert_same_bits(gm, runner)


def test_what_is_not_taken_is_refused_nowhere(deepseek, monkeypatch):
    """Linears that read the image of the cache are then computed beside the attention, on the kernels' backend too."""
    monkeypatch.setattr(lowering_latent, "_expansion", lambda *_: "a test")
    gm = deepseek.graph_module
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert (
        calls(runner)["cache_image"] == 4
        and len([name for name in runner.left if "attention" in name or "linear" in name]) == 2 + 8
    )
    assert_same_bits(gm, runner)
    pytest.importorskip("resq_kernels")
    try:
        errors = native_errors(deepseek)
        assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE
    finally:
        deepseek.use_backend("reference")


def test_quantized_prefix_tokens_keep_the_linears_quantizers():
    """Their vectors stand before the cache: the cache stays packed, the kernels' linears make keys and values of all tokens."""

    class Stated(InsertPrefix):
        def run(self, gm, ctx):
            insert(gm, ctx.facts.get(Topology), [7, 3, 1])
            return 1

    passes = with_prefix(weight_method="rtn")
    compiled = resq_compiler.compile(
        small("minicpm3"), tiny_tokens(8, 32), calibration_samples=8, calibration_length=32,
        recipe=tuple(Stated() if isinstance(item, InsertPrefix) else item for item in passes),
        calibration_dtype="float32",
    )  # fmt: skip
    gm = compiled.graph_module
    assert list(gm.graph.find_nodes(op="call_function", target=ops.prepend))
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert calls(runner)["cache_image"] == 4 and not calls(runner)["latent_attention"]
    assert_same_bits(gm, runner)
    pytest.importorskip("resq_kernels")
    errors = native_errors(compiled)
    assert float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE


def test_a_float_cache_is_named():
    gm = resq_compiler.compile(small("minicpm3"), tiny_tokens(8, 32), **OPTIONS, kv_bits=16).graph_module
    with pytest.raises(BackendError, match=r"attention: the key/value cache is not quantized"):
        prepare(gm, TORCH, torch.float32, False, 1)


def test_a_gain_that_would_cost_too_much_stays_and_the_basis_behind_it():
    """A quarter of the channels of compressed vectors are 300 times the others, and the gain of the norm puts them down."""
    model = small("minicpm3")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_a_proj_with_mqa.weight[3:9] *= 300
            layer.self_attn.kv_a_layernorm.weight[3:9] /= 300
    compiled = resq_compiler.compile(model, tiny_tokens(8, 32), **OPTIONS)
    assert any(
        re.match(r"the basis of 2 of 4 compressed vectors of latent attention stays online \(.*kv_a_layernorm", n)
        for n in compiled.notes
    )
    online = [p for p in facts(compiled, meta.Projection) if p.basis == "U_L"]
    assert [(p.online, p.block) for p in online] == [(True, 0), (True, 1)]


def test_prefix_tokens_stand_before_both_cached_parts():
    """The graph behind the prefix computes what eager transformers computes for whole texts."""
    model, prefix = small("minicpm3"), [7, 3, 1]
    gm, ctx = trace(model)
    insert(gm, ctx.facts.get(Topology), prefix)
    gm.recompile()
    past = [torch.zeros(2, 1, 0, width) for _ in range(2) for width in (24, 8)]
    with torch.no_grad():
        expected = model(torch.cat((torch.tensor([prefix]).expand(2, -1), IDS), 1), use_cache=False).logits[:, 3:]
        got = gm(IDS, torch.ones_like(IDS), torch.arange(20).expand(2, 20), *past)[0]
    assert relative_error(got, expected) < 1e-5


def test_triton_says_so_before_the_compile_too():
    with pytest.raises(BackendError, match=r"backend triton: node attention: latent attention, whose keys and values"):
        resq_compiler.compile(small("deepseek_v3"), recipe="rtn", backend="triton")


OTHERS = (
    {"recipe": "rtn"},
    {"recipe": "quarot"},
    {"prefix_tokens": "auto"},
    {"average_bits": 4.75},
    {"weight_bits": 8, "kv_bits": 16},
    {"recipe": "quik"},
    {"recipe": "duquant"},
)


@pytest.mark.slow
@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_other_recipes_compile(options):
    compiled = resq_compiler.compile(small("minicpm3"), tiny_tokens(8, 32), **{**OPTIONS, **options})
    assert compiled(IDS).logits.isfinite().all()
