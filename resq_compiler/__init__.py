"""resq_compiler: compile a Hugging Face decoder LLM to 4 bits (ResQ, W4A4KV4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resq_compiler.api import compile, load
    from resq_compiler.errors import ResqError
    from resq_compiler.model import CompiledModel
    from resq_compiler.recipes.settings import CompileConfig

__version__ = "0.2.0.dev0"
__all__ = ["CompileConfig", "CompiledModel", "ResqError", "__version__", "calibrate", "compile", "load"]

_HOMES = {
    "calibrate": "api", "compile": "api", "load": "api", "CompiledModel": "model",
    "CompileConfig": "recipes.settings", "ResqError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: `import resq_compiler` stays fast and needs no torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'resq_compiler' has no attribute {name!r}")
    return getattr(importlib.import_module(f"resq_compiler.{_HOMES[name]}"), name)
