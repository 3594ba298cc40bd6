"""Block rotations and a permutation that spread outlier channels: the search of DuQuant.

Source: DuQuant, arXiv 2406.01721, section 3. Differs: peaks are those of the loudest calibration tokens, searched on these tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resq_compiler.numerics.rotation import random_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.numerics.transforms import BlockRotation, Product


def spreading_transform(rows: Tensor, block: int, steps: int, seed: int, purpose: str) -> Product:
    """Rotation of blocks, permutation, rotation of blocks, for rows [T, width] of large values.

    block: the most channels of a block; a divisor of the width. steps: of each greedy search, at most.
    """
    size = block_size(rows.shape[1], block)
    spread = uniform_first_row(size, seed, purpose)
    first, rows = greedy_rotation(rows.double().unflatten(1, (-1, size)), spread, steps)
    order = zigzag(rows.flatten(1).abs().amax(0), size)
    second, _ = greedy_rotation(rows.flatten(1)[:, order].unflatten(1, (-1, size)), spread, steps)
    return Product((BlockRotation(first, order), BlockRotation(second, torch.arange(rows.flatten(1).shape[1]))))


def block_size(width: int, most: int) -> int:
    """The largest divisor of a width that is at most `most`."""
    return next(n for n in range(min(most, width), 0, -1) if width % n == 0)


def uniform_first_row(size: int, seed: int, purpose: str) -> Tensor:
    """An orthogonal [size, size] float64 matrix whose first row is 1 / sqrt(size) everywhere: channel 0 is spread over all others."""
    drawn = random_rotation(size, "orthogonal", generator(seed, f"spread.{purpose}"))
    drawn[0] = 1
    q, r = torch.linalg.qr(drawn.mT)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT.contiguous()


def greedy_rotation(rows: Tensor, spread: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """For rows [T, G, D]: rotations [G, D, D], each a product of steps that bring the channel with the largest value to the front and
    spread it, cut off where the block's peak was least; and the rows behind them."""
    groups, size = rows.shape[1:]
    values = rows.transpose(0, 1).contiguous()
    turned = torch.eye(size, dtype=rows.dtype).expand(groups, -1, -1).contiguous()
    best, best_values, least = turned.clone(), values.clone(), values.abs().amax((1, 2))
    for _ in range(steps if size > 1 else 0):
        loudest = values.abs().amax(1).argmax(1)
        values, turned = (swap_first(t, loudest) @ spread for t in (values, turned))
        peak = values.abs().amax((1, 2))
        better = peak < least
        if not bool(better.any()) and bool((peak > 2 * least).all()):
            break
        least = torch.where(better, peak, least)
        best[better], best_values[better] = turned[better], values[better]
    return best, best_values.transpose(0, 1)


def swap_first(x: Tensor, channel: Tensor) -> Tensor:
    """x [G, T, D] with channel [G] and channel 0 exchanged in every block."""
    order = torch.arange(x.shape[-1]).repeat(len(x), 1)
    order[:, 0] = channel
    order[torch.arange(len(x)), channel] = 0
    return x.gather(2, order[:, None].expand_as(x))


def zigzag(peaks: Tensor, size: int) -> Tensor:
    """An order of channels [width] by which blocks of `size` get peaks of equal sum, nearly: the largest are dealt forth and back."""
    ranked = peaks.argsort(descending=True, stable=True)
    rounds = ranked.unflatten(0, (size, -1)).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()
