"""Files written tensor by tensor have the bytes of safetensors' own writer."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from resq_compiler.storage import streaming
from resq_compiler.util import memory


def test_bytes_are_those_of_safetensors(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{i}": torch.randint(0, 2, shape, generator=g).to(dtype)
        for i, (dtype, name) in enumerate(streaming.NAMES.items())
        for shape in ((3, i + 1),)
    }
    tensors |= {"empty": torch.zeros(0, 4), "one": torch.tensor(1.5), "größe": torch.ones(2, dtype=torch.int8)}
    made = []

    def make(name):
        made.append(name)
        return tensors[name]

    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    streaming.save_file({n: t.to("meta") for n, t in tensors.items()}, tmp_path / "ours", make, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(made) == sorted(tensors)


def test_a_tensor_in_a_file_is_let_go_piece_by_piece(tmp_path, monkeypatch):
    size, steps = 5 * memory.WORTH_A_FILE, []
    (tmp_path / "w.bin").write_bytes(bytes(range(256)) * (size // 256))
    mapped = torch.from_file(str(tmp_path / "w.bin"), size=size, dtype=torch.uint8)
    monkeypatch.setattr(streaming, "PIECE", 2 * memory.WORTH_A_FILE)
    monkeypatch.setattr(memory, "page_out_tensor", lambda piece: steps.append((piece.data_ptr(), piece.nbytes)))
    streaming.save_file({"w": mapped.to("meta")}, tmp_path / "ours", lambda name: mapped, {})
    assert (tmp_path / "ours").read_bytes().endswith((tmp_path / "w.bin").read_bytes())
    begin, step = mapped.data_ptr(), streaming.PIECE
    assert steps == [(begin, step), (begin + step, step), (begin + 2 * step, size - 2 * step), (begin, size)]
