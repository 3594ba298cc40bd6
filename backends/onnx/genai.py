"""genai_config.json: what onnxruntime-genai needs to run an exported directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resq_compiler.backends.onnx.profiles import PREFILL_CHUNK, PROFILES

if TYPE_CHECKING:
    from resq_compiler.model.compiled_model import CompiledModel


def genai_config(compiled: CompiledModel, profile: str) -> dict[str, Any]:
    """Settings for the generic decoder type: the names of inputs and outputs, sizes, token ids, session options."""
    text = compiled.config.get_text_config()
    spec = compiled.cache_specs[0]
    context = int(getattr(text, "max_position_embeddings", None) or 2048)
    eos = token_ids(compiled, "eos_token_id")
    model: dict[str, Any] = {
        "type": "decoder",
        "bos_token_id": first(token_ids(compiled, "bos_token_id"), 0),
        "eos_token_id": eos if len(eos) > 1 else first(eos, 0),
        "pad_token_id": first(token_ids(compiled, "pad_token_id"), first(eos, 0)),
        "vocab_size": int(text.vocab_size),
        "context_length": context,
        "decoder": {
            "filename": "model.onnx",
            "head_size": spec.key_dim,
            "hidden_size": int(text.hidden_size),
            "num_attention_heads": int(text.num_attention_heads),
            "num_key_value_heads": spec.num_heads,
            "num_hidden_layers": len(compiled.cache_specs),
            "session_options": {"log_id": "resq", "provider_options": [], **PROFILES[profile].session_options},
            "inputs": {
                "input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        },
    }  # fmt: skip
    return {"model": model, "search": search_options(compiled, context)}


def search_options(compiled: CompiledModel, context: int) -> dict[str, Any]:
    """Generation defaults; the cache grows by concatenation, so its buffers are not shared. Prompts run in chunks, as in our runtime."""
    generation = compiled.generation_config
    options = {"max_length": context, "past_present_share_buffer": False, "do_sample": bool(generation.do_sample)}
    options["chunk_size"] = PREFILL_CHUNK
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if getattr(generation, name, None) is not None:
            options[name] = getattr(generation, name)
    return options


def token_ids(compiled: CompiledModel, name: str) -> list[int]:
    """Special token ids of the generation settings, else of the configuration."""
    for holder in (compiled.generation_config, compiled.config):
        value = getattr(holder, name, None)
        if value is not None:
            return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return []


def first(values: list[int], default: int) -> int:
    return values[0] if values else default
