"""Damaged sizes are seen before anything of that size is made."""

from __future__ import annotations

import json

import pytest

from resq_compiler.errors import ModelError
from resq_compiler.frontend.models import load_model, open_model
from resq_compiler.tiny import tiny_model
from tests.gguf_files import small_llama


@pytest.mark.parametrize("read", [load_model, open_model])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "intermediate_size",
            2**40,
            r"its configuration says \d+ weights, its files have \d+ bytes, expected at least a bit for each",
        ),
        ("num_hidden_layers", 2**31, "its configuration says 2147483648 layers, expected at most 10000"),
    ],
)
def test_directories(tmp_path, read, name, value, message):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("read", [load_model, open_model])
def test_gguf(tmp_path, read):
    """The last byte of a 32-bit number behind its name and type."""
    file = small_llama(tmp_path / "model.gguf")
    content = bytearray(file.read_bytes())
    key = b"llama.feed_forward_length"
    content[content.index(key) + len(key) + 4 + 3] = 0x70
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.gguf: its configuration says \d+ weights.*damaged"):
        read(file)
