"""How a compiled model came about: the float model and the calibration data, by name and hash. Saved with it, so it names no path."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from resq_compiler.calibration.data import DEMO
from resq_compiler.frontend.source import ModelSource


@dataclass(frozen=True)
class CalibrationSource:
    """Calibration data.

    kind: "self" (the model wrote them), "demo" (the built-in text), "file" or "given" (objects of a program). name: of the file.
    tokens: how many were used. digest: sha256 of their ids, window by window.
    """

    kind: str
    name: str = ""
    tokens: int = 0
    digest: str = ""

    @classmethod
    def of(cls, data: Any, windows: Tensor) -> CalibrationSource:
        """What compile() was given, and the windows [n, length] int64 that were cut from it."""
        kind, name = "given", ""
        if data is None:
            kind = "self"
        elif isinstance(data, str) and data == DEMO:
            kind = "demo"
        elif isinstance(data, (str, Path)):
            kind, name = "file", Path(data).name
        return cls(kind, name, windows.numel(), windows_digest(windows))

    def __str__(self) -> str:
        words = {
            "self": "text that the model wrote",
            "demo": "the built-in text",
            "given": "data of the program that compiled it",
        }
        return f"the file {self.name}" if self.kind == "file" else words.get(self.kind, self.kind)


def windows_digest(windows: Tensor) -> str:
    """sha256 of token ids [n, length] int64, and of how they are cut."""
    digest = hashlib.sha256(f"{tuple(windows.shape)}\n".encode())
    digest.update(windows.cpu().contiguous().numpy().data)
    return digest.hexdigest()


Source = TypeVar("Source", ModelSource, CalibrationSource)


@dataclass(frozen=True)
class Provenance:
    """model: the float original. calibration: None where none was needed, or where it is not known (see `known`).

    known: False for models saved by a version that kept a line of text instead.
    """

    model: ModelSource = ModelSource("unknown", "")
    calibration: CalibrationSource | None = None
    known: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": dataclasses.asdict(self.model),
            "calibration": None if self.calibration is None else dataclasses.asdict(self.calibration),
        }

    @classmethod
    def from_config(cls, quantization: Mapping[str, Any]) -> Provenance:
        """From a `quantization_config`. Raises TypeError or KeyError: malformed."""
        recorded = quantization.get("provenance")
        if recorded is None:
            return cls(_from_text(str(quantization.get("source") or "")))
        calibration = recorded["calibration"]
        return cls(
            _read(ModelSource, recorded["model"]),
            None if calibration is None else _read(CalibrationSource, calibration),
            known=True,
        )


def _read(kind: type[Source], values: Mapping[str, Any]) -> Source:
    """Of the fields that this version knows; a newer one may have written more."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.name in values})


def _from_text(text: str) -> ModelSource:
    """Of the line that was kept up to version 0.1: a path or hub id, then the class in brackets."""
    name, _, rest = text.partition(" (")
    architecture = rest.removesuffix(")")
    if name.endswith(" instance"):
        return ModelSource("instance", name.removesuffix(" instance"))
    is_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return ModelSource("hub" if is_id else "directory", name if is_id else Path(name).name, architecture)
