"""A float model that is opened, not read: its structure, and a promise of every weight (ir/promises.py).

A directory is read slice by slice from its safetensors files, or from mapped .bin files, a GGUF file tensor by tensor, a model in memory
where it lies. Where
transformers would merge or turn tensors of the checkpoint on the way in, or would complain, it reads the whole.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from resq_compiler.errors import ModelError
from resq_compiler.frontend.long_rope import forget_long_factors
from resq_compiler.frontend.merged import Sources, sources_of
from resq_compiler.frontend.source import ModelSource
from resq_compiler.ir.promises import Promise, Stacked, Stored, in_memory
from resq_compiler.util import memory

log = logging.getLogger(__name__)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN = "pytorch_model.bin.index.json", "pytorch_model.bin"
ROW_BYTES = 2048  # of rows that gguf turns into floats: longer ones leave the caches


@dataclass(frozen=True)
class OpenedModel:
    """A float decoder without its weights.

    skeleton: the model, its parameters on the meta device, its buffers with values. weights: a promise of every parameter, by name.
    whole: reads the model into memory, for what cannot do with less. The rest is as in LoadedModel.
    """

    skeleton: PreTrainedModel
    weights: Mapping[str, Promise]
    tokenizer: PreTrainedTokenizerBase | None
    where: str
    source: ModelSource
    whole: Callable[[], PreTrainedModel]

    def values(self) -> Iterator[tuple[str, torch.Size, Iterable[Tensor]]]:
        """Names, shapes and values of parameters and saved buffers, by name, some rows at a time."""
        for name, held in sorted(self.skeleton.state_dict().items()):
            yield name, held.shape, self.weights[name].pieces() if name in self.weights else (held,)


def of_instance(model: PreTrainedModel, tokenizer: Any, where: str, source: ModelSource) -> OpenedModel:
    """A model in memory, which is left as it is; floats count as float32."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    memo: dict[int, Any] = {id(p): _absent(p) for p in parameters.values()}
    skeleton = copy.deepcopy(model, memo)
    forget_long_factors(skeleton)
    for module in skeleton.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.float()
    weights = {name: in_memory(p.detach()) for name, p in parameters.items()}
    return OpenedModel(skeleton.eval(), weights, tokenizer, where, source, lambda: model)


def _absent(parameter: Tensor) -> nn.Parameter:
    dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are built without values of parameters; buffers get theirs."""
    register = nn.Module.register_parameter

    def absent(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _absent(parameter))

    nn.Module.register_parameter = absent  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skeleton_of(config: Any) -> PreTrainedModel:
    """The model of a configuration, its parameters on the meta device."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # which is part of what was left out
    return model.eval()


def safetensors_weights(directory: Path, skeleton: PreTrainedModel) -> dict[str, Promise] | None:
    """A promise of every parameter from the safetensors files of a directory; None where only transformers can read them.

    Raises ModelError: the index names a file that is not there, or a file is cut off.
    """
    files = _files(directory, INDEX, SINGLE)
    if files is None:
        return None
    shapes = {file: _header(directory / file) for file in sorted(set(files.values()))}

    def stored(key: str) -> Stored:
        shape = shapes[files[key]].get(key)
        if shape is None:
            raise ModelError(
                f"model {directory}: {INDEX} says that {files[key]} holds {key}, and it does not; the files do not belong together"
            )
        file = directory / files[key]
        return Stored(shape, torch.float32, _reader(file, key), pick=_picker(file, key))

    return _promised(sorted(files), stored, skeleton)


def bin_weights(directory: Path, skeleton: PreTrainedModel) -> dict[str, Promise] | None:
    """A promise of every parameter from the .bin files of a directory, which are mapped; None where only transformers can read them."""
    files = _files(directory, BIN_INDEX, BIN)
    if files is None:
        return None
    values: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        try:
            values |= torch.load(directory / file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError):
            return None  # of a format before torch 1.6, or damaged, which transformers says
    return _promised(sorted(values), lambda key: in_memory(values[key]), skeleton)


def _files(directory: Path, index: str, single: str) -> dict[str, str] | None:
    """The file of every tensor of a checkpoint, by its index, or of the single file (of a .bin file, of no tensor in particular); None
    where there are no such files."""
    if (directory / index).is_file():
        try:
            files = json.loads((directory / index).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"model {directory}: {index} is not readable ({error}); download it again") from error
        absent = sorted({name for name in files.values() if not (directory / name).is_file()})
        if absent:
            raise ModelError(
                f"model {directory}: {index} names {len(set(files.values()))} files and {len(absent)} are not there, the first is "
                f"{absent[0]}; download the whole directory again"
            )
        return dict(files)
    if (directory / single).is_file():
        return {"": single} if single == BIN else dict.fromkeys(_header(directory / single), single)
    return None


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a file. Raises ModelError: it is damaged or cut off."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model file {file}: not readable ({error}); it is damaged or was cut off: download it again"
        ) from error


