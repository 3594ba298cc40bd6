"""Compiled models as transformers models. Importing this registers them with transformers' Auto classes."""

from __future__ import annotations

from resq_compiler.model.auto_classes import ResqConfig
from resq_compiler.model.compiled_model import CompiledModel

__all__ = ["CompiledModel", "ResqConfig"]
