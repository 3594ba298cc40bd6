"""How much of a row's range its codes should cover: the share that loses least, measured.

A few codes over the whole range of a wide row have steps that its largest column dictates. Covering less gives smaller steps and cuts
columns off. For n independent normal columns and 4 bits the best share falls from 1 at n = 56 to 0.83 at 504 and 0.64 at 14336; rows that
one channel dominates have columns of equal size after a rotation, and every cut hurts. So it is measured, site by site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resq_compiler.numerics.quantized import dequantize, quantize_activation

SHARES = tuple(round(1 - 0.05 * i, 2) for i in range(11))
"""Candidates, the whole range first: it wins ties."""
ROWS = 256  # after so many, and so many more, shares far from the best are given up
FAR = 0.15  # of the least error, after the first ROWS; of n times as many an n-th


class ClipSearch:
    """Error of each share over all rows seen: sum over rows of |Q(x) - x|^2 / |x|^2; infinite once it is given up. Rows count alike.

    Relative, because what reads the layer's output is a norm; a massive token would else decide alone.

    readers: [N, width], the weights that read the rows. With them the error is |(Q(x) - x) readers^T|^2 / |x|^2: what is cut off lies
    in the direction of x, which weights amplify, and what is rounded lies in any; the error of the input counts both alike. dtype: of the
    products with them. groups: equal runs of columns of rows with scales of their own.
    """

    def __init__(
        self, bits: int, readers: Tensor | None = None, dtype: torch.dtype = torch.float32, groups: int = 1
    ) -> None:
        self.bits, self.groups, self.rows = bits, groups, 0
        self.errors = torch.zeros(len(SHARES), dtype=torch.float64)
        self.readers = None if readers is None else _factor(readers).to(dtype)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add rows [..., width], float."""
        for rows in x.detach().flatten(0, -2).float().split(ROWS):
            energy = rows.square().sum(-1).clamp_min(torch.finfo(rows.dtype).tiny)
            for i in self.errors.isfinite().nonzero().flatten().tolist():
                gap = dequantize(quantize_activation(rows, self.bits, self.groups, SHARES[i])).sub_(rows)
                felt = gap if self.readers is None else (gap.to(self.readers.dtype) @ self.readers).float()
                self.errors[i] += float((felt.square_().sum(-1) / energy).sum())
            self.rows += len(rows)
            near = 1 + FAR * min(1, ROWS / self.rows)
            self.errors[self.errors > near * self.errors.min()] = torch.inf

    def best(self) -> float:
        """The share with the least error."""
        return SHARES[int(self.errors.argmin())]


def _factor(readers: Tensor) -> Tensor:
    """F [width, n] with |e F| = |e readers^T| for every row e, n at most width: a Cholesky factor where that is smaller."""
    rows, width = readers.shape
    if rows <= width:
        return readers.mT.contiguous().float()
    gram = (readers.float().mT @ readers.float()).double()
    gram.diagonal().add_((1e-6 * gram.diagonal().mean()).clamp_min(1e-80))  # more than the rounding of its sums
    return torch.linalg.cholesky(gram).float()