def _reader(file: Path, name: str) -> Callable[[int, int], Tensor]:
    def read(start: int, stop: int) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            lying = opened.get_slice(name)
            value: Tensor = lying[start:stop] if lying.get_shape() else opened.get_tensor(name)
            return value.float()

    return read


def _picker(file: Path, name: str) -> Callable[[Tensor], Tensor]:
    def pick(rows: Tensor) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            lying: Tensor = opened.get_tensor(name)  # mapped: only pages of these rows are read
            return lying[rows].float()

    return pick


def _promised(
    keys: list[str], stored: Callable[[str], Promise], skeleton: PreTrainedModel
) -> dict[str, Promise] | None:  # fmt: skip
    """A promise of every parameter from the tensors of a checkpoint, and values of buffers, in the skeleton; None where transformers does
    more with them than stack experts, or would complain of a shape."""
    sources = _named(keys, skeleton)
    if sources is None:
        return None
    buffers = dict(skeleton.named_buffers())
    found, named = dict[str, Promise](), {**buffers, **dict(skeleton.named_parameters(remove_duplicate=False))}
    for name, source in sources.items():
        pieces = [[stored(key) for key in expert] for expert in source.keys]
        if source.stacked and len({tuple(p.shape for p in expert) for expert in pieces}) > 1:
            return None
        found[name] = Stacked(pieces) if source.stacked else pieces[0][0]
        if found[name].shape != named[name].shape:
            return None  # transformers says which, and what to do
    for name in buffers.keys() & found.keys():
        buffers[name].copy_(found.pop(name).whole())
    return _with_tied(found, skeleton)


def _named(keys: list[str], skeleton: PreTrainedModel) -> dict[str, Sources] | None:
    """The tensors of a checkpoint for each parameter; None where some have no place, or are turned or split on the way in."""
    sources = sources_of(keys, skeleton)
    if sources is None:
        return None
    expected = set(skeleton.state_dict())
    prefix = f"{skeleton.base_model_prefix}."
    ignored = [re.compile(p) for p in skeleton._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, Sources] = {}
    for key, source in sources.items():
        name = next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in expected), None)
        if name is None and not any(pattern.search(key) for pattern in ignored):
            return None
        if name is not None:
            found[name] = source
    return found


def _with_tied(found: dict[str, Promise], skeleton: PreTrainedModel) -> dict[str, Promise] | None:
    """With the names of tied parameters; None where a parameter is missing."""
    named = dict(skeleton.named_parameters(remove_duplicate=False))
    by_tensor = {id(named[name]): promise for name, promise in found.items()}
    everything = {name: found.get(name) or by_tensor.get(id(p)) for name, p in named.items()}
    whole = {name: promise for name, promise in everything.items() if promise is not None}
    return whole if len(whole) == len(named) else None


def gguf_weights(file: Path, skeleton: PreTrainedModel) -> dict[str, Promise] | None:
    """A promise of every parameter from a GGUF file; None where only transformers can read it."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader = gguf.GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    parsed = reading.load_gguf_checkpoint(str(file), return_tensors=False)
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=parsed["config"])
    if type(processor) not in (reading.TensorProcessor, reading.LlamaTensorProcessor):
        return None  # merges experts, or more
    names = reading.get_gguf_hf_weights_map(skeleton, processor)
    found: dict[str, Promise] = {}
    for tensor in reader.tensors:
        name, shape = names.get(tensor.name), tuple(int(n) for n in reversed(tensor.shape))
        if name is None or name not in skeleton.state_dict():
            continue  # as transformers does; apply_gguf_rope looks at what is left
        if shape != tuple(skeleton.get_parameter(name).shape):
            return None
        found[name] = _gguf_tensor(tensor, processor, shape)
    return _with_tied(found, skeleton)


def _gguf_tensor(tensor: Any, processor: Any, shape: tuple[int, ...]) -> Stored:
    turned = ".attn_q." in tensor.name or ".attn_k." in tensor.name

    def read(start: int, stop: int) -> Tensor:
        stored = tensor.data if turned else tensor.data[start:stop]
        value = _dequantized(stored, tensor.tensor_type)
        memory.page_out(stored.ctypes.data, stored.nbytes)
        if not turned:
            return torch.from_numpy(value.copy() if np.shares_memory(value, tensor.data) else value)
        value = processor.process(weights=value, name=tensor.name).weights
        return torch.from_numpy(value[start:stop].copy())

    return Stored(shape, torch.float32, read)


def _dequantized(stored: Any, kind: Any) -> Any:
    """Rows of a GGUF tensor as floats. gguf works on 16 rows at a time, in calls that cost more than the arithmetic of short rows: it gets
    fewer and longer ones, which are the same blocks of numbers."""
    from gguf import dequantize

    rows, together = np.asarray(stored), 1  # a memmap, whose every view is one more call into Python
    if rows.ndim != 2:
        return dequantize(rows, kind)
    while rows.shape[0] % (2 * together) == 0 and rows.shape[1] * 2 * together <= ROW_BYTES:
        together *= 2
    return dequantize(rows.reshape(rows.shape[0] // together, -1), kind).reshape(rows.shape[0], -1)
