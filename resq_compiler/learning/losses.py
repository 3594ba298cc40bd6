"""What learning lowers: how far predictions, or outputs of a block, are from those of the float model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resq_compiler.numerics.quantized import FLT_MIN
from resq_compiler.util import devices


@dataclass(frozen=True)
class TopPredictions:
    """The k largest logits of every token of a window, and their ids: [length, k]; float32 and int32, in the memory of the CPU.

    rest: log of the sum of exp(logit) over all other tokens, float32 [length]; -inf where there are none.
    """

    logits: Tensor
    ids: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopPredictions:
        """Of logits [length, vocabulary]."""
        logits = logits.detach().float()
        values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
        return cls(values.cpu(), ids.int().cpu(), of_others(logits, ids).cpu())


def of_others(logits: Tensor, ids: Tensor) -> Tensor:
    """log of the sum of exp(logit) over the tokens that are not in ids: logits [length, vocabulary], ids [length, k] to [length]."""
    return logits.scatter(-1, ids, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Teacher:
    """A fact: what the float model predicts for each window of the calibration text."""

    windows: tuple[TopPredictions, ...]


def divergence(logits: Tensor, teacher: TopPredictions) -> Tensor:
    """Mean over tokens of KL(p || q), where all tokens but the teacher's top k count as one: at most that of the whole vocabulary.

    logits: [length, vocabulary]. What a student gives to the other tokens is seen; over the top alone (`top_divergence`) it would be free.
    """
    found: Tensor = _GroupedDivergence.apply(
        logits, devices.here(teacher.ids).long(), devices.here(teacher.logits), devices.here(teacher.rest)[:, None]
    )
    return found


class _GroupedDivergence(torch.autograd.Function):
    """One function, because a step has no larger values than logits. With the student's softmax s, and p, q of the top k and of the rest

    d/dlogit = q_j - p_j for the top k, and s_j (1 - p_rest / q_rest) for all others
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, aim: Tensor, aim_rest: Tensor) -> Tensor:
        largest = logits.amax(-1, keepdim=True).float()
        gradient = logits.float().sub(largest).exp_()
        top, log_top = gradient.gather(-1, ids), logits.gather(-1, ids).float() - largest
        rest = gradient.scatter_(-1, ids, 0).sum(-1, keepdim=True).clamp_(min=FLT_MIN)
        total = rest + top.sum(-1, keepdim=True)
        log_aim = torch.cat((aim, aim_rest), -1).log_softmax(-1)
        p, log_q = log_aim.exp(), torch.cat((log_top, rest.log()), -1) - total.log()
        loss = torch.where(p > 0, p * (log_aim - log_q), 0.0).sum() / len(p)
        gradient.mul_(1 / total - p[:, -1:] / rest).scatter_(-1, ids, top / total - p[:, :-1])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (gradients[0] / len(gradient)), None, None, None


def top_divergence(logits: Tensor, teacher: TopPredictions) -> Tensor:
    """Mean over tokens of KL(p || q), both distributions over the teacher's top k alone, so that it is never below zero.

    logits: [length, vocabulary]. Source: OSTQuant's KL-Top, arXiv 2501.13987, section 4.3.
    """
    return _divergence(logits.float().gather(-1, devices.here(teacher.ids).long()), devices.here(teacher.logits))


def _divergence(student: Tensor, aim: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), aim.log_softmax(-1), reduction="batchmean", log_target=True)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean over tokens of the next token's negative log-likelihood: logits [length, vocabulary], ids [length]."""
    return F.cross_entropy(logits[:-1].float(), devices.here(ids[1:]))


def relative_square(value: Tensor, target: Tensor) -> Tensor:
    """Squared distance of a block's output from the float one, over the size of the float one: every token counts alike."""
    size = target.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((value.float() - target.float()).square().mean(-1) / size).mean()
