"""The plan that `resq compile --dry-run` prints: from the configuration alone, no weights are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from resq_compiler.cli.commands import common
from resq_compiler.recipes.settings import CompileConfig
from resq_compiler.util.text import megabytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from resq_compiler.recipes.named import Chosen

FLOAT_BYTES, DOUBLE_BYTES = 4, 8


def make_plan(model: str, chosen: Chosen, calibration: str | None) -> dict[str, Any]:
    """Passes in order, estimates of sizes in bytes, and what stands against an export to ONNX (None: nothing known).

    Raises ModelError when the configuration cannot be read, CaptureError and TopologyError for a model that cannot be compiled.
    """
    from resq_compiler.api import needs_calibration
    from resq_compiler.recipes.text import to_text

    common.quiet_libraries()
    float_model = common.meta_model(model)
    sizes = _parameter_bytes(float_model)
    config, passes = chosen.settings, chosen.passes
    windows = needs_calibration(passes)
    return {
        "model": model,
        "options": config.to_dict(),
        "calibration": (calibration or "self") if windows else "not needed",
        "calibration_tokens": config.calibration_samples * config.calibration_length if windows else 0,
        "passes": [{"name": p.name, "text": str(p), "exact": p.exact} for p in passes],
        "passes_text": to_text(passes),
        "bytes": _estimates(sizes, config, windows),
        "onnx_problem": _onnx_problem(float_model),
    }


def _onnx_problem(model: PreTrainedModel) -> str | None:
    """Captures the model on the meta device, as a compile does first."""
    from resq_compiler.api import trace
    from resq_compiler.backends.onnx import export_problem

    return export_problem(trace(model)[0].graph)


def _parameter_bytes(model: Any) -> dict[str, int]:
    """Float32 bytes of the model by kind, counted on the meta device."""
    from torch import nn

    hf_config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    total = sum(p.numel() for p in model.parameters())
    untied = 0 if hf_config.get_text_config().tie_word_embeddings else embedding
    widest = max(m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    return {
        "all": FLOAT_BYTES * total,
        "embeddings": FLOAT_BYTES * embedding,
        "linears": FLOAT_BYTES * (total - embedding - untied),
        "hidden": hf_config.get_text_config().hidden_size,
        "widest": widest,
    }


def _estimates(sizes: dict[str, int], config: CompileConfig, windows: bool) -> dict[str, int]:
    high = config.high_fraction if config.weight_bits < config.high_bits else 0.0
    bits = config.weight_bits * (1 - high) + config.high_bits * high if config.weight_bits < 16 else 32
    bits = bits if config.average_bits is None else config.average_bits
    compiled = round(sizes["linears"] * bits / 32) + 2 * sizes["embeddings"]
    tokens = config.calibration_samples * config.calibration_length if windows else 0
    activations = FLOAT_BYTES * tokens * sizes["hidden"] if config.weight_method == "gptq" else 0
    moments = 3 * DOUBLE_BYTES * sizes["widest"] ** 2 if windows else 0
    untied = sizes["embeddings"]  # lm_head gets its own copy
    return {
        "float32_weights": sizes["all"],
        "compiled": compiled if config.model_megabytes is None else round(config.model_megabytes * 10**6),
        "calibration": activations + moments,
        "peak": 2 * sizes["all"] + untied + activations + moments,
    }


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    options, size = plan["options"], plan["bytes"]
    scheme = f"W{options['weight_bits']}A{options['activation_bits']}KV{options['kv_bits']}"
    lines = [f"{plan['model']}: recipe {options['recipe']}, {scheme}, seed {options['seed']}", "passes:"]
    lines += [
        f"  {i:2d} {p['text']}{'' if p['exact'] else '  (changes the outputs: quantizes)'}"
        for i, p in enumerate(plan["passes"], 1)
    ]
    tokens = f" ({plan['calibration_tokens']} tokens)" if plan["calibration_tokens"] else ""
    lines += [
        f"calibration text: {plan['calibration']}{tokens}",
        f"float32 weights: {megabytes(size['float32_weights'])}",
        f"compiled, about: {megabytes(size['compiled'])}",
        f"memory while compiling, estimate of weights and statistics: {megabytes(size['peak'])} (plus some hundred MB for libraries)",
        f"export to ONNX: {plan['onnx_problem'] or 'every operator has a form'}",
        "nothing was compiled (--dry-run)",
    ]
    return "\n".join(lines)
