"""What trained decoders have and random weights have not, put into the tiny ones.

    enormous channels   a few channels of the residual stream are 1,000 times the others, and the norms that read it put them down: gains
                        over three orders of magnitude and more, near zero on these channels
    sink                the beginning-of-sequence token has massive activations in two channels
    biased keys         where keys have biases (Qwen2, OPT), a channel of every head has a large one
    heavy tails         a few hidden channels of feed-forwards are far larger than the others, a few are near dead

Linears of OLMo2 read the stream without a norm, so nothing can put channels down for them: the enormous ones are 10 times the others there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from resq_compiler.numerics import seeds

ENORMOUS = (3, 17, 42, 58)
"""Channels of the residual stream; half of them are negative, so that the mean that a LayerNorm takes off stays small."""

SINK = (29, 36)
"""Channels of the massive activations of the beginning-of-sequence token."""

HOT, DEAD = slice(0, 8), slice(8, 16)
"""Hidden channels of every feed-forward that are large, and near dead."""

KEY_BIAS = 20.0
NO_NORM_BEFORE_LINEARS = ("olmo2",)
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@torch.no_grad()
def make_realistic(model: PreTrainedModel, seed: int) -> None:
    """Change the weights of a tiny model in place. Its predictions stay far from uniform and from certain."""
    generator = seeds.generator(seed, "tiny-realistic")
    unguarded = model.config.model_type in NO_NORM_BEFORE_LINEARS
    table: Any = model.get_input_embeddings().weight
    normed_writers = any(path.endswith("post_feedforward_layernorm") for path, _ in model.named_modules())
    size = 10.0 if unguarded else 1000.0
    enlarge(table, size, model.config.bos_token_id, generator)
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        if reads_the_stream(name, modules[owner]):
            put_down(module, size / (8 if normed_writers else 16), generator)
        elif unguarded and name in READERS:
            module.weight[:, list(ENORMOUS + SINK)] /= size
        if name == "k_proj" and module.bias is not None:
            bias_keys(module.bias, model.config.num_attention_heads, model.config.hidden_size)
        elif name == "mlp":
            stretch(module.up_proj.weight if hasattr(module, "up_proj") else expanding(module), contracting(module))
        elif hasattr(module, "fc1"):
            stretch(module.fc1.weight, module.fc2.weight)


def enlarge(table: Tensor, size: float, bos: int, generator: Generator) -> None:
    """Enormous channels for all tokens, about alike; massive activations for the first."""
    signs = torch.tensor([1.0, -1.0]).repeat(len(ENORMOUS) // 2)
    common = 1 + 0.1 * torch.randn(len(table), 1, generator=generator)
    std = table.std()
    table[:, list(ENORMOUS)] = size * std * common * signs
    table[bos, list(SINK)] = 10 * size * std * torch.tensor([1.0, -1.0])


def reads_the_stream(name: str, owner: Any) -> bool:
    """Whether a module is a norm whose output linears read."""
    if "norm" not in name or name in ("q_norm", "k_norm", "post_feedforward_layernorm"):
        return False
    return not (name == "post_attention_layernorm" and hasattr(owner, "post_feedforward_layernorm"))


def put_down(norm: Any, typical: float, generator: Generator) -> None:
    """Gains and biases that bring ordinary channels up to one and leave nothing of enormous ones."""
    gain = typical * 10 ** (0.3 * torch.randn(norm.weight.shape, generator=generator))
    gain[list(ENORMOUS + SINK)] = 1e-4
    if getattr(norm, "bias", None) is not None:
        norm.bias[list(ENORMOUS + SINK)] = 0
    norm.weight.copy_(gain - 1 if "Gemma" in type(norm).__name__ else gain)  # Gemma's norms add one


def bias_keys(bias: Tensor, heads: int, hidden: int) -> None:
    """A large bias in the channel of every head that rotary embeddings turn least."""
    width = hidden // heads
    bias.view(-1, width)[:, width // 2 - 1] = KEY_BIAS


def expanding(mlp: Any) -> Tensor:
    """Rows of hidden channels where there is no up_proj: the second half of a fused one, or all."""
    if hasattr(mlp, "gate_up_proj"):
        return mlp.gate_up_proj.weight.chunk(2)[1]
    return mlp.dense_h_to_4h.weight


def contracting(mlp: Any) -> Tensor:
    """The weight of the down projection."""
    return (mlp.down_proj if hasattr(mlp, "down_proj") else mlp.dense_4h_to_h).weight


def stretch(up: Tensor, down: Tensor) -> None:
    """Make hidden channels large, as much as the down projection takes back, and others near dead."""
    factors = torch.logspace(0.5, 1.5, HOT.stop - HOT.start)
    up[HOT] *= factors[:, None]
    down[:, HOT] /= factors
    up[DEAD] *= 1e-3
