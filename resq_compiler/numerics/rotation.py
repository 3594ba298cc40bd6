"""Random orthogonal matrices R, multiplied from the right: y = x R spreads a few large columns of x over all."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import ConfigError, QuantError
from resq_compiler.numerics.hadamard import hadamard_matrix, hadamard_plan

logger = logging.getLogger(__name__)

ROTATION_KINDS = ("hadamard", "orthogonal", "none")


@dataclass(frozen=True)
class RotationInfo:
    """What `random_rotation` uses for a width: `requested` and `used` kinds, and the `reason` when they differ."""

    n: int
    requested: str
    used: str
    reason: str


def rotation_info(n: int, kind: str) -> RotationInfo:
    """Which rotation a request gives: "hadamard" becomes "orthogonal" where no full-width Hadamard matrix is known.

    Raises: ConfigError: unknown kind. QuantError: n < 1.
    """
    if kind not in ROTATION_KINDS:
        raise ConfigError(f"rotation kind: expected one of {', '.join(ROTATION_KINDS)}, got {kind!r}")
    plan = hadamard_plan(n)
    if kind == "hadamard" and not plan.full_width:
        why = plan.reason.partition(";")[0]
        return RotationInfo(n, kind, "orthogonal", f"{why}; a random orthogonal matrix instead")
    return RotationInfo(n, kind, kind, plan.reason if kind == "hadamard" else "as requested")


def random_rotation(n: int, kind: str, generator: torch.Generator) -> Tensor:
    """An orthogonal [n, n] float64 matrix on the CPU, drawn from `generator` (a CPU generator).

    "hadamard": diag(±1) H / sqrt(n). The signs are on the input side: after H they would only flip outputs.
    Without a full-width H (see `rotation_info`) it is "orthogonal", and the log says so.
    "orthogonal": uniform (Haar) on the orthogonal group: Q of a Gaussian's QR, columns signed so that diag(R) > 0
    (F. Mezzadri, 2007). "none": the identity.

    Raises: ConfigError: unknown kind. QuantError: n < 1.
    """
    info = rotation_info(n, kind)
    if info.used != info.requested:
        logger.info("rotation of width %d: %s", n, info.reason)
    if info.used == "hadamard":
        return _random_signs(n, generator)[:, None] * hadamard_matrix(n) / math.sqrt(n)
    if info.used == "orthogonal":
        return _haar(n, generator)
    return torch.eye(n, dtype=torch.float64, device="cpu")


def part_rotation(sizes: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    """blockdiag(R_0, R_1, ...) [sum(sizes), sum(sizes)] float64: one independent rotation per part, so parts never mix.

    Args:   sizes: columns of each part in order, [low, high] or [lowest, low, high]; a part of 0 columns is skipped.
    Raises: QuantError: a negative size, or no columns at all. ConfigError: unknown kind.
    """
    if min(sizes, default=0) < 0 or sum(sizes) == 0:
        raise QuantError(f"part_rotation: expected part sizes >= 0 with a positive sum, got {list(sizes)}")
    return torch.block_diag(*(random_rotation(size, kind, generator) for size in sizes if size > 0))


def _random_signs(n: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (n,), generator=generator, dtype=torch.float64, device="cpu") - 1.0


def _haar(n: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
