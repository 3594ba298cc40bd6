"""Mixtures of experts, and latent attention: exact passes keep the logits, 8 bits stay close, and what is saved is what was compiled."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import resq_compiler
from resq_compiler.errors import BackendError, DataError
from resq_compiler.evaluation.sizes import average_bits, describe, memory_bytes
from resq_compiler.ir import meta, promises
from resq_compiler.ir.views import CodedLinear, Linear, Quantize
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from tests.families import EIGHT, EXACT, MIXTURES, small

IDS = tiny_tokens(2, 20, seed=5)
FOUR = {"calibration_samples": 16, "calibration_length": 32, "calibration_dtype": "float32"}
CLOSE = (
    0.04  # 8 bits for everything, median over tokens, a few of which go through other experts: measured 0.01 to 0.03
)


def logits(gm: GraphModule, compiled) -> torch.Tensor:
    """Of a prefill without padding from an empty cache."""
    shapes = [(s.num_heads, w) for s in compiled.cache_specs for w in (s.key_dim, s.value_dim)]
    past = [torch.zeros(2, heads, 0, width) for heads, width in shapes]
    with torch.no_grad():
        return gm(IDS, torch.ones_like(IDS), torch.arange(20).expand(2, 20), *past)[0]


@pytest.mark.parametrize("name", (*MIXTURES, "minicpm3"))
def test_exact_passes_keep_the_logits_and_eight_bits_stay_close(name):
    model, graphs = small(name), []
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
    compiled = resq_compiler.compile(model, tiny_tokens(4, 32), on_float=graphs.append, **EIGHT)
    assert relative_error(logits(graphs[0], compiled), expected) <= EXACT
    errors = (compiled(IDS).logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) <= CLOSE


@pytest.fixture(scope="module")
def mixtral():
    """Two of four experts in each of two layers, at 4 bits."""
    return resq_compiler.compile(small("mixtral"), tiny_tokens(16, 32), **FOUR)


def test_experts_have_codes_of_their_own_and_routers_stay_float(mixtral):
    nodes = mixtral.graph_module.graph.nodes
    coded = [view for node in nodes if (view := CodedLinear.of(node)) is not None and view.of_experts]
    assert {tuple(view.codes(mixtral.graph_module).shape[:2]) for view in coded} == {(4, 160), (4, 64)}
    assert all(view.on_codes for view in coded)
    floats = [view.name for node in nodes if (view := Linear.of(node)) is not None]
    assert floats == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]


def test_experts_keep_a_scale_a_token_where_other_inputs_have_groups():
    compiled = resq_compiler.compile(
        small("mixtral"), tiny_tokens(16, 32), weight_method="rtn", activation_group_size=32, high_fraction=0.0, **FOUR
    )
    (note,) = [note for note in compiled.result.notes if "activation_group_size" in note]
    assert "inputs of experts (6 linears) keep one scale" in note
    groups = {
        (meta.require(q.node, meta.QuantizerSite).name.split(".")[2], q.groups)
        for q in map(Quantize.of, compiled.graph_module.graph.nodes)
        if q is not None
    }
    assert {name for name, n in groups if n == 1} == {"mlp_input", "down_input"} and ("attention_input", 2) in groups


def test_the_stage_says_what_every_expert_was_rounded_with(mixtral):
    stage = next(s for s in mixtral.stages if s.name == "quantize-weights")
    tokens = [line for line in stage.lines if line.startswith("tokens of the experts of")]
    assert len(tokens) == 4  # gate and up together, and down, of two layers
    counts = [int(n.rstrip("*")) for n in tokens[0].rpartition(": ")[2].split()]
    assert len(counts) == 4
    assert sum(counts) == 2 * 16 * 32


def test_saved_and_loaded_it_computes_the_same(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path)
    assert torch.equal(resq_compiler.load(tmp_path)(IDS).logits, mixtral(IDS).logits)


def test_sizes_count_every_expert(mixtral):
    weights = 2 * (4 * 3 * 160 * 64 + 64 * (64 + 2 * 32) + 64 * 64)  # experts; q, k, v; o
    assert memory_bytes(mixtral)["weight_codes"] == pytest.approx(weights * average_bits(mixtral).weights / 8, rel=0.02)


def test_sizes_say_what_a_token_goes_through(mixtral):
    found = describe(mixtral)["active"]
    experts, others = 2 * 4 * 3 * 160 * 64, 2 * (64 * (64 + 2 * 32) + 64 * 64)
    assert (found["weights"], found["active_weights"]) == (experts + others, experts // 2 + others)
    assert found["bytes"] / 2 < found["active_bytes"] < found["bytes"]


def test_a_token_alone_gets_what_it_gets_among_others(mixtral):
    """Decoding goes through other rows of other experts than prefill, to the same codes."""
    whole = mixtral(IDS).logits
    first = mixtral(IDS[:, :19], use_cache=True)
    last = mixtral(IDS[:, 19:], past_key_values=first.past_key_values).logits
    assert relative_error(last[:, -1], whole[:, -1]) < 1e-5


def test_every_token_through_every_expert(mixtral):
    """For statistics only: other codes, the same graph."""
    other = resq_compiler.compile(small("mixtral"), tiny_tokens(16, 32), calibrate_all_experts=True, **FOUR)
    assert [n.target for n in other.graph_module.graph.nodes] == [n.target for n in mixtral.graph_module.graph.nodes]
    stage = next(s for s in other.stages if s.name == "quantize-weights")
    tokens = [line for line in stage.lines if line.startswith("tokens of the experts of")]
    assert len(tokens) == 4
    assert all(line.endswith(": 512 512 512 512") for line in tokens)


def test_tokens_may_go_where_the_quantized_model_sends_them():
    """Other moments, so other codes; and a recipe that rounds after activations."""
    options = {**FOUR, "calibration_samples": 8, "gptq_on_quantized_activations": True}
    float_routed, quantized_routed = (
        resq_compiler.compile(small("mixtral"), tiny_tokens(8, 32), calibration_routing=routing, **options)(IDS).logits
        for routing in ("float", "quantized")
    )
    assert not torch.equal(float_routed, quantized_routed)
    assert relative_error(quantized_routed, float_routed) < 1


def test_an_expert_without_tokens_is_an_error_unless_allowed():
    one = {**FOUR, "calibration_samples": 1, "calibration_length": 2}
    with pytest.raises(
        DataError,
        match=r"node \w+ \(.*mlp.gate\): no calibration token was routed to \d of 4 experts \(.*calibrate_all",
    ):
        resq_compiler.compile(small("mixtral"), tiny_tokens(1, 2), **one)
    allowed = resq_compiler.compile(small("mixtral"), tiny_tokens(1, 2), unreached_experts="layer", **one)
    assert allowed(IDS).logits.isfinite().all()


def test_a_backend_that_packs_codes_alike_names_the_node():
    """Weights of 6 bits do not fit beside activations of 4 where both lie in half a byte."""
    options = {
        **FOUR,
        "recipe": "resq",
        "weight_method": "rtn",
        "expert_bits": "0=4644/8888",
        "unreached_experts": "layer",
    }
    compiled = resq_compiler.compile(small("mixtral"), tiny_tokens(16, 32), **options)
    with pytest.raises(
        BackendError,
        match=r"weight_only_expert_linear\w*: of a mixture that no grouped kernel takes: experts have weights of 6",
    ):
        compiled.use_backend("triton")


def test_a_compile_makes_a_few_experts_at_a_time(monkeypatch, tmp_path):
    """As they lie in a checkpoint. Only the graph as it was captured has the experts of a layer together."""
    monkeypatch.setattr(promises, "TABLE", 2**17)
    monkeypatch.setattr(promises, "ROWS", 64)
    gate = 64 * 32 * 64 * 4
    monkeypatch.setattr(promises, "HELD_ROWS", gate // 8)
    config = CONFIG_MAPPING["qwen3_moe"](
        hidden_size=64, moe_intermediate_size=32, num_experts=64, num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=131, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    most = {}

    def see(stage):
        most[stage.name] = promises.ledger.most - promises.ledger.held
        promises.ledger.reset()

    promises.ledger.reset()
    options = {**FOUR, "recipe": "resq+", "weight_method": "rtn", "unreached_experts": "layer", "allocation": "equal"}
    resq_compiler.compile(tmp_path, tiny_tokens(4, 32), on_stage=see, **options)
    assert {"fuse-projections", "partition-linears", "quantize-weights"} <= most.keys()
    captured = ("capture", "canonicalize")
    assert max(most[name] for name in captured) <= 2 * gate
    assert {name: size for name, size in most.items() if size > gate / 2 and name not in captured} == {}
