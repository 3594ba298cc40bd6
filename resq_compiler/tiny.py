"""Tiny random decoders, one per architecture family: made in milliseconds, for tests and documentation.

Every width differs from the others (hidden 64, intermediate 160, vocabulary 131, keys 32 or 48), so a mix-up of
dimensions fails. Norm gains and biases are random, so a gain that is dropped or folded twice shows in the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from resq_compiler.errors import ModelError
from resq_compiler.numerics import seeds
from resq_compiler.tiny_realistic import make_realistic

SLIDING_WINDOW = 6  # shorter than any sequence worth testing
_COMMON = {
    "vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 160, "num_key_value_heads": 2}
_WIDE_HEADS = {**_GATED, "head_dim": 24}  # 4 heads x 24 = 96, not the hidden size
_GEMMA = {**_WIDE_HEADS, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 20}
_NEOX = {**_COMMON, "intermediate_size": 160, "rotary_pct": 0.5}

# family -> (model type of transformers, its configuration)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GATED, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**_GATED, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {**_GATED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_WIDE_HEADS, "tie_word_embeddings": False}),
    "mistral": ("mistral", {**_GATED, "sliding_window": SLIDING_WINDOW, "tie_word_embeddings": False}),
    "phi3": ("phi3", {**_GATED, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3": (
        "gemma3_text",
        {**_GEMMA, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": ("olmo2", {**_GATED, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 160, "word_embed_proj_dim": 64, "tie_word_embeddings": True}),
}
TINY_FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny_model(family: str, *, seed: int = 0, realistic: bool = False, **overrides: Any) -> PreTrainedModel:
    """Make a random two- or three-layer decoder, float32, in evaluation mode, on the CPU.

    Weights have the variance 1/fan_in, so every block changes its input by about as much as the input itself and the
    logits are far from flat. The global random state is left as it was.

    Args:    family: one of TINY_FAMILIES. seed: of the weights. realistic: with enormous channels, gains that put them down, and
             the like (tiny_realistic.py). overrides: of the transformers config.
    Returns: the model; equal arguments give equal weights.
    Raises:  ModelError: no such family.
    """
    if family not in _FAMILIES:
        raise ModelError(f"tiny_model: expected a family out of {', '.join(TINY_FAMILIES)}; got {family!r}")
    model_type, values = _FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**{**values, **overrides})
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, seed)
    if realistic:
        make_realistic(model, seed)
    return model.eval()


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a private generator, in the order of their names in the model."""
    generator = seeds.generator(seed, "tiny-model")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.add_(0.2 * noise)  # gains around one (or Gemma's zero), biases around zero
        elif id(parameter) in embeddings:
            parameter.copy_(0.25 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def tiny_tokens(batch: int, length: int, *, vocab_size: int = 131, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] int64, for the tiny models by default."""
    return torch.randint(0, vocab_size, (batch, length), generator=seeds.generator(seed, "tiny-tokens"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every ASCII character, 131 in all as the tiny models have; other characters become "?"."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ("<pad>", "<s>", "</s>")
    tokens = [*special, *map(chr, range(128))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **names)
