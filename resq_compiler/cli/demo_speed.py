"""How fast the demo's first model runs on the CPU kernels, beside its float original in PyTorch."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from resq_compiler.errors import BackendError
from resq_compiler.util.text import number, table

PROMPT, NEW, ROUNDS = 512, 32, 3


def compare(model: Any, compiled: Any) -> dict[str, Any]:
    """Tokens per second of both, or under "unavailable" why the kernels cannot run. `compiled` is on the CPU kernels afterwards."""
    try:
        compiled.use_backend("cpu")
    except BackendError as error:
        return {"unavailable": str(error)}
    text = model.config.get_text_config()
    length = min(PROMPT, (getattr(text, "max_position_embeddings", None) or PROMPT + NEW) - NEW)
    ids = torch.randint(0, text.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return {"prompt": length, "float": measure(model, ids), "compiled": measure(compiled, ids)}


def measure(model: Any, ids: Tensor) -> dict[str, float]:
    """Best of some rounds: tokens per second of the prompt ids [1, L], and of NEW tokens behind it."""
    times = [_round(model, ids) for _ in range(1 + ROUNDS)][1:]
    return {"prefill": ids.shape[1] / min(first for first, _ in times), "decode": NEW / min(rest for _, rest in times)}


@torch.no_grad()
def _round(model: Any, ids: Tensor) -> tuple[float, float]:
    began = time.perf_counter()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    first = time.perf_counter()
    for i in range(NEW):
        cache = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).past_key_values
    return first - began, time.perf_counter() - first


def describe(speed: dict[str, Any], name: str, markdown: bool = False) -> str:
    """The result of `compare` for people. name: of the compiled model."""
    if "unavailable" in speed:
        return f"Speed was not measured: {speed['unavailable']}"
    rows = [
        (title, number(found["prefill"], 0), number(found["decode"], 1))
        for title, found in (("float32, PyTorch", speed["float"]), (f"{name}, CPU kernels", speed["compiled"]))
    ]
    ratios = [f"x {speed['compiled'][kind] / speed['float'][kind]:.2f}" for kind in ("prefill", "decode")]
    header = ("tokens per second", f"prompt of {speed['prompt']}", f"{NEW} tokens behind it")
    return table(header, [*rows, ("", *ratios)], markdown)
