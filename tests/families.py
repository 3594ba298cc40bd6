"""Small random decoders of transformers beyond those of tiny.py, and the page that says which backend runs which.

`python -m tests.families` measures all of them and writes docs/families.md; the tests measure them again and compare.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run in Python, on the CPU

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import resq_compiler
from resq_compiler import tiny as tiny_module
from resq_compiler.errors import BackendError
from resq_compiler.frontend.capture import concrete_example
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from tests.backends.coded import coded

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
SIZES = {
    64: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    160: ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "n_inner"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_key_value_heads", "eos_token_id"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads", "num_experts"),
    256: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    8: ("rotary_dim",), 6: ("sliding_window", "window_size"), 131: ("vocab_size",), 0: ("pad_token_id",), 1: ("bos_token_id",),
}  # fmt: skip
CHOSEN = {"num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 32}  # two of four experts
GROUPED = {
    **CHOSEN,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
SHARED = {**CHOSEN, "head_dim": 16, "num_shared_experts": 1}
GEMMA_4 = {  # as its larger models: no embeddings of each layer, keys and values of full attention from one linear
    "hidden_size_per_layer_input": 0, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
GEMMA_4_LAYERS = {  # as its smaller ones: embeddings of each layer, and the last layers read the keys and values of earlier ones
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 131, "head_dim": 16, "global_head_dim": 32, "num_hidden_layers": 4,
    "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "use_double_wide_mlp": True,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8,
}  # fmt: skip
OWN = {  # values that cannot be guessed from the names of fields
    "mixtral": {**CHOSEN, "sliding_window": None}, "qwen2_moe": {**CHOSEN, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**CHOSEN, "head_dim": 24, "norm_topk_prob": True}, "olmoe": {**CHOSEN, "intermediate_size": 32},
    "granitemoe": {**CHOSEN, "intermediate_size": 32}, "glm4_moe": {**GROUPED, "head_dim": 16},
    "gpt_oss": {**CHOSEN, "head_dim": 16, "intermediate_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "helium": {"head_dim": 16}, "hunyuan_v1_dense": {"head_dim": 16},
    "ministral": {"head_dim": 16}, "falcon-alibi": {"alibi": True},
    "dots1": {**GROUPED, "n_group": 1},
    **{name: LATENT for name in ("minicpm3", "youtu")},
    **{name: {**GROUPED, **LATENT} for name in ("axk1", "deepseek_v3", "glm4_moe_lite")},
    "deepseek_v2": {**GROUPED, **LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "phi3-longrope": {"original_max_position_embeddings": 10, "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                      "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i / 4 for i in range(8)]}},
    "gemma4_text": GEMMA_4,
    "gemma4_text-experts": {**GEMMA_4, **CHOSEN, "enable_moe_block": True, "top_k_experts": 2},
    "aria_text": {"moe_num_experts": 4, "head_dim": 16, "moe_topk": 2},
    "ernie4_5_moe": {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4},
    "exaone_moe": {**SHARED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "head_dim": 16, "moe_topk": 2}, "minimax_m2": {**CHOSEN, "head_dim": 16},
    **{name: CHOSEN for name in ("flex_olmo", "granitemoe_swa", "granitemoeshared", "phimoe")},
    **{name: SHARED for name in ("afmoe", "cohere2_moe", "flint", "hy_v3", "kolibri1", "laguna", "mellum")},
    "mimo_v2_flash": {**GROUPED, "n_group": 1, "head_dim": 16, "v_head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "solar_open": {**GROUPED, "n_group": 1, "head_dim": 16}, "internlm3": {"head_dim": 16}, "iquestcoder": {"head_dim": 16},
    "gemma4_text-layers": GEMMA_4_LAYERS,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
}  # fmt: skip
LARGER = {  # sizes that are no powers of two among them, more experts than choices by a factor, several groups
    "hidden_size": 256, "intermediate_size": 608, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000,
    "max_position_embeddings": 1024, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160, "num_experts": 24,
    "num_local_experts": 24, "n_routed_experts": 24, "num_experts_per_tok": 4, "n_shared_experts": 2, "q_lora_rank": 96,
    "kv_lora_rank": 80, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
}  # fmt: skip
"""Values of fields that `small` has others of, where it has any."""
WORK = (
    "apertus", "arcee", "bigbird_pegasus", "biogpt", "blenderbot", "bloom", "codegen", "cohere", "cohere2", "cwm", "ernie4_5",
    "exaone4", "falcon", "falcon-alibi", "gemma", "gemma4_text", "gemma4_text-layers",
    "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gptj",
    "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "minicpm3", "ministral",
    "ministral3", "mpt", "nanochat", "nemotron", "olmo", "olmo3", "persimmon",
    "phi", "phi3-longrope", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "xglm", "youtu",
)  # fmt: skip
MIXTURES = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "dots1", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "glm4_moe_lite",
)  # fmt: skip
MORE_MIXTURES = (
    "aria_text", "axk1", "cohere2_moe", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4_text-experts", "granitemoe_swa",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "mellum", "mimo_v2_flash", "minimax_m2", "phimoe", "solar_open",
)  # fmt: skip
FAMILIES = (*WORK, *MIXTURES, *MORE_MIXTURES)
LATENT_FAMILIES = tuple(name for name in (*WORK, *MIXTURES) if "kv_lora_rank" in OWN.get(name, {}))
EIGHT = {
    "calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32", "weight_method": "rtn",
    "weight_bits": 8, "activation_bits": 8, "kv_bits": 8,
}  # fmt: skip
EXACT = 1e-4  # float32 rounding; measured 3e-7 to 1.2e-6
FLOAT = {"weight_bits": 16, "activation_bits": 16, "kv_bits": 16}
ROUNDING = 1e-5  # float32 sums in another order
ONE_CODE = 0.05  # an activation within rounding of a tie falls to the other code, one step of 255; a wrong operator gives 0.5 and more


def small(name: str, larger: bool = False):
    """A random model of a type with small sizes for every field that has one; `type-variant` for several of a type. larger: with LARGER."""
    config = CONFIG_MAPPING[name if name in CONFIG_MAPPING else name.rpartition("-")[0]]
    fields = inspect.signature(config.__init__).parameters
    values = {field: size for size, fields_of in SIZES.items() for field in fields_of if field in fields}
    with torch.random.fork_rng():
        values |= OWN.get(name, {})
        if larger:
            values |= {field: size for field, size in LARGER.items() if values.get(field) is not None}
            if name in LATENT_FAMILIES:
                values |= {
                    "num_key_value_heads": 8,
                    "head_dim": 16,
                }  # as many as queries, and as wide as their rotary part
        model = AutoModelForCausalLM.from_config(config(**values)).float().eval()
    tiny_module._fill(model, seed=0)
    return model


def compiled(name: str) -> CompiledModel:
    """The default recipe at 8 bits: all its operators, and little noise."""
    return resq_compiler.compile(small(name), tiny_tokens(4, 32), **EIGHT)


@torch.no_grad()
def onnx_errors(model: CompiledModel, profile: str) -> torch.Tensor:
    """Relative error of the logits of every visible token in ONNX Runtime, against the quantized model in PyTorch.

    Prefill, decode of several tokens and of one, on three draws of tokens.
    """
    from resq_compiler.backends.onnx import build_model
    from resq_compiler.backends.onnx.backend import OnnxRunner
    from resq_compiler.backends.onnx.session import open_session

    runner = OnnxRunner(open_session(build_model(model, profile, embedding="float32").SerializeToString(), threads=1))
    errors = []
    for past, new in ((7, 5), (0, 6), (9, 1)):
        _, mask, *rest = concrete_example(131, model.cache_specs, new=new, past=past)
        for seed in range(3):
            ids = tiny_tokens(2, new, seed=seed)
            got, expected = runner(ids, mask, *rest), model.graph_module(ids, mask, *rest)
            assert [t.shape for t in got] == [t.shape for t in expected]
            seen = mask[:, -new:].bool()
            errors.append((got[0] - expected[0])[seen].norm(dim=-1) / expected[0][seen].norm(dim=-1))
    return torch.cat(errors)


def on_onnx(model: CompiledModel, profile: str) -> str:
    """`yes` when all visible tokens are the same but for codes at ties; what is wrong otherwise."""
    try:
        errors = onnx_errors(model, profile)
    except BackendError as error:
        return f"no: {error}"
    if float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE:
        return "yes"
    return f"differs: median {float(errors.median()):.1e}, largest {float(errors.max()):.1e}"


@torch.no_grad()
def native_errors(model: CompiledModel, draws: int = 5) -> torch.Tensor:
    """Relative error of the logits of every visible token on the CPU kernels, in a prefill, a decode of several tokens and of one.

    On several draws of tokens: a query or a weight of attention next to the boundary of a code moves all tokens behind it.
    """
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0
    found = []

    def compute(model: CompiledModel) -> None:
        for seed in range(draws):
            cache, ids = None, tiny_tokens(2, 13, seed=seed)
            pieces = []
            for start, stop in ((0, 7), (7, 12), (12, 13)):
                output = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                pieces.append(output.logits)
            found.append(torch.cat(pieces, 1)[mask.bool()])

    coded(model, compute)
    compute(model.use_backend("cpu"))
    forms, kernels = torch.cat(found[:draws]), torch.cat(found[draws:])
    return (kernels - forms).norm(dim=-1) / forms.norm(dim=-1)


def on_native(model: CompiledModel) -> str:
    """`yes` when all visible tokens are the same but for codes at ties, else the reason."""
    try:
        errors = native_errors(model)
    except BackendError as error:
        return f"no: {reason_of(error)}"
    finally:
        model.use_backend("reference")
    if float(errors.median()) < ROUNDING and float(errors.max()) < ONE_CODE:
        return "yes"
    return f"differs: median {float(errors.median()):.1e}, largest {float(errors.max()):.1e}"


def reason_of(error: BackendError) -> str:
    """What the first node that is refused lacks; the page needs no node names."""
    listed = [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    return (listed[0].partition(": ")[2] if listed else str(error)).replace("|", "/")


def on_triton(model: CompiledModel) -> str:
    """`yes` when all of the graph is lowered to kernels, `partly` when PyTorch runs some operators, where that is allowed."""
    for allowed, answer in ((False, "yes"), (True, "partly")):
        try:
            model.use_backend("triton", allow_fallback=allowed)
            return answer
        except BackendError as error:
            reason = f"no: {error}"
        finally:
            model.use_backend("reference")
    return reason


def check_exact(name: str, larger: bool = False) -> None:
    """Exact passes keep the logits: prefill and a decode of two chunks against eager transformers without a cache; left-padded."""
    model = small(name, larger)
    length = 128 if larger else 32
    exact = resq_compiler.compile(
        model,
        tiny_tokens(4, length),
        calibration_samples=4,
        calibration_length=length,
        unreached_experts="layer",
        **FLOAT,
    )
    ids, mask = tiny_tokens(2, 20, seed=5), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        given = {}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False, **given).logits
        first = exact(ids[:, :17], attention_mask=mask[:, :17], use_cache=True)
        second = exact(ids[:, 17:], attention_mask=mask, past_key_values=first.past_key_values)
    got = torch.cat((first.logits, second.logits), 1)
    assert relative_error(got[mask.bool()], expected[mask.bool()]) <= EXACT


def row(name: str) -> str:
    """The line of a family in the page."""
    model = compiled(name)
    cells = [f"`{name}`", "yes", on_onnx(model, "ort"), on_onnx(model, "qdq"), on_native(model), on_triton(model)]
    return "| " + " | ".join(cells) + " |"


HEAD = """# Families by backend

