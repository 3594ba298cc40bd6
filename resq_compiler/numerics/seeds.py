"""Private random generators: every draw is named by (seed, purpose, index), so no draw moves when another is added."""

from __future__ import annotations

import hashlib
import json

import torch


def generator(seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator whose stream depends only on (seed, purpose, index).

    The key is hashed with BLAKE2b, not `hash()`, whose value for strings changes from process to process. The global
    random state is neither read nor written. Equal keys give equal streams on one device kind; CPU and GPU streams
    differ, so draw on the CPU what must not depend on the device.

    Args:    seed: the user's seed. purpose: what the numbers are for ("rotation"). index: the layer, part or try.
    Returns: a torch.Generator on `device`.
    """
    key = json.dumps([int(seed), purpose, int(index)]).encode()
    digest = hashlib.blake2b(key, digest_size=8, person=b"resq-seed").digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big") >> 1)
