"""Tensors of a compiled graph on disk: safetensors files, with codes below 8 bits packed (numerics/packing.py).

`describe` says how each tensor is kept: {"dtype", "shape"} as in memory, "bits" where codes are packed, for each expert where they differ,
"same_as" where two names share one tensor. The description is written with the graph, and `read` checks the files against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.errors import CheckpointError
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.promises import Promised, Stored
from resq_compiler.ir.views import CodedLinear
from resq_compiler.numerics.packing import pack, packed_length, unpack
from resq_compiler.storage import packed_experts
from resq_compiler.storage.streaming import NAMES, save_file
from resq_compiler.util import memory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKED_BITS = range(2, 8)


def describe(gm: GraphModule) -> dict[str, dict[str, Any]]:
    """How each tensor that the graph refers to is kept on disk, by name."""
    bits = _code_bits(gm)
    info: dict[str, dict[str, Any]] = {}
    first: dict[tuple, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        name, value = str(node.target), graph_tools.held(gm, node)
        fields: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        if name in bits:
            fields["bits"] = bits[name]
        original = first.setdefault(_identity(value), name) if value.numel() else name
        if original != name:
            fields["same_as"] = original
        info[name] = fields
    return info


def _identity(value: Tensor) -> tuple:
    """Equal for names of one tensor."""
    if isinstance(value, Promised):
        return (value.promise,)
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _code_bits(gm: GraphModule) -> dict[str, int | list[int]]:
    """Bits of the weight codes that pack into fewer bytes, by tensor name; a list where experts differ."""
    bits: dict[str, int | list[int]] = {}
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        linear = CodedLinear.of(node)
        if linear is None or part is None:
            continue
        if part.expert_bits is not None:
            bits[str(linear.qdata.target)] = list(part.expert_bits)
        elif part.weight_bits in PACKED_BITS:
            bits[str(linear.qdata.target)] = part.weight_bits
    return bits


@memory.sparing()
def write(gm: GraphModule, info: Mapping[str, Mapping[str, Any]], directory: Path, max_shard_size: str | int) -> None:
    """Write model.safetensors, or shards and their index where it would be larger than `max_shard_size`; a tensor in memory at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards

    like = {name: _like(fields) for name, fields in sorted(info.items()) if "same_as" not in fields}
    plan = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
    mode = directory.stat().st_mode & 0o666
    for file, names in plan.filename_to_tensors.items():
        chosen = {name: like[name] for name in names}
        save_file(chosen, directory / file, lambda name: _packed(gm, name, info[name]), {"format": "pt"})
        (directory / file).chmod(mode)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _like(fields: Mapping[str, Any]) -> Tensor:
    """A tensor without values, as it is on disk."""
    shape, dtype = _on_disk(fields)
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def _on_disk(fields: Mapping[str, Any]) -> tuple[list[int], str]:
    """Shape and type in a file."""
    shape, bits = list(fields["shape"]), fields.get("bits")
    if isinstance(bits, list):
        return [packed_experts.stops(bits, shape)[-1]], "uint8"
    return ([*shape[:-1], packed_length(shape[-1], bits)], "uint8") if bits else (shape, str(fields["dtype"]))


def _packed(gm: GraphModule, name: str, fields: Mapping[str, Any]) -> Tensor:
    value = graph_tools.made(gm, name)
    bits = fields.get("bits")
    if isinstance(bits, list):
        packed = packed_experts.pack(value.cpu(), bits)
    else:
        packed = value.cpu().contiguous() if bits is None else pack(value.cpu(), bits)
    if packed.data_ptr() != value.data_ptr():
        memory.page_out_tensor(value)
    return packed


def read(directory: Path, info: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """All tensors, where they lie: mapped from their files, and promised where codes are packed; nothing is read but headers.

    Raises CheckpointError: a file or tensor is missing, cut off or of another shape.
    """
    files = _files(directory, info)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                present = set(opened.keys())
                for name in (name for name, home in files.items() if home == file):
                    _check(name, opened.get_slice(name) if name in present else None, info[name], file)
                    tensors[name] = _lying(opened.get_tensor(name), info[name])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory / file}: not readable ({error}); the file is damaged or incomplete"
            ) from error
    for name, fields in info.items():
        if "same_as" in fields:
            tensors[name] = tensors[fields["same_as"]]
    return tensors


def _files(directory: Path, info: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The file that holds each stored tensor."""
    stored = [name for name, fields in info.items() if "same_as" not in fields]
    index = directory / INDEX
    if not index.is_file():
        home = {name: WEIGHTS for name in stored}
    else:
        home = read_json(index).get("weight_map", {})
        missing = [name for name in stored if name not in home]
        if missing:
            raise CheckpointError(f"{index}: the graph refers to tensor {missing[0]}, which no file holds")
    for file in sorted({home[name] for name in stored}):
        if Path(file).name != file or not (directory / file).is_file():
            raise CheckpointError(f"{directory}: {file} is missing; copy or download the whole directory again")
    return {name: home[name] for name in stored}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError: absent, unreadable, or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: {path.name} is missing; copy or download the whole directory again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); the file is damaged") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}; the file is damaged")
    return data


def _check(name: str, lying: Any, fields: Mapping[str, Any], file: str) -> None:
    if lying is None:
        raise CheckpointError(
            f"{file}: the graph refers to tensor {name}, which is missing; the files do not belong together"
        )
    expected, code = _on_disk(fields), lying.get_dtype()
    dtype = next((str(known).removeprefix("torch.") for known, text in NAMES.items() if text == code), code)
    if (lying.get_shape(), dtype) != expected:
        raise CheckpointError(
            f"{file}: tensor {name} should be {expected[1]} {expected[0]} and is {dtype} {lying.get_shape()}; "
            "the files are damaged or do not belong together"
        )


def _lying(value: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """A tensor as it was in memory: the mapped one, or a promise of the codes that are packed in it."""
    if "bits" not in fields:
        return value
    if isinstance(fields["bits"], list):
        return Promised(packed_experts.promise(value, fields["bits"], fields["shape"]))
    bits, length = int(fields["bits"]), int(fields["shape"][-1])
    unpacked = Stored(fields["shape"], torch.int8, lambda start, stop: unpack(value[start:stop], bits, length), value)
    return Promised(unpacked)