<!-- written from measurements of small random models; write it again with: python -m tests.families -->

Families of transformers beyond those that [models-and-topology.md](models-and-topology.md) names first, as small random models.

- PyTorch: the exact passes keep the logits of the original within 1e-4, in a prefill and in a decode with a cache, left-padded.
- ONNX, profiles `ort` and `qdq`: ONNX Runtime gives the logits of the model quantized in PyTorch, at 8 bits, in a prefill and a decode of
  several tokens and of one. A value at a tie may fall to the neighbouring code.
- native: profile `native`, and `use_backend("cpu")`, give the logits of the model quantized in PyTorch, with queries and softmax
  weights of 8 bits as the [kernels](cpu.md) have them, or say what they cannot take. On five draws of tokens, most of which must agree
  to rounding.
- Triton: `yes` where every operator of a block has a kernel; `partly` where PyTorch runs some, with `allow_fallback=True`.
  That is what the lowering takes; kernels are compared with their definitions elsewhere.

The last ones are mixtures of experts ([more](models-and-topology.md#mixtures-of-experts)). A.X K1, DeepSeek-V2 and V3,
GLM-4-MoE lite, MiniCPM3 and Youtu have latent attention ([more](models-and-topology.md#latent-attention)).

| family | PyTorch | ONNX `ort` | ONNX `qdq` | native | Triton |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure every family and write the page."""
    torch.set_num_threads(1)
    lines = []
    for name in FAMILIES:
        lines.append(row(name))
        print(lines[-1], flush=True)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
