"""genai_config.json: what onnxruntime-genai needs to run an exported directory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from resq_compiler.backends.onnx.profiles import PREFILL_CHUNK, PROFILES

from resq_compiler.frontend.long_rope import short_length

if TYPE_CHECKING:
    from resq_compiler.result import CompileResult

log = logging.getLogger("resq_compiler")

RECOMPUTES = ("phi3", 4096)
"""The model type for which onnxruntime-genai computes a cache again when a text outgrows its short factors, and the length it knows."""


def genai_config(compiled: CompileResult, profile: str) -> dict[str, Any]:
    """Settings: the names of inputs and outputs, sizes, token ids, session options."""
    text = compiled.config.get_text_config()
    spec = compiled.cache_specs[0]
    kind, context = kind_and_context(compiled)
    model: dict[str, Any] = {
        "type": kind,
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


def genai_takes(compiled: CompileResult) -> bool:
    """Whether keys and values of all layers have one shape, which is all that genai_config.json can say; a warning where not."""
    shapes = {(s.num_heads, width) for s in compiled.cache_specs for width in (s.key_dim, s.value_dim)}
    if len(shapes) > 1:
        log.warning(
            "genai_config.json is left out: parts of this model's cache have different shapes (heads x width: %s), and onnxruntime-genai "
            "knows one; this package's runtime (resq generate) runs the model", ", ".join(f"{h} x {w}" for h, w in sorted(shapes)),
        )  # fmt: skip
    return len(shapes) == 1


def kind_and_context(compiled: CompileResult) -> tuple[str, int]:
    """The model type and the longest text. A LongRoPE model that no type fits ends where its short factors do."""
    text = compiled.config.get_text_config()
    context, short = int(getattr(text, "max_position_embeddings", None) or 2048), short_length(text.to_dict())
    kind, known = RECOMPUTES
    if short is None or short == known:
        return ("decoder" if short is None else kind), context
    log.warning(
        "genai_config.json: context_length %d instead of %d: onnxruntime-genai does not switch to the long factors of this model's "
        "rotary embedding; this package's runtime does", short, context,
    )  # fmt: skip
    return "decoder", short


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
    """Generation defaults; the cache grows by concatenation, so its buffers are not shared. Prompts run in chunks, as in our runtime,
    but for LongRoPE, where the last position decides for all.
    """
    generation = compiled.generation_config
    options = {"max_length": context, "past_present_share_buffer": False, "do_sample": bool(generation.do_sample)}
    if short_length(compiled.config.get_text_config().to_dict()) is None:
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
