"""Text the model writes itself: calibration data for when the user gives none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from resq_compiler.errors import DataError
from resq_compiler.numerics import seeds

BATCH_SIZE = 32  # the cache of a 135M model (46 kB a token) then stays under 0.8 GB at 512 tokens


@torch.no_grad()
def sample_windows(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int | None = None,
    batch_size: int = BATCH_SIZE,
    start: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Let the model write windows of text at temperature 1.

    Each window begins with the tokens `start`, or where there are none with a token drawn uniformly, for variety; an
    end-of-text token does not stop a window. All draws come from one private generator on the CPU; the global random
    state and the training mode are left alone.

    Args:    model: a float decoder. samples, length: of the windows. seed: of the draws. vocab_size: ids drawn are
             below it (default: the configuration's). batch_size: windows written at once. start: what begins a text,
             token ids [n]. progress: called with
             (steps done, all steps); a step writes one token in each window of a batch.
    Returns: [samples, length] int64 on the CPU; equal arguments give equal windows on one machine.
    Raises:  DataError: the model's logits are not finite.
    Source:  data-free calibration of LLM-QAT, arXiv 2305.17888, section 3.1; differs: no greedy start.
    """
    vocab_size = vocab_size or model.config.get_text_config().vocab_size
    generator = seeds.generator(seed, "self-written-text")
    sizes = [min(batch_size, samples - start) for start in range(0, samples, batch_size)]
    was_training = model.training
    model.eval()
    try:
        windows = []
        for index, size in enumerate(sizes):
            report = None if progress is None else _offset(progress, index * length, len(sizes) * length)
            if start is None or len(start) == 0:
                first = torch.randint(0, vocab_size, (size, 1), generator=generator)
            else:
                first = start.expand(size, -1)
            windows.append(_write(model, first, length, vocab_size, generator, report))
    finally:
        model.train(was_training)
    return torch.cat(windows)


def _write(
    model: PreTrainedModel,
    first: Tensor,
    length: int,
    vocab_size: int,
    generator: torch.Generator,
    report: Callable[[int], None] | None,
) -> Tensor:
    """One batch [batch, length]: a prefill of the first tokens [batch, n], then a token at a time on the model's own cache."""
    token = first
    written, cache = [token], DynamicCache(config=model.config)
    for position in range(first.shape[1], length):
        output = model(input_ids=token.to(model.device), past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1, :vocab_size].float().cpu()
        if not logits.isfinite().all():
            raise DataError(
                f"self-written calibration text: the model's logits are NaN or infinite at position {position}; "
                "check the weights, or load the model in float32 or bfloat16"
            )
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        written.append(token)
        if report is not None:
            report(position + 1)
    return torch.cat(written, 1)


def _offset(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(start + done, total)
