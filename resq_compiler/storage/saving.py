"""Write a compiled model to a directory (layout.py): all of it or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from resq_compiler.errors import CheckpointError
from resq_compiler.ir import serialize
from resq_compiler.recipes.settings import GIVEN, RUN_OPTIONS
from resq_compiler.result import CompileResult
from resq_compiler.storage import quantization_config, tensor_files
from resq_compiler.storage.layout import CARD, CONFIG, GENERATION, GRAPH, RECIPE
from resq_compiler.storage.tensor_files import read_json
from resq_compiler.util import placement

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
    target = Path(directory).expanduser()
    check_target(target)
    try:
        with placement.replacing(target, _own_files(target), last=CONFIG) as fresh:
            _write(result, fresh, max_shard_size)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: could not be written ({error}); nothing was changed there") from error


def check_target(target: Path) -> None:
    """Raise CheckpointError unless a model can be saved there; before a compile, so that its work is not lost."""
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: this is a file; give a directory to save to")
    try:
        occupied = target.is_dir() and bool(placement.contents(target)) and not _own_files(target)
        placement.check(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error}); give a directory that is writable") from error
    if occupied:
        raise CheckpointError(
            f"{target}: holds something else than a model compiled by resq; it is not replaced: give another directory"
        )


def _own_files(target: Path) -> list[str]:
    """Files that `save` wrote there before; none if it did not."""
    try:
        quantization = read_json(target / CONFIG)["quantization_config"]
        files = quantization["files"] if quantization["quant_method"] == quantization_config.QUANT_METHOD else []
        return [str(name) for name in files]
    except (CheckpointError, KeyError, TypeError):
        return []


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
    quantization = quantization_config.build(result)
    _write_text(directory / GENERATION, result.generation_config.to_json_string())
    _write_text(directory / RECIPE, _recipe_text(result, quantization))
    card = _CARD_TEXT.format(scheme=result.options.scheme, source=result.source)
    _write_text(directory / CARD, card)
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
    head, options = f"# {written_by}\n# source: {result.source}\n", result.options.to_dict()
    if result.options.recipe == GIVEN:
        options = {"passes": result.passes, **{name: options[name] for name in RUN_OPTIONS}}
    else:
        head += f"# passes: {result.passes}\n"
    return head + yaml.safe_dump(options, sort_keys=False)
