"""The plan that `resq compile --dry-run` prints: from the configuration alone, without weights; times from a measurement of a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError
from resq_compiler.util.text import duration, megabytes, table

if TYPE_CHECKING:
    from resq_compiler.recipes.named import Chosen
    from resq_compiler.recipes.settings import CompileConfig

FLOAT_BYTES = 4


def make_plan(
    model: str, chosen: Chosen, calibration: str | None, device: str = "cpu", processes: int = 2, output: Path | None = None
) -> dict[str, Any]:  # fmt: skip
    """Passes in order, what each step needs in one process and in several, what stands in the way of the compile here, and of an
    export to ONNX (None: nothing known).

    Raises ModelError when the configuration cannot be read, CaptureError and TopologyError for a model that cannot be compiled.
    """
    from resq_compiler.analysis.topology import Topology
    from resq_compiler.api import needs_calibration, trace
    from resq_compiler.backends.fused.foreseen import kernel_problem
    from resq_compiler.backends.onnx import export_problem
    from resq_compiler.calibration import precision
    from resq_compiler.inspection.forecast import Shapes, check_fits, disk_problem, forecast
    from resq_compiler.inspection.rates import measure
    from resq_compiler.recipes.text import to_text
    from resq_compiler.util import devices, machine

    common.quiet_libraries()
    where = devices.resolve(device)
    float_model = common.meta_model(model)
    weights = sum(p.numel() for p in float_model.parameters())
    graph, ctx = trace(float_model)
    shapes = Shapes.of(graph, ctx.facts.get(Topology))
    config, passes = chosen.settings, chosen.passes
    rates = measure(where, precision.DTYPES[precision.resolve(config.calibration_dtype, where)])
    alone, shared = (forecast(shapes, config, passes, rates, count) for count in (1, processes))
    windows = needs_calibration(passes)
    folder = Path() if output is None else output
    return {
        "model": model,
        "options": config.to_dict(),
        "calibration": (calibration or "self") if windows else "not needed",
        "calibration_tokens": config.calibration_samples * config.calibration_length if windows else 0,
        "passes": [{"name": p.name, "text": str(p), "exact": p.exact} for p in passes],
        "passes_text": to_text(passes),
        "bytes": {
            "float32_weights": FLOAT_BYTES * weights,
            "compiled": alone.disk,
            "peak": alone.memory,
            "free_memory": machine.free_memory(),
            "free_disk": machine.free_disk(folder),
        },
        "forecasts": [one.to_dict() for one in (alone, shared)],
        "problem": check_fits(alone, machine.free_memory(), devices.free_memory(where))
        or disk_problem(alone.disk, machine.free_disk(folder), str(folder)),
        "onnx_problem": export_problem(graph.graph),
        "kernel_problem": kernel_problem(graph.graph),
    }


def check_disk(model: str, config: CompileConfig, output: Path) -> None:
    """Raise ConfigError where the compiled model will not fit on the disk of its directory; from the configuration alone."""
    from torch import nn

    from resq_compiler.inspection.forecast import compiled_bytes, disk_problem
    from resq_compiler.util import machine

    float_model = common.meta_model(model)
    tables = [m.weight.numel() for m in float_model.modules() if isinstance(m, nn.Embedding)]
    weights = sum(p.numel() for p in float_model.parameters())
    tied = float_model.config.get_text_config().tie_word_embeddings
    head = 0 if tied else float_model.get_input_embeddings().weight.numel()
    linears = weights - sum(tables) - head
    if problem := disk_problem(compiled_bytes(linears, weights, config), machine.free_disk(output), str(output)):
        raise ConfigError(problem)


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
        "",
        *(_steps_text(one) for one in plan["forecasts"]),
        f"files that wait until all is written: {megabytes(plan['forecasts'][0]['aside'])}",
        f"free here: {_known(size['free_memory'])} of memory, {_known(size['free_disk'])} of disk",
        f"fits: {'yes' if plan['problem'] is None else 'NO: ' + plan['problem']}",
        f"export to ONNX: {plan['onnx_problem'] or 'every operator has a form'}",
        f"backend triton: {plan['kernel_problem'] or 'nothing is known against it'}",
        "nothing was compiled (--dry-run)",
    ]
    return "\n".join(lines)


def _steps_text(found: dict[str, Any]) -> str:
    """A table of the steps in one of several processes."""
    several = found["processes"] > 1
    header = ("step", "at work", "memory", "time", *(("sent",) if several else ()))
    rows = [
        (
            step["name"], ", ".join(f"{name} {megabytes(n)}" for name, n in step["memory"].items()), megabytes(step["bytes"]),
            duration(step["seconds"]), *((megabytes(step["sent"]),) if several else ()),
        )
        for step in found["steps"]
    ]  # fmt: skip
    kept = ", ".join(f"{name} {megabytes(n)}" for name, n in found["kept"].items())
    title = f"in each of {found['processes']} processes" if several else "in one process"
    return (
        f"{title}: peak {megabytes(found['memory'])} (libraries, {kept}, and the largest step), about {duration(found['seconds'])}\n"
        f"{table(header, rows, left=2)}\n"
    )


def _known(size: int | None) -> str:
    return "not known" if size is None else megabytes(size)
