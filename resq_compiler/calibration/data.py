"""Windows of token ids [n, length] from whatever text or tokens the user has."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from resq_compiler.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = (".txt", ".jsonl")
_EXPECTED = (
    "a list of texts, a path to a .txt or .jsonl file, token-id tensors, batches with input_ids, a DataLoader or "
    "Dataset, 'demo' (built-in English text), or None (the model writes its own text)"
)
DEMO = "demo"  # stands for `demo_text`
Bos = Literal["auto", "never"]
"""Whether windows of text begin as the tokenizer begins a text, such as with a beginning-of-sequence token; "never": as papers measure."""


class Piece(NamedTuple):
    """Token ids [t], where they came from, in words, and whether they were a text."""

    where: str
    ids: Tensor
    text: bool


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
             iterable of those; dict with input_ids (and attention_mask) or with text, or an iterable of those
             (DataLoader, torch or `datasets` Dataset); None: the model writes its own text.
             vocab_size: ids must be below it. model: needed for None. tokenizer: needed for texts. seed, progress: used
             for None, see `self_written.sample_windows`.
    Returns: [n, sequence_length] int64 on the CPU, n <= samples.
    Raises:  DataError: unreadable, empty, shorter than one window, out of vocabulary, not integers, or text without a
             tokenizer.
    """
    if calib_data is None:
        start = text_start(tokenizer, bos)
        return _self_written(model, samples, sequence_length, seed, vocab_size, start, progress)
    pieces = _pieces(calib_data, tokenizer, "calibration data")
    ids, text = _join(pieces, vocab_size, samples * sequence_length)
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
    if isinstance(source, str) and not _names_a_file(source):
        source = [source]
    limit = None if max_windows is None else skip + max_windows * length
    ids, text = _join(_pieces(source, tokenizer, "evaluation data"), vocab_size, limit)
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


def demo_text() -> tuple[str, str]:
    """English text that every Python brings along: the language reference, as shown by help().

    Every other topic goes to the second text, and a paragraph that was used before is left out, so the two share none.
    The words depend on the Python version: good for demos and tests, not for published figures.
    Returns (calibration text, evaluation text), each more than 40,000 tokens of a common vocabulary.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                texts[index % 2].append(paragraph.strip("\n"))
    return "\n\n".join(texts[0]), "\n\n".join(texts[1])


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
        raise DataError(f"calibration data: None needs the model, to write its own text; expected {_EXPECTED}")
    from resq_compiler.calibration.self_written import sample_windows

    return sample_windows(model, samples, length, seed, vocab_size, start=start, progress=progress)


def _join(pieces: Iterable[Piece], vocab_size: int | None, limit: int | None) -> tuple[Tensor, bool]:
    """The first `limit` tokens [t] of all pieces, each checked against the vocabulary, and whether they were texts."""
    found: list[Tensor] = []
    count, texts = 0, False
    for where, ids, text in pieces:
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


def _pieces(data: Any, tokenizer: PreTrainedTokenizerBase | None, what: str) -> Iterator[Piece]:
    for where, item in _items(data, what):
        for ids, text in _token_ids(item, where, tokenizer):
            yield Piece(where, ids, text)


def _items(data: Any, what: str) -> Iterator[tuple[str, Any]]:
    """The entries of the data with a name for messages; nothing is read ahead."""
    if isinstance(data, str) and data == DEMO:
        yield "the built-in text", demo_text()[0]
    elif isinstance(data, (str, Path)):
        yield from _read(data, what)
    elif isinstance(data, (Tensor, Mapping)) or _is_array(data) or _are_ids(data):
        yield what, data
    elif hasattr(data, "__iter__"):
        yield from ((f"{what}, item {i}", item) for i, item in enumerate(data))
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a torch map-style Dataset never ends an iteration
        yield from ((f"{what}, item {i}", data[i]) for i in range(len(data)))
    else:
        raise DataError(f"{what}: expected {_EXPECTED}; got {type(data).__name__}")


def _read(path: str | Path, what: str) -> Iterator[tuple[str, str]]:
    if not _names_a_file(path):
        shown = str(path) if len(str(path)) < 80 else f"{str(path)[:77]}..."
        raise DataError(f"{what}: expected a path to .txt or .jsonl; got {shown!r}; put a text into a list: [text]")
    path = Path(path).expanduser()
    try:
        if path.suffix.lower() == ".txt":
            yield f"{what}, {path}", path.read_text(encoding="utf-8")
        else:
            with path.open(encoding="utf-8") as lines:
                yield from _json_texts(lines, f"{what}, {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what}: cannot read {path}: {error}; expected a file of UTF-8 text") from error


def _json_texts(lines: Iterable[str], where: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, line {number}: expected an object in JSON; got a line where {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            got = f"the fields {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
            raise DataError(f'{where}, line {number}: expected an object with a string field "text"; got {got}')
        yield f"{where}, line {number}", record["text"]


def _names_a_file(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or ("\n" not in text and text.lower().endswith(_FILES))


def _token_ids(item: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[Tensor, bool]]:
    """Token ids [t] int64 of one entry, and whether it was a text; a batch gives one tensor."""
    if isinstance(item, str):
        yield _encode(item, where, tokenizer), True
    elif isinstance(item, Mapping):
        yield from _mapping_ids(item, where, tokenizer)
    elif isinstance(item, Tensor) or _is_array(item) or _are_ids(item):
        yield _flat_ids(item, where), False
    elif isinstance(item, (list, tuple)) and item and all(isinstance(part, (str, list)) for part in item):
        for part in item:
            yield from _token_ids(part, where, tokenizer)
    elif isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor):
        yield _flat_ids(item[0], where), False  # (input_ids, labels, ...), as a DataLoader over a TensorDataset gives
    else:
        raise DataError(f"{where}: expected a text, token ids or a dict with input_ids or text; got {_describe(item)}")


def _mapping_ids(
    item: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[Tensor, bool]]:
    if "input_ids" in item:
        yield _flat_ids(item["input_ids"], where, item.get("attention_mask")), False
    elif "text" in item:
        yield from _token_ids(item["text"], where, tokenizer)
    else:
        raise DataError(f"{where}: expected a dict with input_ids or text; got the keys {', '.join(map(str, item))}")


def _encode(text: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if tokenizer is None:
        raise DataError(f"{where}: a text needs a tokenizer, and there is none; pass tokenizer=, or token ids")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _flat_ids(values: Any, where: str, mask: Any = None) -> Tensor:
    """Check token ids [t] or [rows, t] and lay them end to end without the positions where the mask is 0."""
    ids = _as_tensor(values, where)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise DataError(f"{where}: expected token ids as integers (torch.long); got {ids.dtype} {list(ids.shape)}")
    if ids.dim() not in (1, 2):
        raise DataError(f"{where}: expected token ids [tokens] or [rows, tokens]; got the shape {list(ids.shape)}")
    ids = ids.to("cpu", torch.long)
    if mask is None:
        return ids.flatten()
    keep = _as_tensor(mask, where).cpu()
    if keep.shape != ids.shape:
        raise DataError(f"{where}: expected attention_mask {list(ids.shape)}, as input_ids; got {list(keep.shape)}")
    return ids[keep != 0]


def _as_tensor(values: Any, where: str) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        got = _describe(values)
        raise DataError(f"{where}: expected token ids in rows of one length; got {got}: {error}") from error


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "dtype")


def _are_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(part) is int for part in value)


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}" + (f", the first a {type(value[0]).__name__}" if value else "")
    return type(value).__name__
