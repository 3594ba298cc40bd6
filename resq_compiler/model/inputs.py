"""What callers give a decoder, as a graph takes it: ids and positions [B, S], a mask [B, P + S], all int64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resq_compiler.errors import BackendError


def checked_ids(input_ids: Any, vocab_size: int) -> Tensor:
    """Token ids [B, S] int64. Raises BackendError: no such thing, or ids that are not in the vocabulary (looked at on the CPU only)."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or 0 in input_ids.shape:
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise BackendError(f"forward: input_ids: expected a tensor [batch, tokens] with at least one token; got {got}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise BackendError(f"forward: input_ids: expected integers; got {input_ids.dtype}")
    ids = input_ids.long()
    if ids.device.type == "cpu":
        low, high = (int(t) for t in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise BackendError(
                f"forward: input_ids: expected ids from 0 to below the vocabulary size {vocab_size}; got {low if low < 0 else high}"
            )
    return ids


def checked_positions(
    position_ids: Tensor | None, mask: Tensor, new: int, longest: int | None = None, longest_row: int | None = None
) -> Tensor:  # fmt: skip
    """Positions of the new tokens [B, S] int64; padding takes no position where nothing is said.

    longest: text that the model's table of positions has room for; longest_row: the same with padding.
    Raises BackendError: past them (positions are looked at on the CPU only).
    """
    positions = _positions(position_ids, mask, new)
    if longest is not None and positions.device.type == "cpu" and int(positions.max()) >= longest:
        raise BackendError(
            f"forward: position {int(positions.max())}: this model has learned {longest} positions, give it no longer text"
        )
    if longest_row is not None and mask.shape[1] > longest_row:
        raise BackendError(
            f"forward: a row of {mask.shape[1]} tokens, padding among them: this model has biases for {longest_row}, give it no longer rows"
        )
    return positions


def _positions(position_ids: Tensor | None, mask: Tensor, new: int) -> Tensor:
    if position_ids is None:
        return (mask.cumsum(-1) - 1).clamp_min(0)[:, -new:]
    shape = (len(mask), new)
    if (
        position_ids.dim() not in (1, 2)
        or position_ids.shape[-1] != new
        or len(position_ids.view(-1, new)) not in (1, len(mask))
    ):
        raise BackendError(f"forward: position_ids: expected {list(shape)}; got {list(position_ids.shape)}")
    return position_ids.long().expand(shape)


def checked_labels(labels: Any, logits: Tensor) -> Tensor:
    """Labels [B, S] int64, -100 where there is none. Raises BackendError: of another shape, no integers, or out of the vocabulary."""
    size = logits.shape[-1]
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:2] or labels.is_floating_point():
        got = f"{list(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise BackendError(
            f"forward: labels: expected integers {list(logits.shape[:2])}, as the logits that are kept; got {got}"
        )
    found = labels.long()
    if found.device.type == "cpu" and not bool(((found == -100) | ((found >= 0) & (found < size))).all()):
        raise BackendError(f"forward: labels: expected token ids below {size}, or -100 for none; got others")
    return found


def checked_kept(logits_to_keep: Any, tokens: int) -> int | Tensor:
    """Which logits are asked for: of the last so many tokens (0: all), or of those at indices. Raises BackendError: no such tokens."""
    if isinstance(logits_to_keep, Tensor):
        integers = logits_to_keep.dim() == 1 and logits_to_keep.dtype in (torch.long, torch.int32)
        fits = integers and (
            logits_to_keep.numel() == 0 or -tokens <= int(logits_to_keep.min()) <= int(logits_to_keep.max()) < tokens
        )
    else:
        fits = isinstance(logits_to_keep, int) and logits_to_keep >= 0
    if not fits:
        raise BackendError(
            f"forward: logits_to_keep: expected a number of tokens, or indices [n] below {tokens}; got {logits_to_keep!r}"
        )
    kept: int | Tensor = logits_to_keep
    return kept


def checked_prompt(prompt: Any, options: Mapping[str, Any], vocab_size: int) -> Tensor | None:
    """The prompt of `generate`, [B, S] int64, None where there is none.

    Raises BackendError for a prompt, a mask or a number of beams that transformers would use before it looks at them.
    """
    ids = None if prompt is None else checked_ids(prompt, vocab_size)
    if ids is not None:
        mask = options.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise BackendError(f"generate: attention_mask: expected {list(ids.shape)}, as input_ids; got {got}")
    for name in ("num_beams", "num_return_sequences"):
        value = options.get(name)
        if value is not None and value < 1:
            raise BackendError(f"generate: {name}: expected at least 1; got {value}")
    return ids


@dataclass(frozen=True)
class PackedTexts:
    """Texts that came packed into rows, now with a row each, padded on the left: ids, mask and positions [texts, longest].

    row, column [B, S]: where each token went.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    row: Tensor
    column: Tensor


def packed_texts(ids: Tensor, position_ids: Tensor) -> PackedTexts | None:
    """The texts of rows whose positions begin again or jump, as transformers tells them apart; None where no row holds several."""
    positions = checked_positions(position_ids, torch.ones_like(ids), ids.shape[1])
    number = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    if not bool(number.any()):
        return None
    rows, width = ids.shape
    place = torch.arange(rows * width, device=ids.device).view(rows, width)
    row = torch.unique(number + width * (place // width), return_inverse=True)[1]
    lengths = torch.bincount(row.flatten())
    starts = lengths.cumsum(0) - lengths
    longest = int(lengths.max())
    column = place - starts[row] + longest - lengths[row]
    tables = []
    for content in (ids, torch.ones_like(ids), positions):
        tables.append(ids.new_zeros(len(lengths), longest))
        tables[-1][row, column] = content
    return PackedTexts(tables[0], tables[1], tables[2], row, column)
