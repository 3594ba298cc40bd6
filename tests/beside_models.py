"""A Llama whose later blocks read the keys and values of the first, and whose feed-forwards are multiplied by embeddings of each layer.

Its norms write nothing into the stream, so that bases fuse: what models that have these structures do not show.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb

from resq_compiler import tiny as tiny_module

BESIDE = "beside"  # its name where tests ask for families
LAYERS, WIDTH = 3, 96


class ReadingAttention(LlamaAttention):
    """Without keys and values: reads those that the first block has cached."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, *position_embeddings)
        kept = past_key_values.layers[0]
        y, _ = sdpa_attention_forward(self, q, kept.keys, kept.values, attention_mask, scaling=self.scaling)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1)), None


class FactoredMLP(LlamaMLP):
    """Times what is made beside the stream."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.factor)


class BesideForCausalLM(LlamaForCausalLM):
    """LAYERS blocks of WIDTH hidden channels. config.factors: embeddings of each layer, too; else only keys and values are shared."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[1:]:
            layer.self_attn.__class__ = ReadingAttention
            del layer.self_attn.k_proj, layer.self_attn.v_proj
        if config.factors:
            self.table = nn.Embedding(config.vocab_size, LAYERS * WIDTH)
            self.context = nn.Linear(config.hidden_size, LAYERS * WIDTH, bias=False)
            for layer in self.model.layers:
                layer.mlp.__class__ = FactoredMLP

    def forward(self, input_ids=None, **kwargs):
        if self.config.factors:
            made = self.table(input_ids) + self.context(self.model.embed_tokens(input_ids))
            for i, layer in enumerate(self.model.layers):
                layer.mlp.factor = made.unflatten(-1, (LAYERS, WIDTH))[:, :, i]
        result = super().forward(input_ids=input_ids, **kwargs)
        for layer in self.model.layers if self.config.factors else ():
            del layer.mlp.factor  # a copy of the model must not hold it
        return result


def beside_model(factors: bool = True) -> BesideForCausalLM:
    """Random weights, with outliers as those of the tiny models."""
    config = LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, factors=factors,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng():
        model = BesideForCausalLM(config).float().eval()
    tiny_module._fill(model, seed=0)
    return model


@torch.no_grad()
def eager_logits(model: BesideForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the model as transformers runs it, from an empty cache."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=DynamicCache(), use_cache=True
    ).logits
