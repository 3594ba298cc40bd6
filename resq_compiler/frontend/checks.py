"""What a model must be to be compiled: finite, and causal. Asked of the model itself, since configurations do not say it reliably."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from resq_compiler.errors import ModelError
from resq_compiler.frontend.capture import runnable_attention


def check_model(model: PreTrainedModel) -> None:
    """Raise ModelError unless the weights are finite and a token cannot change the logits before it."""
    check_finite(model)
    check_causal(model)


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Raise ModelError naming the first parameter or buffer with a NaN or an infinity; skips meta tensors."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            check_finite_tensor(name, tensor)


@torch.no_grad()
def check_finite_tensor(name: str, tensor: Tensor) -> None:
    """Raise ModelError if a weight holds a NaN or an infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)  # allocates nothing; a NaN anywhere comes through
    if not (smallest.isfinite() and largest.isfinite()):
        bad = int((~tensor.isfinite()).sum())
        raise ModelError(
            f"model weights: {name} {list(tensor.shape)} has {bad} values that are NaN or infinite; "
            "the checkpoint is damaged or overflowed its dtype: load it again, or in float32 or bfloat16"
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise ModelError if a change of the last of three tokens changes the logits of the first two.

    Configurations do not say this reliably (encoders such as BERT have language-model classes too), so the model
    is asked. A model on the meta device is passed over.
    """
    if model.device.type == "meta":
        return
    was_training = model.training
    ids = differing_texts(model.config.get_text_config().vocab_size).to(model.device)
    try:
        with runnable_attention(model):
            logits = model.eval()(input_ids=ids).logits[:, :2].float()
    except Exception as error:
        raise ModelError(
            f"model {type(model).__name__}: cannot compute logits from token ids alone: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; expected a decoder-only language model that runs on input_ids"
        ) from error
    finally:
        model.train(was_training)
    require_causal(logits, type(model).__name__, 1e-4 if model.dtype.itemsize >= 4 else 0.03)  # bfloat16: 4e-3 a step


def differing_texts(vocab_size: int) -> Tensor:
    """Token ids [2, 3] that differ in the third token."""
    return torch.tensor([[3, 4, 5], [3, 4, 6]]) % vocab_size


def require_causal(logits: Tensor, where: str, tolerance: float = 1e-4) -> None:
    """Raise ModelError unless two sequences that differ in the third token have equal logits [2, tokens, V] before it, but for rounding."""
    before = logits[:, :2].float()
    if (before[0] - before[1]).abs().max() > tolerance * before.abs().max():
        raise ModelError(
            f"model {where}: the third token changes the logits of the first two, so this is not a "
            "causal decoder; expected a decoder-only language model (an encoder such as BERT cannot be compiled)"
        )
