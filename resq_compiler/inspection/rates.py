"""How fast a device computes what a compile mostly computes, from measurements of a second in all."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from resq_compiler.numerics import upper_factor
from resq_compiler.numerics.basis import principal_basis
from resq_compiler.numerics.gptq import gptq
from resq_compiler.numerics.quantized import Part
from resq_compiler.numerics.scale_search import search_scale
from resq_compiler.util import devices

SIDE = 768  # of the matrices that are measured: large enough for full speed, small enough for a second in all
LONG_ENOUGH = 0.05  # seconds of one measurement


@dataclass(frozen=True)
class Rates:
    """How fast a device computes, from measurements of a second in all.

    products, in the dtype of calibration: multiplications and additions a second; doubles: the same in float64. eigen, factor: seconds
    of the eigenvectors, and of the factorization in GPTQ, over the cube of a width. search: seconds of the
    search for a scale, for each weight. columns: seconds of GPTQ's steps from column to column, for each weight. digest: bytes a second.
    """

    products: float
    doubles: float
    eigen: float
    factor: float
    search: float
    columns: float
    digest: float


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device of this machine."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(SIDE, SIDE, generator=draw, dtype=torch.float64).to(device)
    plain, typed = wide.float(), wide.to(dtype)
    moment = wide.T @ wide
    rows = torch.cat([plain, -plain])  # enough for a step from column to column to take longer than to be started
    products = 2 * SIDE**3 / seconds(lambda: typed @ typed, device)
    rounded = moment.float()
    factor = seconds(lambda: upper_factor.factorize(rounded.clone()), device)
    search = seconds(lambda: search_scale(rows, 4), device) / rows.numel()
    whole = seconds(lambda: gptq(rows, rounded, [Part(4, 0, SIDE)], clip="max"), device)
    spread = rows.numel() * SIDE / (2 * SIDE**3 / seconds(lambda: plain @ plain, device))
    held = bytes(2**22)
    return Rates(
        products=products,
        doubles=2 * SIDE**3 / seconds(lambda: wide @ wide, device),
        eigen=seconds(lambda: principal_basis(moment), device) / SIDE**3,
        factor=factor / SIDE**3,
        search=search,
        columns=max(whole - factor - spread, 0.0) / rows.numel(),
        digest=len(held) / seconds(lambda: hashlib.sha256(held), devices.CPU),
    )


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one run, the second and later ones of which count: the first one warms up."""
    work()
    done, began = 0, _now(device)
    while (spent := _now(device) - began) < LONG_ENOUGH or not done:
        work()
        done += 1
    return spent / done


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
