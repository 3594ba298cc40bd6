"""Write a safetensors file tensor by tensor: one of them in memory at a time.

The bytes are those of safetensors' own writer: eight bytes, the length of the header; the header, JSON, padded with spaces to eight bytes;
the values, those of larger types first, by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from resq_compiler.util import memory

NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Of types, in the order of a file."""
PIECE = 32 * 2**20  # bytes that are written at a time


def save_file(
    like: Mapping[str, Tensor], path: Path, make: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """like: shapes and types by name, without values; make: the value of a name, contiguous, in the CPU's memory."""
    order = list(NAMES)
    names = sorted(like, key=lambda name: (order.index(like[name].dtype), name))
    head: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + like[name].nbytes
        shape = list(like[name].shape)
        head[name] = {"dtype": NAMES[like[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _append(file, make(name), like[name])


def _append(file: BinaryIO, value: Tensor, like: Tensor) -> None:
    """Write a value piece by piece; of one that lies in a file itself no more is in memory."""
    assert (value.shape, value.dtype) == (like.shape, like.dtype), f"{value.shape}, {value.dtype} for {like}"
    if not value.numel():
        return
    for piece in value.reshape(-1).view(torch.uint8).split(PIECE):
        file.write(piece.numpy().data)
        memory.page_out_tensor(piece)
    memory.page_out_tensor(value)  # pages that two pieces share
