"""Windows of token ids [n, length] from whatever text or tokens the user has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from resq_compiler.calibration.rows import DEMO, EXPECTED, Piece, demo_text, names_a_file, pieces
from resq_compiler.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO", "Bos", "calibration_windows", "demo_text", "text_start", "text_windows"]

Bos = Literal["auto", "never"]
"""Whether windows of text begin as the tokenizer begins a text, such as with a beginning-of-sequence token; "never": as papers measure."""


def calibration_windows(
    calib_data: Any,
    *,
    samples: int,
    sequence_length: int,
    vocab_size: int,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    bos: Bos = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Cut the first samples * sequence_length tokens of the data into contiguous windows.

    Texts are tokenized without special tokens and joined, as are tensors and the rows of batches; positions that an
    attention_mask hides are dropped. Windows of text begin with what the tokenizer puts before a text (bos "auto"), if
    that is anything; token ids are taken as they are. Data is read only as far as needed. Where there is less than asked for, a warning
    says how much, and the windows that could be cut come back.

    Args:    calib_data: list of texts; path (str or Path) to a .txt file or to a .jsonl file with a "text" in each
             line; "demo" for the first text of `demo_text`; tensor, array or list of token ids, 1-D or 2-D, or an
             iterable of those; dict with input_ids (and attention_mask), with text, or with messages, which the tokenizer's
             chat template writes, or an iterable of those (DataLoader, torch or `datasets` Dataset), in rows of any
             lengths; None: the model writes its own text. Rows of None are left out with a warning.
             vocab_size: ids must be below it. model: needed for None. tokenizer: needed for texts. seed, progress: used
             for None, see `self_written.sample_windows`.
    Returns: [n, sequence_length] int64 on the CPU, n <= samples.
    Raises:  DataError: unreadable, empty, shorter than one window, out of vocabulary, not integers, or text without a
             tokenizer.
    """
    tokenizer = _opened(tokenizer)
    if calib_data is None:
        start = text_start(tokenizer, bos)
        return _self_written(model, samples, sequence_length, seed, vocab_size, start, progress)
    found = pieces(calib_data, tokenizer, "calibration data")
    ids, text = _join(found, vocab_size, samples * sequence_length)
    start = text_start(tokenizer, bos) if text else NOTHING
    return _cut(ids, sequence_length, samples, "calibration data", start)


def text_windows(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    max_windows: int | None = None,
    *,
    skip: int = 0,
    vocab_size: int | None = None,
    bos: Bos = "auto",
) -> Tensor:
    """Cut evaluation data into contiguous, non-overlapping windows.

    Args:    source: a text, or anything `calibration_windows` takes except None (a string that ends in .txt or .jsonl
             is a path). tokenizer: needed for texts. length: tokens in a window. max_windows: at most that many
             (default: all that are full). skip: tokens left out at the start. vocab_size: ids must be below it.
             bos: as for `calibration_windows`.
    Returns: [n, length] int64 on the CPU.
    Raises:  DataError: as `calibration_windows`.
    """
    if source is None:
        raise DataError("evaluation data: expected a text, a path or token ids; got None")
    if isinstance(source, str) and not names_a_file(source):
        source = [source]
    tokenizer = _opened(tokenizer)
    limit = None if max_windows is None else skip + max_windows * length
    ids, text = _join(pieces(source, tokenizer, "evaluation data"), vocab_size, limit)
    start = text_start(tokenizer, bos) if text else NOTHING
    return _cut(ids[skip:], length, max_windows, "evaluation data", start)


NOTHING = torch.empty(0, dtype=torch.long)
"""No tokens."""


def text_start(tokenizer: PreTrainedTokenizerBase | None, bos: Bos = "auto") -> Tensor:
    """The token ids [n] int64 that a tokenizer puts before a text; none without a tokenizer, or with bos "never"."""
    if tokenizer is None or bos == "never":
        return NOTHING
    bare, whole = (tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"] for added in (False, True))
    found = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return torch.tensor(whole[:found], dtype=torch.long)


def _opened(tokenizer: Any) -> Any:
    """A tokenizer, also where its directory or hub id is given."""
    if isinstance(tokenizer, (str, Path)):
        from resq_compiler.frontend.models import open_tokenizer

        return open_tokenizer(tokenizer)
    return tokenizer


def _self_written(
    model: PreTrainedModel | None,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    start: Tensor,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    if model is None:
        raise DataError(f"calibration data: None needs the model, to write its own text; expected {EXPECTED}")
    from resq_compiler.calibration.self_written import sample_windows

    return sample_windows(model, samples, length, seed, vocab_size, start=start, progress=progress)


def _join(parts: Iterable[Piece], vocab_size: int | None, limit: int | None) -> tuple[Tensor, bool]:
    """The first `limit` tokens [t] of all pieces, each checked against the vocabulary, and whether they were texts."""
    found: list[Tensor] = []
    count, texts = 0, False
    for where, ids, text in parts:
        _check_vocabulary(ids, vocab_size, where)
        found.append(ids)
        count, texts = count + len(ids), texts or text
        if limit is not None and count >= limit:
            break
    return (torch.cat(found)[:limit] if found else NOTHING), texts


def _cut(ids: Tensor, whole: int, count: int | None, what: str, start: Tensor) -> Tensor:
    """Windows of `whole` tokens, each `start` and then the next of the ids."""
    length = whole - len(start)
    if length < 1:
        raise DataError(
            f"{what}: a window of {whole} tokens holds none but the {len(start)} that begin a text; ask for longer windows"
        )
    available = len(ids) // length
    if available == 0:
        came = f"only {len(ids)} tokens came" if len(ids) else "it is empty (0 tokens came)"
        raise DataError(f"{what}: {came}, one window needs {length}; give more text, or ask for shorter windows")
    if count is not None and available < count:
        warnings.warn(
            f"{what}: {count} windows of {length} tokens were asked for ({count * length} tokens); {len(ids)} tokens "
            f"came: using {available} windows",
            stacklevel=3,
        )
    used = available if count is None else min(count, available)
    return torch.cat((start.expand(used, -1), ids[: used * length].view(used, length)), 1)


def _check_vocabulary(ids: Tensor, vocab_size: int | None, where: str) -> None:
    bad = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if bad.any():
        index = int(bad.nonzero()[0, 0])
        raise DataError(
            f"{where}: token {index} is {int(ids[index])}; expected ids from 0 to below the vocabulary size "
            f"{vocab_size}; was the data tokenized for another model?"
        )
