"""Whether a configuration can belong to the weights that lie beside it: asked before anything of its size is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from resq_compiler.errors import ModelError

MOST_LAYERS = 10_000
WEIGHTS_OF_A_BYTE = 8
"""At most: no format has less than a bit for a weight."""
HARMLESS = 2**26
"""Weights that fit anywhere: what is wrong with their files is said better by what reads these."""
_WEIGHT_FILES = (".safetensors", ".bin", ".gguf")


def check_plausible(config: Any, place: Path, where: str) -> None:
    """Raise ModelError for a configuration whose model cannot be in the files of weights of a place, a file or a directory.

    A damaged number there would otherwise be seen when the memory for that model is asked for, or has been used up.
    """
    files = [place] if place.is_file() else [p for p in place.iterdir() if p.suffix in _WEIGHT_FILES]
    size = sum(p.stat().st_size for p in files)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(
            f"{where}: its configuration says {layers} layers, expected at most {MOST_LAYERS}; it is damaged: download it again"
        )
    count = _weights(config)
    if size and count is not None and count > max(WEIGHTS_OF_A_BYTE * size, HARMLESS):
        raise ModelError(
            f"{where}: its configuration says {count} weights, its files have {size} bytes, expected at least a bit for each; "
            "the configuration is damaged or the files are cut off: download them again"
        )


def _weights(config: Any) -> int | None:
    """Of the model of a configuration; None where transformers makes none of it, which loading says better."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception:
        return None
    return sum(p.numel() for p in model.parameters())
