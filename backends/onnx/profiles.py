"""The export profiles: which operators they use, who can run them, and how ONNX Runtime should be told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from resq_compiler.backends.onnx.form_integer import IntegerForm
from resq_compiler.backends.onnx.form_qdq import QdqForm, WeightOnlyForm
from resq_compiler.backends.onnx.forms import Form

from resq_compiler.errors import BackendError

PREFILL_CHUNK = (
    256  # tokens of a prompt that run at once: scores and sums of more leave the caches, and half the scores are masked
)
NATIVE_PREFILL_CHUNK = 1024  # the same of the CPU kernels, whose attention reads no masked keys: this bounds memory
FLUSH_DENORMALS = {
    "session.set_denormal_as_zero": "1"
}  # softmax of masked scores leaves denormals, which CPUs multiply slowly


@dataclass(frozen=True)
class Profile:
    """One way to write a model. session_options: ONNX Runtime settings that its results or its speed need. native: fused operators of
    the CPU kernels (native.py), with a packed cache."""

    name: str
    form: Callable[[], Form]
    runs_on: str
    minimum_onnxruntime: str
    session_options: dict[str, str] = field(default_factory=dict)
    native: bool = False


PROFILES = {
    p.name: p
    for p in (
        Profile(
            "qdq", QdqForm, "any runtime with opset 21: INT4 and INT8 QuantizeLinear/DequantizeLinear, scales made at run time",
            "1.20", {"session.disable_quant_qdq": "1", **FLUSH_DENORMALS},
        ),
        Profile(
            "ort", IntegerForm, "ONNX Runtime 1.23 or newer on a CPU, and any runtime with opset 23: integer products, exact and fastest",
            "1.23", FLUSH_DENORMALS,
        ),
        Profile(
            "weight-only", WeightOnlyForm, "runtimes that take INT4 and INT8 for weights only, opset 21; activations rounded by arithmetic",
            "1.20", {"session.disable_quant_qdq": "1", **FLUSH_DENORMALS},
        ),
        Profile(
            "native", IntegerForm, "ONNX Runtime 1.23 or newer on a CPU, with the kernels' library beside the model: fastest",
            "1.23", FLUSH_DENORMALS, native=True,
        ),
    )
}  # fmt: skip
DEFAULT_PROFILE = "qdq"


def find_profile(name: str) -> Profile:
    """The profile of that name; BackendError lists the others."""
    if name not in PROFILES:
        raise BackendError(
            f"onnx profile {name!r}: expected one of " + "; ".join(f"{p.name} ({p.runs_on})" for p in PROFILES.values())
        )
    return PROFILES[name]
