"""Compiled models on disk: safetensors and JSON, never pickle.

    config.json            model type "resq_compiled", quantization_config, and the configuration of the float original
    resq_graph.json        the quantized graph, one node a line (serialize.py), and how each tensor is stored
    model*.safetensors     weights, packed codes, float32 scales (tensors.py); sharded with an index where large
    resq_recipe.yaml       the resolved options, as `--config` reads them
    README.md, generation_config.json, tokenizer files

A directory is written aside and moved into place whole. Embeddings and lm_head are stored as they are computed, in float32.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch.fx import GraphModule
from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedConfig

from resq_compiler.errors import CheckpointError, ResqError
from resq_compiler.frontend import capture
from resq_compiler.ir import graph_tools, serialize, verify
from resq_compiler.pipeline.result import CompileResult
from resq_compiler.storage import quantization_config, tensor_files
from resq_compiler.storage.tensor_files import read_json

CONFIG, GRAPH, RECIPE, GENERATION, CARD = (
    "config.json", "resq_graph.json", "resq_recipe.yaml", "generation_config.json", "README.md",
)  # fmt: skip
_CARD_TEXT = """# A model compiled by resq_compiler ({scheme})

    import resq_compiler
    model = resq_compiler.load("this directory")     # then model.generate(...), as in transformers

`AutoModelForCausalLM.from_pretrained` works after `import resq_compiler.model`. Compiled from: {source}
"""


def save(result: CompileResult, directory: str | Path, max_shard_size: str | int = "5GB") -> None:
    """Write a compiled model; `read` gives it back with bit-identical outputs. `stages` are not kept.

    A former compiled model in `directory` is replaced, and files there that are not part of it stay. Anything else
    there is refused.

    Raises: CheckpointError: the directory holds something else, or cannot be written (full disk, permissions); then
            nothing has changed.
    """
    target = Path(directory).expanduser().resolve()
    _check_target(target)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        aside.mkdir(parents=True)
        _write(result, aside, max_shard_size)
        _move_into_place(aside, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: could not be written ({error}); nothing was changed there") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read(directory: str | Path) -> CompileResult:
    """A saved compiled model, from a directory or from the Hugging Face hub by its id.

    Raises: CheckpointError: nothing there, not compiled by resq, written by a newer format, incomplete or damaged.
    """
    path = _local(directory)
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


def _write(result: CompileResult, directory: Path, max_shard_size: str | int) -> None:
    gm = result.graph_module
    tensors = tensor_files.describe(gm)
    graph = serialize.graph_to_dict(gm.graph, tensors)
    serialize.dict_to_graph(graph)  # refuses now what could not be read later
    cache = [[s.num_heads, s.key_dim, s.value_dim] for s in result.cache_specs]
    _write_text(directory / GRAPH, serialize.to_text({"cache": cache, **graph}))
    tensor_files.write(gm, tensors, directory, max_shard_size)
    if result.tokenizer is not None:
        result.tokenizer.save_pretrained(directory)
    quantization = quantization_config.build(result.options, gm.graph, result.notes, result.source)
    _write_text(directory / GENERATION, result.generation_config.to_json_string())
    _write_text(directory / RECIPE, _recipe_text(result, quantization))
    _write_text(
        directory / CARD, _CARD_TEXT.format(scheme=result.options.scheme, source=result.source or "not recorded")
    )
    quantization["files"] = sorted([CONFIG, *(entry.name for entry in directory.iterdir())])
    _write_text(directory / CONFIG, _config_text(result, quantization))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _config_text(result: CompileResult, quantization: dict[str, Any]) -> str:
    source = json.loads(result.config.to_json_string(use_diff=False))
    for private in ("_name_or_path", "transformers_version", "quantization_config"):
        source.pop(private, None)
    config = {
        "model_type": quantization_config.MODEL_TYPE,
        "architectures": [quantization_config.ARCHITECTURE],
        "dtype": "float32",
        "transformers_version": quantization["versions"]["transformers"],
        "vocab_size": result.config.get_text_config().vocab_size,
        "quantization_config": quantization,
        "source_config": source,
    }
    return json.dumps(config, indent=2) + "\n"


def _recipe_text(result: CompileResult, quantization: dict[str, Any]) -> str:
    written_by = ", ".join(f"{name} {version}" for name, version in quantization["versions"].items())
    return f"# {written_by}\n# source: {result.source}\n" + yaml.safe_dump(result.options.to_dict(), sort_keys=False)


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: this is a file; give a directory to save to")
    if any(target.iterdir()) and not _own_files(target):
        raise CheckpointError(
            f"{target}: holds something else than a model compiled by resq; it is not replaced: give another directory"
        )


def _own_files(target: Path) -> list[str]:
    """Files that `save` wrote there before; none if it did not."""
    try:
        quantization = read_json(target / CONFIG)["quantization_config"]
        return quantization["files"] if quantization["quant_method"] == quantization_config.QUANT_METHOD else []
    except (CheckpointError, KeyError, TypeError):
        return []


def _move_into_place(aside: Path, target: Path) -> None:
    """Rename; a former checkpoint is renamed first, comes back if that fails, and leaves what is not its own."""
    if not target.exists() or not any(target.iterdir()):
        aside.replace(target)
        return
    own = _own_files(target)
    former = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.former")
    target.rename(former)
    try:
        aside.rename(target)
    except BaseException:
        former.rename(target)
        raise
    for entry in former.iterdir():
        if entry.name not in own and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(former, ignore_errors=True)


def _local(directory: str | Path) -> Path:
    path = Path(directory).expanduser()
    if path.is_dir():
        return path
    name = str(directory)
    if path.exists() or isinstance(directory, Path) or name.count("/") != 1 or name.startswith((".", "~", os.sep)):
        raise CheckpointError(f"{directory}: no such directory; expected one written by save_pretrained, or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: no such directory, and not downloaded from the hub either: {error}"
        ) from error


def _build(path: Path, config: dict[str, Any], options: Any, data: Mapping[str, Any]) -> CompileResult:
    graph = serialize.dict_to_graph(data)
    info = {n["target"]: n["tensor"] for n in data["nodes"] if n["op"] == "get_attr"}
    root = torch.nn.Module()
    gm = GraphModule(root, torch.fx.Graph(), class_name="CompiledGraph")
    for name, value in tensor_files.read(path, info).items():
        graph_tools.set_tensor(gm, name, value)
    gm.graph = graph
    cache = tuple(capture.CacheSpec(*map(int, spec)) for spec in data["cache"])
    hf_config = _source_config(config["source_config"])
    verify.check_graph(gm)
    verify.propagate_shapes(gm, capture.concrete_example(hf_config.get_text_config().vocab_size, cache))
    quantization = config["quantization_config"]
    return CompileResult(
        gm, options, cache, hf_config, GenerationConfig.from_dict(read_json(path / GENERATION)), _tokenizer(path, hf_config),
        notes=tuple(quantization.get("notes", ())), source=quantization.get("source", ""),
    )  # fmt: skip


def _source_config(values: dict[str, Any]) -> PreTrainedConfig:
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"model type {model_type!r} is unknown to the installed transformers; upgrade it")
    return CONFIG_MAPPING[model_type].from_dict(values)


def _tokenizer(path: Path, config: PreTrainedConfig) -> Any:
    if not (path / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(path, config=config)
