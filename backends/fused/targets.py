"""The targets there are. Each is imported on first use: the packages it needs matter only to those who use it."""

from __future__ import annotations

import importlib
from functools import lru_cache

from resq_compiler.backends.fused.target import Target

from resq_compiler.errors import BackendError

TARGETS = {
    "torch": "resq_compiler.backends.fused.plain:TORCH",
    "cpu": "resq_compiler.backends.cpu.target:CPU",
    "triton": "resq_compiler.backends.triton.target:TRITON",
}
"""Module and name of every Target. Text, since providers import this package and not the other way round."""


@lru_cache
def find_target(name: str) -> Target:
    """The target of that name. Raises BackendError if there is none."""
    if name not in TARGETS:
        raise BackendError(f"fused operators: expected a target out of {', '.join(TARGETS)}; got {name!r}")
    module, _, attribute = TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)
    return target
