"""What learning lowers: how far predictions, or outputs of a block, are from those of the float model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.util import devices


@dataclass(frozen=True)
class TopPredictions:
    """The k largest logits of every token of a window, and their ids: [length, k]; float32 and int32, in the memory of the CPU."""

    logits: Tensor
    ids: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopPredictions:
        """Of logits [length, vocabulary]."""
        values, ids = logits.detach().float().topk(min(k, logits.shape[-1]), dim=-1)
        return cls(values.cpu(), ids.int().cpu())


@dataclass(frozen=True)
class Teacher:
    """A fact: what the float model predicts for windows: those that it wrote itself, and then all of the calibration text.

    ids: [n, length] int64. windows: the predictions for each.
    """

    ids: Tensor
    windows: tuple[TopPredictions, ...]


def divergence(logits: Tensor, teacher: TopPredictions) -> Tensor:
    """Mean over tokens of KL(p || q), both distributions over the teacher's top k alone, so that it is never below zero.

    logits: [length, vocabulary]. Source: OSTQuant's KL-Top, arXiv 2501.13987, section 4.3.
    """
    student = logits.float().gather(-1, devices.here(teacher.ids).long())
    aim = devices.here(teacher.logits).log_softmax(-1)
    return F.kl_div(student.log_softmax(-1), aim, reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over tokens of the next token's negative log-likelihood: logits [length, vocabulary], ids [length]."""
    return F.cross_entropy(logits[:-1].float(), devices.here(ids[1:]))


def relative_square(value: Tensor, target: Tensor) -> Tensor:
    """Squared distance of a block's output from the float one, over the size of the float one: every token counts alike."""
    size = target.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((value.float() - target.float()).square().mean(-1) / size).mean()
