"""What lies beside or inside a model's files and transformers would pass over without a word: found here, applied or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from resq_compiler.errors import ModelError

ADAPTER = "adapter_config.json"
_LFS = b"version https://git-lfs"
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_MERGE = (
    "merge it into its base first, peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(directory), "
    "and compile that directory"
)


def check_directory(path: Path) -> None:
    """Raise ModelError for a directory with an adapter, or with weight files that Git LFS has not fetched."""
    if (path / ADAPTER).is_file():
        raise ModelError(f"model directory {path}: holds an adapter ({ADAPTER}, such as LoRA); {_MERGE}")
    for file in sorted(path.iterdir()):
        if file.suffix in _WEIGHTS and file.is_file():
            check_fetched(file)


def check_hub(name: str) -> None:
    """Raise ModelError for a repository of the hub with an adapter, before its download. Without a network, what is cached counts."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name)
    except (OSError, ValueError):  # no such repository: who loads it says so
        return
    if found is not None:
        raise ModelError(f"model {name}: the repository holds an adapter ({ADAPTER}, such as LoRA); {_MERGE}")


def check_fetched(file: Path) -> None:
    """Raise ModelError for a file that stands for one in Git LFS."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise ModelError(f"model file {file}: is a pointer of Git LFS, not the weights; run: git lfs pull")


def check_no_adapter(model: object) -> None:
    """Raise ModelError for a model that carries an adapter, as peft wraps it or as transformers attaches it."""
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"model {type(model).__name__}: carries an adapter (such as LoRA); {_MERGE}")


def apply_gguf_rope(model: PreTrainedModel, file: Path) -> None:
    """Scale the rotary frequencies as a GGUF file says, which transformers leaves out where its configuration has no place for it.

    rope_freqs.weight divides each frequency (Llama 3.1 and later), `rope.scaling.type` linear all of them.
    Raises ModelError for other scalings, with the name of the key.
    """
    import gguf

    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") != "default":
        return  # transformers has read it
    reader = gguf.GGUFReader(file)
    keys = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in reader.tensors if t.name.startswith("rope_")}
    divisor = _divisor(keys, tensors, file)
    if divisor is None:
        return
    names = ("inv_freq", "original_inv_freq")
    found = [(m, name) for m in model.modules() for name in names if isinstance(getattr(m, name, None), Tensor)]
    if not found or any(divisor.numel() not in (1, getattr(m, name).numel()) for m, name in found):
        raise ModelError(
            f"model {file}: its rotary frequencies are scaled by {divisor.numel()} factors that do not fit"
        )
    for module, name in found:
        setattr(module, name, getattr(module, name) / divisor)


def _divisor(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> Tensor | None:
    """What the frequencies are divided by; None for no scaling."""
    kind = keys.get("rope.scaling.type", "none")
    unknown = sorted(tensors.keys() - {"rope_freqs.weight"})
    if kind not in ("none", "linear"):
        unknown.append(f"rope.scaling.type = {kind}")
    if unknown:
        raise ModelError(
            f"model {file}: has {unknown[0]}, a scaling of rotary positions that cannot be read from GGUF files; "
            "compile the model from its original safetensors"
        )
    if "rope_freqs.weight" in tensors:
        return tensors["rope_freqs.weight"].flatten()
    factor = keys.get("rope.scaling.factor", 1.0) if kind == "linear" else keys.get("rope.scale_linear", 1.0)
    return None if float(factor) == 1.0 else torch.tensor([float(factor)])
