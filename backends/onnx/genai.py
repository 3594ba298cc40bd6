"""genai_config.json: what onnxruntime-genai needs to run an exported directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resq_compiler.backends.onnx.profiles import PREFILL_CHUNK, PROFILES

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult


def genai_config(compiled: CompileResult, profile: str) -> dict[str, Any]:
    """Settings for the generic decoder type: the names of inputs and outputs, sizes, token ids, session options."""
    text = compiled.config.get_text_config()
    spec = compiled.cache_specs[0]
    context = int(getattr(text, "max_position_embeddings", None) or 2048)
    model: dict[str, Any] = {
        "type": "decoder",
        **special_tokens(compiled),
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
    settings = {"model": model, "search": search_options(compiled, context)}
    return _native(settings, compiled) if PROFILES[profile].native else settings


def _native(settings: dict[str, Any], compiled: CompileResult) -> dict[str, Any]:
    """The library of the kernels, and a packed row of the cache as the head. Past and present are one buffer, written in place."""
    from resq_compiler.backends.onnx.native import cache_rows, kernels_library

    decoder = settings["model"]["decoder"]
    decoder["head_size"] = cache_rows(compiled.graph_module)[0]
    decoder["session_options"]["custom_ops_library"] = kernels_library().name
    settings["search"]["past_present_share_buffer"] = True
    del settings["search"]["chunk_size"]  # it refuses batches, and attention of the kernels needs no chunks
    return settings


def search_options(compiled: CompileResult, context: int) -> dict[str, Any]:
    """Generation defaults; the cache grows by concatenation, so its buffers are not shared. Prompts run in chunks, as in our runtime."""
    generation = compiled.generation_config
    options = {"max_length": context, "past_present_share_buffer": False, "do_sample": bool(generation.do_sample)}
    options["chunk_size"] = PREFILL_CHUNK
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if getattr(generation, name, None) is not None:
            options[name] = getattr(generation, name)
    return options


def special_tokens(compiled: CompileResult) -> dict[str, Any]:
    """bos, eos and pad ids; bos and eos only where the model has them.

    onnxruntime-genai always has a padding token, 0 unless told, and stops at it where there is no end of sequence: without either,
    padding is the last token of the vocabulary, which is the likeliest to be a filler that no text holds.
    """
    bos, eos, pad = (token_ids(compiled, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    found: dict[str, Any] = {}
    if bos:
        found["bos_token_id"] = bos[0]
    if eos:
        found["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    found["pad_token_id"] = (pad or eos or [int(compiled.config.get_text_config().vocab_size) - 1])[0]
    return found


def token_ids(compiled: CompileResult, name: str) -> list[int]:
    """Special token ids of the generation settings, else of the configuration. Some models say -1 for a token they have not."""
    for holder in (compiled.generation_config, compiled.config):
        value = getattr(holder, name, None)
        if value is not None:
            ids = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
            return [i for i in ids if i >= 0]
    return []
