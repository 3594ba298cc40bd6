"""An exported directory as evaluation calls a model: token ids in, logits of all positions out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx import session
from resq_compiler.backends.onnx.runtime import OnnxDecoder
from torch import Tensor


class ExportedModel:
    """Calls give an object with logits [B, S, vocabulary]. config: the Hugging Face configuration; profile: of the export.

    Raises BackendError: no model there, or ONNX Runtime cannot load it.
    """

    device = torch.device("cpu")

    def __init__(self, directory: str | Path, threads: int | None = None):
        from transformers import AutoConfig

        self.decoder = OnnxDecoder(directory, threads=threads)
        self.config = AutoConfig.from_pretrained(directory)
        self.profile = session.session_metadata(self.decoder.session).get("resq.profile", "unknown")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the directory. Raises BackendError when it has none."""
        return self.decoder.tokenizer

    @property
    def stored_bytes(self) -> int:
        """Of the model's files on disk."""
        return sum(path.stat().st_size for path in self.decoder.directory.glob("model.onnx*"))

    def __call__(self, ids: Tensor) -> Any:
        tokens = ids.numpy()
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        past = self.decoder.empty_past(len(tokens))
        logits, _ = self.decoder.forward(tokens, np.ones_like(tokens), positions, past)
        return SimpleNamespace(logits=session.to_torch(logits))
