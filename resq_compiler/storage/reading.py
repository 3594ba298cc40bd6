"""Open a compiled model that `saving.save` wrote (layout.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from resq_compiler.errors import CheckpointError, ResqError
from resq_compiler.frontend import capture
from resq_compiler.ir import serialize
from resq_compiler.pipeline.provenance import Provenance
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.result import CompileResult
from resq_compiler.storage import quantization_config, tensor_files
from resq_compiler.storage.layout import CONFIG, GENERATION, GRAPH, TOKENIZER
from resq_compiler.storage.portable import assembled
from resq_compiler.storage.tensor_files import read_json


def read(directory: str | Path, **download: Any) -> CompileResult:
    """A saved compiled model, from a directory or from the Hugging Face hub by its id.

    Args:   download: for a hub id, options of huggingface_hub.snapshot_download (revision, cache_dir, local_files_only, token).
    Raises: CheckpointError: nothing there, not compiled by resq, written by a newer format, incomplete or damaged.
    """
    path = _local(directory, download)
    config = read_json(path / CONFIG)
    options = quantization_config.check(config, str(directory))
    data = read_json(path / GRAPH)
    try:
        return _build(path, config, options, data)
    except ResqError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory}: malformed contents ({reason}); the files are damaged") from error


def _local(directory: str | Path, download: Mapping[str, Any]) -> Path:
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    name = str(directory)
    if path.exists() or isinstance(directory, Path) or name.count("/") != 1 or name.startswith((".", "~", os.sep)):
        raise CheckpointError(f"{directory}: no such directory; expected one written by save_pretrained, or a hub id")
    try:
        return Path(snapshot_download(name, **download))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: no such directory, and not downloaded from the hub either: {error}"
        ) from error


def _build(path: Path, config: dict[str, Any], options: CompileConfig, data: Mapping[str, Any]) -> CompileResult:
    serialize.dict_to_graph(data)  # a malformed one is told before its tensors are read
    info = {n["target"]: n["tensor"] for n in data["nodes"] if n["op"] == "get_attr"}
    cache = tuple(capture.CacheSpec(*map(int, spec)) for spec in data["cache"])
    hf_config = _source_config(config["source_config"])
    gm = assembled(data, tensor_files.read(path, info), cache, hf_config.get_text_config().vocab_size)
    quantization = config["quantization_config"]
    return CompileResult(
        gm, options, cache, hf_config, GenerationConfig.from_dict(read_json(path / GENERATION)), _tokenizer(path, hf_config),
        notes=tuple(quantization.get("notes", ())), provenance=Provenance.from_config(quantization),
        passes=str(quantization.get("passes", "")),
    )  # fmt: skip


def _source_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of the float original; of a class that transformers does not know, its plain values."""
    model_type = values["model_type"]
    known = model_type in CONFIG_MAPPING
    try:
        config: PreTrainedConfig = (CONFIG_MAPPING[model_type] if known else PreTrainedConfig).from_dict(values)
    except Exception as error:  # transformers checks types by errors of its own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"source_config in {CONFIG} cannot be read ({reason}); the file is damaged") from error
    if not known:
        config.model_type = model_type  # type: ignore[misc]
    return config


def _tokenizer(path: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | None:
    if not (path / TOKENIZER).is_file():
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, config=config)
    except Exception as error:  # transformers raises what its many readers raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer cannot be read ({reason}); its files are damaged") from error
    return tokenizer
