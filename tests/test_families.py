"""Decoders of transformers beyond the families of tiny.py: exact passes keep their logits, or one clear error says why not."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import resq_compiler
from resq_compiler import tiny as tiny_module
from resq_compiler.api import trace
from resq_compiler.errors import ResqError
from resq_compiler.frontend.checks import check_model
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens

EXACT = 1e-4  # float32 rounding; measured 3e-7 to 1.2e-6
FLOAT = {"weight_bits": 16, "activation_bits": 16, "kv_bits": 16}
SIZES = {
    64: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    160: ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_key_value_heads", "eos_token_id"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads", "num_experts"),
    256: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    8: ("rotary_dim",), 6: ("sliding_window", "window_size"), 131: ("vocab_size",), 0: ("pad_token_id",), 1: ("bos_token_id",),
}  # fmt: skip
OWN = {  # values that cannot be guessed from the names of fields
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "helium": {"head_dim": 16}, "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"head_dim": 16}, "falcon-alibi": {"alibi": True},
    "dots1": {"n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
              "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{name: {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
              "v_head_dim": 16, "head_dim": 8} for name in ("minicpm3", "youtu")},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
}  # fmt: skip
WORK = (
    "apertus", "arcee", "bigbird_pegasus", "biogpt", "blenderbot", "bloom", "codegen", "cohere", "cohere2", "cwm", "ernie4_5",
    "exaone4", "falcon", "falcon-alibi", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "granite", "helium",
    "hunyuan_v1_dense", "hyperclovax", "jais2", "ministral", "ministral3", "mpt", "nanochat", "nemotron", "olmo", "olmo3", "persimmon",
    "phi", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip


def small(name: str):
    """A random model of a type with small sizes for every field that has one; `type-variant` for several of a type."""
    config = CONFIG_MAPPING[name if name in CONFIG_MAPPING else name.rpartition("-")[0]]
    fields = inspect.signature(config.__init__).parameters
    values = {field: size for size, fields_of in SIZES.items() for field in fields_of if field in fields}
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config(**{**values, **OWN.get(name, {})})).float().eval()
    tiny_module._fill(model, seed=0)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_exact_passes_keep_the_logits(name):
    check_exact(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_bits_are_shared_out(name):
    """Gradients reach every site of every structure, and the default recipe ends in a model that computes."""
    sizes = {"calibration_samples": 4, "calibration_length": 32, "weight_method": "rtn"}
    compiled = resq_compiler.compile(small(name), tiny_tokens(4, 32), average_bits=4.75, **sizes)
    stage = next(s for s in compiled.stages if s.name == "allocate-bits")
    assert len(stage.lines) == 1 + 2 + stage.rewrites > 10
    assert compiled(tiny_tokens(2, 20, seed=5)).logits.isfinite().all()


@pytest.mark.parametrize("name", ["bloom", "gptj"])
def test_attention_in_single_operators(name):
    """ALiBi over flattened heads; interleaved rotary embedding of some channels."""
    check_exact(name)


def check_exact(name: str) -> None:
    """Prefill, and a decode of two chunks, against eager transformers without a cache; left-padded."""
    model = small(name)
    compiled = resq_compiler.compile(model, tiny_tokens(4, 32), calibration_samples=4, calibration_length=32, **FLOAT)
    ids, mask = tiny_tokens(2, 20, seed=5), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    wants_positions = "position_ids" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        expected = model(
            ids, attention_mask=mask, use_cache=False, **({"position_ids": positions} if wants_positions else {})
        ).logits
        first = compiled(ids[:, :17], attention_mask=mask[:, :17], use_cache=True)
        second = compiled(ids[:, 17:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat((first.logits, second.logits), 1)
    assert relative_error(got[mask.bool()], expected[mask.bool()]) <= EXACT


REFUSED = {
    "bamba": r"cannot compute logits from token ids alone: .*; expected a decoder-only",
    "bart": r"pass \d find-topology: node \w+: the residual stream starts here; expected a token embedding",
    "bert": r"not a causal decoder",
    "ctrl": r"node \w+: in the residual stream; expected an add",
    "dots1": r"node \w+: in the residual stream; expected an add, .*experts",
    "mamba": r"it wrote no keys and values into its cache; expected a decoder with attention in every layer",
    "minicpm3": r"pass \d name-attention: node \w+: attention keys and values should come from append_cache",
    "openai-gpt": r"it wrote no keys and values into its cache",
    "youtu": r"pass \d name-attention: node \w+: attention keys and values should come from append_cache",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_clear_error(name):
    """State spaces, experts, latent attention, post-norm encoder blocks: a ResqError with the node or module and what was expected."""
    model = small(name)
    with pytest.raises(ResqError, match=REFUSED[name]):
        check_model(model)
        trace(model)
