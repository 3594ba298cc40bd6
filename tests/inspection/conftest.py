"""One small compile for all inspection tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import resq_compiler
from resq_compiler.tiny import tiny_model, tiny_tokens


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A compiled two-layer model, its dump, its float graph before quantization, and the model it came from."""
    directory = tmp_path_factory.mktemp("dump")
    model, held = tiny_model("llama"), []
    result = resq_compiler.compile(
        model, tiny_tokens(4, 64), recipe="resq", calibration_samples=4, calibration_length=64, weight_method="rtn", dump_dir=directory,
        on_float=held.append,
    )  # fmt: skip
    return SimpleNamespace(model=result, original=model, projected=held[0], dump=directory)
