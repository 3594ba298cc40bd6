"""ONNX: export to a directory that runs as it is, a small runtime, and backend="onnx"."""

from __future__ import annotations

from resq_compiler.backends.onnx.export import build_model, export_onnx, export_problem

__all__ = ["build_model", "export_onnx", "export_problem"]
