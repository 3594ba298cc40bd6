"""How good a model is: perplexity on windows of text, and how far it moved from a reference model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from resq_compiler.errors import DataError
from resq_compiler.frontend.positions import longest_text

CHUNK_BYTES = 32 * 2**20  # of float32 logits worked on at once; two or three such buffers live at a time


@dataclass(frozen=True)
class Evaluation:
    """Means over all predicted positions; the last two fields are None without a reference.

    nll is in nats per token and perplexity is exp(nll). kl is KL(reference || model) in nats per token. top1_agreement
    is the fraction of positions where both models rank the same token first. seconds is time in the model itself.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float
    tokens_per_second: float
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class _Sums:
    """Totals over positions, in double precision."""

    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    positions: int = 0
    seconds: float = 0.0


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Any],
    windows: Tensor,
    reference: Callable[[Tensor], Any] | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure next-token prediction at positions 1 .. L-1 of every window, each window on its own.

    Besides what the models return for one batch (their logits), memory grows by less than 200 MB: logits are reduced in
    float32 a chunk of positions at a time, and the reference runs beside the model, so nothing is stored. A model that is run block by
    block (ByBlocks) has its blocks run first, for as many windows as it keeps at once.

    Args:    model, reference: called with ids [b, L] int64; return an object with .logits [b, L, V]. windows: [n, L],
             L at least 2. batch_size: windows in one call. progress: called with (windows done, all windows).
    Returns: Evaluation.
    Raises:  DataError: windows of another shape or dtype, longer than a model's learned positions, logits of another shape or not finite.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2 or windows.dtype != torch.long:
        raise DataError(
            f"evaluate: expected windows [n, L] of torch.long, n at least 1 and L at least 2; "
            f"got {list(windows.shape)} of {windows.dtype}"
        )
    for who, evaluated in (("model", model), ("reference", reference)):
        limit = longest_text(evaluated)
        if limit is not None and windows.shape[1] > limit:
            raise DataError(
                f"evaluate: windows of {windows.shape[1]} tokens; the {who} has learned {limit} positions: cut windows of at most {limit}"
            )
    sums = _Sums()
    for first, batches in _groups(windows, batch_size, (model, reference)):
        sums.seconds += _prepare(model, batches)
        _prepare(reference, batches)
        for i, batch in enumerate(batches):
            start = first + i * batch_size
            _add_batch(sums, model, reference, batch, start)
            if progress is not None:
                progress(start + len(batch), len(windows))
    nll = sums.nll / sums.positions
    return Evaluation(
        perplexity=math.exp(nll) if nll < 700 else math.inf,  # exp overflows a double near 710
        nll=nll,
        tokens=sums.positions,
        seconds=sums.seconds,
        tokens_per_second=windows.numel() / sums.seconds,
        kl=None if reference is None else sums.kl / sums.positions,
        top1_agreement=None if reference is None else sums.agreed / sums.positions,
    )


def _groups(windows: Tensor, batch_size: int, models: Sequence[Any]) -> Iterator[tuple[int, list[Tensor]]]:
    """The first window, and batches, of as many windows as models that are run block by block take at once; else of all."""
    limits = [one.at_once(windows.shape[1]) for one in models if hasattr(one, "at_once")]
    step = max(min(limits, default=len(windows)) // batch_size, 1) * batch_size
    for first in range(0, len(windows), step):
        yield first, list(windows[first : first + step].split(batch_size))


def _prepare(model: Any, batches: Sequence[Tensor]) -> float:
    """Run the blocks of a model that is run block by block (by_blocks.py). Returns the seconds it took."""
    began = time.perf_counter()
    if hasattr(model, "prepare"):
        model.prepare(batches)
    return time.perf_counter() - began


def _add_batch(sums: _Sums, model: Any, reference: Any, batch: Tensor, start: int) -> None:
    began = time.perf_counter()
    logits = _logits(model, batch, "model")
    sums.seconds += time.perf_counter() - began
    expected = None if reference is None else _logits(reference, batch, "reference")
    if expected is not None and expected.shape != logits.shape:
        raise DataError(
            f"evaluate: model and reference give logits {list(logits.shape)} and {list(expected.shape)}; "
            "expected one shape (do they share a vocabulary?)"
        )
    for row in range(len(batch)):
        where = f"window {start + row}"
        theirs = None if expected is None else expected[row, :-1]
        _add_window(sums, logits[row, :-1], theirs, batch[row, 1:], where)


def _logits(model: Any, batch: Tensor, who: str) -> Tensor:
    device = getattr(model, "device", None)
    output = model(batch if device is None else batch.to(device))
    logits = output.logits
    if logits.dim() != 3 or logits.shape[:2] != batch.shape:
        raise DataError(f"evaluate: expected {who} logits {[*batch.shape, 'V']}; got {list(logits.shape)}")
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # else the time would be that of the launch
    return logits


def _add_window(sums: _Sums, logits: Tensor, expected: Tensor | None, targets: Tensor, where: str) -> None:
    """Add the predictions of one window: logits and expected [t, V], targets [t]."""
    positions, vocabulary = logits.shape
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for begin in range(0, positions, step):
        part = slice(begin, begin + step)
        log_p = _log_softmax(logits[part], "model", where)
        target = targets[part].to(log_p.device)[:, None]
        sums.nll -= float(log_p.gather(1, target).double().sum())
        sums.positions += len(log_p)
        if expected is not None:
            log_q = _log_softmax(expected[part].to(log_p.device), "reference", where)
            sums.agreed += int((log_p.argmax(1) == log_q.argmax(1)).sum())
            sums.kl += _kl_sum(log_q, log_p)


def _log_softmax(logits: Tensor, who: str, where: str) -> Tensor:
    """A new float32 tensor [t, V]; a NaN or infinity in the logits is an error."""
    smallest, largest = torch.aminmax(logits)  # a mask's -inf would do no harm, but no decoder here puts one out
    if not (smallest.isfinite() and largest.isfinite()):
        raise DataError(
            f"evaluate: {who} logits of {where} contain NaN or infinity; "
            "check the weights (resq_compiler.frontend.checks.check_finite) and the dtype, or dump the stages"
        )
    return logits.float().log_softmax(-1)


def _kl_sum(log_q: Tensor, log_p: Tensor) -> float:
    """Sum over positions of KL(q || p) = sum q (log q - log p); overwrites both to spare memory."""
    difference = log_p.neg_().add_(log_q)
    return float(difference.mul_(log_q.exp_()).sum(-1).double().sum())
