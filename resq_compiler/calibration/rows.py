"""Token ids from whatever text or tokens the user has, a row at a time: texts, files, batches, conversations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from resq_compiler.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (".txt", ".jsonl")
EXPECTED = (
    "a list of texts, a path to a .txt or .jsonl file, token-id tensors, batches with input_ids, rows with text or messages, a "
    "DataLoader or Dataset, 'demo' (built-in English text), or None (the model writes its own text)"
)
DEMO = "demo"  # stands for `demo_text`


class Piece(NamedTuple):
    """Token ids [t], where they came from, in words, and whether they were a text."""

    where: str
    ids: Tensor
    text: bool


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


def pieces(data: Any, tokenizer: PreTrainedTokenizerBase | None, what: str) -> Iterator[Piece]:
    """The rows of the data as token ids; nothing is read ahead. A row that is None, or holds None, is left out with a warning.

    Raises DataError, naming the row: unreadable, not integers, no such form, or text without a tokenizer.
    """
    for where, item in _items(data, what):
        for ids, text in _token_ids(item, where, tokenizer):
            yield Piece(where, ids, text)


def _items(data: Any, what: str) -> Iterator[tuple[str, Any]]:
    """The entries of the data with a name for messages; nothing is read ahead."""
    if isinstance(data, str) and data == DEMO:
        yield "the built-in text", demo_text()[0]
    elif isinstance(data, (str, Path)):
        yield from _read(data, what)
    elif isinstance(data, (Tensor, Mapping)) or _is_array(data) or _are_ids(data) or _is_conversation(data):
        yield what, data
    elif hasattr(data, "__iter__"):
        yield from ((f"{what}, item {i}", item) for i, item in enumerate(data))
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a torch map-style Dataset never ends an iteration
        yield from ((f"{what}, item {i}", data[i]) for i in range(len(data)))
    else:
        raise DataError(f"{what}: expected {EXPECTED}; got {type(data).__name__}")


def _read(path: str | Path, what: str) -> Iterator[tuple[str, Any]]:
    if not names_a_file(path):
        shown = str(path) if len(str(path)) < 80 else f"{str(path)[:77]}..."
        raise DataError(f"{what}: expected a path to .txt or .jsonl; got {shown!r}; put a text into a list: [text]")
    path = Path(path).expanduser()
    try:
        if path.suffix.lower() == ".txt":
            yield f"{what}, {path}", path.read_text(encoding=_UTF8)
        else:
            with path.open(encoding=_UTF8) as lines:
                yield from _json_rows(lines, f"{what}, {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what}: cannot read {path}: {error}; expected a file of UTF-8 text") from error


_UTF8 = "utf-8-sig"  # with a byte-order mark or without


def _json_rows(lines: Iterable[str], where: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}, line {number}: expected an object in JSON; got a line where {error}") from error
        if record is not None and not (
            isinstance(record, dict) and ("messages" in record or _is_text(record.get("text", 0)))
        ):
            got = f"the fields {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f'{where}, line {number}: expected an object with a string field "text", or "messages"; got {got}'
            )
        yield f"{where}, line {number}", record


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def names_a_file(source: str | Path) -> bool:
    text = str(source)
    return isinstance(source, Path) or ("\n" not in text and text.lower().endswith(_FILES))


def _token_ids(item: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[tuple[Tensor, bool]]:
    """Token ids [t] int64 of one entry, and whether it was a text; a batch gives several, or one that holds all its rows."""
    if item is None:
        warnings.warn(f"{where}: holds None; such rows are left out", stacklevel=2)
    elif isinstance(item, str):
        yield _encode(item, where, tokenizer), True
    elif isinstance(item, Mapping):
        yield from _mapping_ids(item, where, tokenizer)
    elif isinstance(item, Tensor) or _is_array(item) or _are_ids(item):
        yield _flat_ids(item, where), False
    elif _is_conversation(item):
        yield _encode(_as_text(item, where, tokenizer), where, tokenizer), True
    elif (
        isinstance(item, (list, tuple)) and item and all(part is None or isinstance(part, (str, list)) for part in item)
    ):
        for part in item:
            yield from _token_ids(part, where, tokenizer)
    elif isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor):
        yield _flat_ids(item[0], where), False  # (input_ids, labels, ...), as a DataLoader over a TensorDataset gives
    else:
        raise DataError(
            f"{where}: expected a text, token ids, messages, or a dict with input_ids, text or messages; got {_describe(item)}"
        )


def _mapping_ids(
    item: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[Tensor, bool]]:
    name = next((name for name in ("input_ids", "text", "messages") if name in item), None)
    if name is None:
        raise DataError(
            f"{where}: expected a dict with input_ids, text or messages; got the keys {', '.join(map(str, item))}"
        )
    if name != "input_ids" or item[name] is None:
        yield from _token_ids(item[name], where, tokenizer)
    elif _is_ragged(item[name]):
        masks = item.get("attention_mask")
        for i, row in enumerate(item[name]):
            yield _flat_ids(row, f"{where}, row {i}", None if masks is None else _mask_of_row(masks, i, where)), False
    else:
        yield _flat_ids(item[name], where, item.get("attention_mask")), False


def _is_ragged(rows: Any) -> bool:
    """True for several rows of different lengths."""
    lists = isinstance(rows, (list, tuple)) and rows and all(isinstance(row, (list, tuple, Tensor)) for row in rows)
    return bool(lists) and len({len(row) for row in rows}) > 1


def _mask_of_row(masks: Any, row: int, where: str) -> Any:
    if not isinstance(masks, (list, tuple, Tensor)) or len(masks) <= row:
        raise DataError(f"{where}: expected a row of attention_mask for every row of input_ids; got {_describe(masks)}")
    return masks[row]


def _is_conversation(item: Any) -> bool:
    """True for messages of a chat: objects with a role and a content."""
    return isinstance(item, (list, tuple)) and bool(item) and all(isinstance(m, Mapping) and "role" in m for m in item)


def _as_text(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as the tokenizer's chat template writes it."""
    if getattr(tokenizer, "chat_template", None) is None or tokenizer is None:
        raise DataError(f"{where}: messages need a tokenizer with a chat template; give texts, or token ids")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:  # templates raise what they like
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{where}: the chat template does not take these messages ({reason}); expected the roles it knows"
        ) from error


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
