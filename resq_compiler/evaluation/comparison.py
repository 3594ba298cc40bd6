"""Measure a compiled model beside its float original: one table's worth of numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from resq_compiler.evaluation import sizes
from resq_compiler.evaluation.predictions import Evaluation, evaluate
from resq_compiler.result import CompileResult
from resq_compiler.util.text import megabytes, number, percent, table


class Observed:
    """A model that is run as a reference, measured on the way: its logits are used twice, its forward runs once."""

    def __init__(self, model: Any):
        self.model = model
        self.device = model.device
        self.windows: list[Evaluation] = []
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        """What is asked of the model, such as `at_once` of one that is run block by block."""
        return getattr(self.model, name)

    def prepare(self, batches: Sequence[Tensor]) -> None:
        """Run its blocks, where it is run block by block."""
        began = time.perf_counter()
        if hasattr(self.model, "prepare"):
            self.model.prepare(batches)
        self.seconds += time.perf_counter() - began

    def __call__(self, ids: Tensor) -> Any:
        began = time.perf_counter()
        output = self.model(ids)
        self.seconds += time.perf_counter() - began
        self.windows.append(evaluate(lambda same: output, ids.cpu(), batch_size=len(ids)))
        return output

    def result(self) -> Evaluation:
        """Means over everything that was run."""
        import math

        tokens = sum(w.tokens for w in self.windows)
        nll = sum(w.nll * w.tokens for w in self.windows) / tokens
        speed = sum(round(w.tokens_per_second * w.seconds) for w in self.windows) / self.seconds
        return Evaluation(math.exp(nll) if nll < 700 else math.inf, nll, tokens, self.seconds, speed)


def measure(
    model: Any,
    windows: Tensor,
    reference: Any = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model, and its float original beside it.

    Args:    model: compiled or float. windows: token ids [n, L] int64. reference: the float model, or None.
    Returns: plain values: "model" and "reference" (or None), each an Evaluation; for a compiled model also average_bits,
             memory_bytes and cache_bytes_per_token; "float32_bytes" of a float model, "stored_bytes" of an exported one.
    """
    observed = None if reference is None else Observed(reference)
    found = evaluate(model, windows, observed, batch_size=batch_size, progress=progress)
    result: dict[str, Any] = {
        "windows": list(windows.shape),
        "model": found.to_dict(),
        "reference": observed.result().to_dict() if observed else None,
    }
    if compiled := compile_result(model):
        result |= sizes.describe(compiled)
    for name, candidate in (("model", model), ("reference", reference)):
        if hasattr(candidate, "stored_bytes"):
            result[f"{name}_stored_bytes"] = candidate.stored_bytes
        elif candidate is not None and compile_result(candidate) is None:
            result[f"{name}_float32_bytes"] = 4 * sum(p.numel() for p in candidate.parameters())
    return result


def compile_result(model: Any) -> CompileResult | None:
    """What a compiled model was made of; None for a float model."""
    found = getattr(model, "result", None)
    return found if isinstance(found, CompileResult) else None


def measure_table(result: dict[str, Any], names: tuple[str, str] = ("compiled", "float")) -> str:
    """The result of `measure` for people: a column for the model, and one for the reference if there is one."""
    model, other = result["model"], result["reference"]
    bits = result.get("average_bits") or {}
    size = (
        result.get("memory_bytes", {}).get("total")
        or result.get("model_float32_bytes")
        or result.get("model_stored_bytes")
    )
    rows = [
        ("perplexity", number(model["perplexity"]), number(other and other["perplexity"])),
        (
            "  times float",
            number(model["perplexity"] / other["perplexity"] if other else None),
            "1.000" if other else "-",
        ),
        ("KL divergence from float (nats/token)", number(model["kl"], 4), "-"),
        ("top-1 agreement with float", percent(model["top1_agreement"]), "-"),
        ("average bits of weights", number(bits.get("weights"), 2), "32"),
        ("  of their scales", number(bits.get("weight_scales"), 2), "-"),
        ("average bits of activations", number(bits.get("activations"), 2), "32"),
        ("  of their scales", number(bits.get("activation_scales"), 2), "-"),
        ("average bits of the KV cache", number(bits.get("kv"), 2), "32"),
        ("  of its scales", number(bits.get("kv_scales"), 2), "-"),
        (
            "size on disk" if "model_stored_bytes" in result else "size in memory",
            megabytes(size),
            megabytes(result.get("reference_float32_bytes")),
        ),
        ("tokens/s", number(model["tokens_per_second"], 0), number(other and other["tokens_per_second"], 0)),
    ]
    if not bits:
        rows = [row for row in rows if "bits" not in row[0] and "scales" not in row[0]]
    if other is None:
        return table(("", names[0]), [row[:2] for row in rows if "float" not in row[0]])
    return table(("", *names), rows)
