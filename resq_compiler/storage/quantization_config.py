"""The `quantization_config` of a saved model: what was done, by which versions, in words that other tools know.

Transforms are listed in the vocabulary of compressed-tensors (TransformConfig: config_groups of a type and of places
`weight_input`, `weight_output`, `input`, `q_attn`, `k_cache`), so that a reader for another runtime is a renaming.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch.fx import Graph

from resq_compiler import __version__
from resq_compiler.analysis.topology import STREAM_ROLES
from resq_compiler.errors import CheckpointError, ConfigError
from resq_compiler.ir import meta
from resq_compiler.recipes.settings import CompileConfig, without_removed
from resq_compiler.result import CompileResult

QUANT_METHOD = "resq"
MODEL_TYPE, ARCHITECTURE = "resq_compiled", "ResqForCausalLM"
FORMAT_VERSION = (
    "1.1"  # 1.0 kept codes of 3, 5, 6 and 7 bits in bytes; tensors say how they are kept, so it is read too
)
"""Major: older readers must refuse. Minor: they may read."""


def versions() -> dict[str, str]:
    """Versions of what a compiled graph depends on."""
    libraries = ("torch", "transformers", "safetensors")
    return {"resq_compiler": __version__, **{name: importlib.metadata.version(name) for name in libraries}}


def build(result: CompileResult) -> dict[str, Any]:
    """The quantization_config of a compiled graph."""
    options = result.options
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "scheme": options.scheme,
        "options": options.to_dict(),
        "passes": result.passes,
        "versions": versions(),
        "source": result.source,
        "provenance": result.provenance.to_dict(),
        "notes": list(result.notes),
        "transform_config": {"config_groups": transforms(options, result.graph_module.graph)},
    }


def transforms(options: CompileConfig, graph: Graph) -> dict[str, Any]:
    """Changes of basis by name: the type, and every place; `online` ones are operators of the graph, the others are in weights."""
    sites: dict[str, list[str]] = {}
    for part in _facts(graph, meta.LinearPart):
        names = sites.setdefault(part.site.role, [])
        if part.site.name not in names:
            names.append(part.site.name)
    online = {p.basis for p in _facts(graph, meta.Projection)}
    groups: dict[str, Any] = {}
    readers = [name for role in (*STREAM_ROLES, "gate", "up") for name in sites.get(role, [])]
    if options.basis != "none":
        writers = ["embedding", *sites.get("o", []), *sites.get("down", [])]
        first = _place(readers, "input") if "U_A" in online else _place(writers, "weight_output")
        groups["U_A"] = _group(options.basis, [first, _place(readers, "weight_input", inverse=True)], "U_A" in online)
        of_values = [*sites.get("v", []), *sites.get("v_b", [])]
        places = [_place(of_values, "weight_output"), _place(sites.get("o", []), "weight_input", inverse=True)]
        groups["U_B"] = _group(options.basis, places, "U_B" in online)
        if compressing := [name for role in ("q_a", "kv_a") for name in sites.get(role, [])]:
            reading = [name for role in ("q_b", "q_b_rope", "k_b", "v_b") for name in sites.get(role, [])]
            first = _place(reading, "input") if "U_L" in online else _place(compressing, "weight_output")
            groups["U_L"] = _group(
                options.basis, [first, _place(reading, "weight_input", inverse=True)], "U_L" in online
            )
    if "U_C" in online:
        queries, keys = (
            [name for role in roles for name in sites.get(role, [])]
            for roles in (("q", "q_rope", "q_b_rope"), ("k", "k_rope"))
        )
        places = [_place(queries, "q_attn"), _place(keys, "k_cache")]
        groups["U_C"] = _group(options.basis, places, True)
    if "U_D" in online:
        places = [_place(sites.get("down", []), "input"), _place(sites.get("down", []), "weight_input", inverse=True)]
        groups["U_D"] = _group("hadamard", places, True)
    return groups


def _facts(graph: Graph, kind: type) -> list[Any]:
    return [fact for node in graph.nodes if (fact := meta.get(node, kind)) is not None]


def _place(targets: list[str], location: str, inverse: bool = False) -> dict[str, Any]:
    return {"targets": targets, "location": location, "inverse": inverse}


def _group(kind: str, apply: list[dict[str, Any]], online: bool) -> dict[str, Any]:
    return {"type": kind, "online": online, "apply": apply}


def check(config: dict[str, Any], where: str) -> CompileConfig:
    """The options in a config.json, after checking that this version can read it. Raises CheckpointError."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if not isinstance(quantization, dict) or method != QUANT_METHOD:
        what = f"quantized by {method}" if method else "a float model"
        raise CheckpointError(
            f"{where}: not compiled by resq ({what}, model type {config.get('model_type')}); "
            "compile its float original with resq_compiler.compile"
        )
    version = str(quantization.get("format_version"))
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) > int(FORMAT_VERSION.partition(".")[0]):
        raise CheckpointError(
            f"{where}: format version {version}; this resq_compiler {__version__} reads up to {FORMAT_VERSION}: upgrade it "
            f"(the model was written by {quantization.get('versions', {}).get('resq_compiler', 'an unknown version')})"
        )
    try:
        return CompileConfig.from_dict(
            {"bos": "never", **without_removed(quantization["options"])}
        )  # before 0.2 no text had one
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{where}: the options in quantization_config are not readable: {error}") from error
