"""Files written tensor by tensor have the bytes of safetensors' own writer."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

from resq_compiler.storage import streaming


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
