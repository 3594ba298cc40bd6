"""Masks that callers give a decoder, as a graph takes them: which of the cached and new tokens are no padding, [B, P + S] int64.

A mask of four dimensions is taken where it says no more than causality, the windows of the layers, and padding do. Transformers gives
such a mask to every layer as it is, and a dict of them to the layers of each type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph
from transformers import PreTrainedConfig

from resq_compiler.errors import BackendError
from resq_compiler.ir.mask_views import CausalMask

Windows = frozenset[int | None]
"""How many of the latest keys a layer sees, of all layers; None: all keys."""

_MASKED = -1e4  # additive masks say "not seen" by this and anything below
_FULL, _SLIDING = "full_attention", "sliding_attention"


def windows_of(graph: Graph, config: PreTrainedConfig) -> Windows:
    """The windows of a graph's layers; empty where the configuration has windows that the graph does not name."""
    found = frozenset(mask.window for node in graph.nodes if (mask := CausalMask.of(node)) is not None)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [_SLIDING if getattr(text, "sliding_window", None) else _FULL]
    named = found or frozenset({None})
    return frozenset() if set(kinds) != {_FULL} and named == {None} else named


def checked_mask(attention_mask: Any, ids: Tensor, past: int, windows: Windows) -> Tensor:
    """The mask of padding [B, P + S] for ids [B, S] behind `past` tokens. Raises BackendError: it says anything else."""
    batch, new = ids.shape
    if attention_mask is None:
        return ids.new_ones(batch, past + new)
    if isinstance(attention_mask, Mapping):
        return _of_types(attention_mask, ids, past, windows)
    if not isinstance(attention_mask, Tensor):
        raise BackendError(f"forward: attention_mask: expected a tensor; got {type(attention_mask).__name__}")
    if attention_mask.dim() == 4:
        return _padding(attention_mask, ids, past, windows)
    if attention_mask.shape != (batch, past + new):
        raise BackendError(
            f"forward: attention_mask: expected [{batch}, {past + new}], a column for each of {past} cached and {new} new tokens; "
            f"got {list(attention_mask.shape)}"
        )
    return attention_mask.long()


def _of_types(masks: Mapping[str, Any], ids: Tensor, past: int, windows: Windows) -> Tensor:
    """Of a mask of four dimensions for each type of layers."""
    types = {_FULL: windows & {None}, _SLIDING: windows - {None}}
    if not all(type_ in types and isinstance(m, Tensor) and m.dim() == 4 for type_, m in masks.items()):
        got = {k: f"{list(m.shape)}" if isinstance(m, Tensor) else type(m).__name__ for k, m in masks.items()}
        raise BackendError(
            f"forward: attention_mask: expected a tensor, or tensors of four dimensions for {_FULL} and {_SLIDING}; got {got}"
        )
    missing = [type_ for type_, own in types.items() if own and type_ not in masks]
    if missing:
        raise BackendError(f"forward: attention_mask: {', '.join(missing)}: no mask for layers of this type")
    first, *others = [_padding(masks[type_], ids, past, own) for type_, own in types.items() if own]
    if not all(other.equal(first) for other in others):
        raise BackendError("forward: attention_mask: the masks of the types of layers say different padding")
    return first


def _padding(mask: Tensor, ids: Tensor, past: int, windows: Windows) -> Tensor:
    """Of a mask [B, heads, S, at least P + S], boolean or additive."""
    (batch, new), total = ids.shape, past + ids.shape[1]
    what = f"forward: attention_mask {list(mask.shape)}"
    if len(mask) not in (1, batch) or mask.shape[2] != new or mask.shape[3] < total:
        raise BackendError(f"{what}: expected [{batch}, 1, {new}, {total}]")
    if not windows:
        raise BackendError(
            f"{what}: some layers of this model see a window, which its graph does not name; expected a mask [{batch}, {total}] of padding"
        )
    seen = mask if mask.dtype == torch.bool else mask == 0
    plain = mask.dtype == torch.bool or bool((seen | (mask <= _MASKED)).all())
    alike = bool((seen == seen[:, :1]).all()) and not bool(seen[..., total:].any())
    rows = seen[:, 0, :, :total].expand(batch, -1, -1)
    real = rows[:, :, past:].diagonal(dim1=1, dim2=2)
    if not plain or not alike or not all(_says_no_more(rows, real, window) for window in windows):
        raise BackendError(f"{what}: {_more(windows, batch, total)}")
    return torch.cat((_cached(rows, real, windows), real), 1).long()


def _shape(new: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """bool [S, T]: causality, and the window."""
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    return causal if window is None else causal.triu(total - new - window + 1)


def _cached(rows: Tensor, real: Tensor, windows: Windows) -> Tensor:
    """bool [B, P]: cached tokens that a new one sees; those that are out of every window count as no padding."""
    new, total = rows.shape[1:]
    within = torch.stack([_shape(new, total, window, rows.device) for window in windows]).any(0)
    past = total - new
    return (rows[:, :, :past] & real[:, :, None]).any(1) | ~within[:, :past].any(0)


def _says_no_more(rows: Tensor, real: Tensor, window: int | None) -> bool:
    """Whether rows of tokens that are no padding see what causality, a window and padding leave."""
    padding = torch.cat((_cached(rows, real, frozenset({window})), real), 1)
    new, total = rows.shape[1:]
    shape = _shape(new, total, window, rows.device)
    fits = (rows == shape & padding[:, None]).all(-1)
    return bool((fits | ~real).all())


def _more(windows: Windows, batch: int, total: int) -> str:
    sizes = ", ".join(str(w) for w in sorted(w for w in windows if w is not None))
    cannot = "do, which a compiled graph cannot take; expected"
    if sizes and None in windows:
        found = f"causality, the windows of {sizes} tokens that some layers see, and padding do; give a dict with a mask each for "
        found += f"{_FULL} and {_SLIDING}, or"
    elif sizes:
        found = f"causality, the window of {sizes} tokens and padding {cannot}"
    else:
        found = f"causality and padding {cannot}"
    return (
        f"says more than {found} a mask [{batch}, {total}] of padding; texts that are packed into one row are told apart by "
        "position_ids, without a mask and with use_cache=False"
    )
