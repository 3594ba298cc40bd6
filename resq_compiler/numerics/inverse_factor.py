"""The Cholesky factor of an inverse, in the memory of the matrix: H -> U upper triangular with U^T U = H^-1. H^-1 itself is never formed.

H = M M^T with M upper triangular, by blocks of columns from the last one on, and U = M^-1, by blocks from the first one on:

    S = H[:e, k] - M[:e, e:] M[k, e:]^T      M[k, k] M[k, k]^T = S[k]      M[:k, k] = S[:k] M[k, k]^-T         e: where block k ends
    U[:j, j] = -U[:j, :j] M[:j, j] M[j, j]^-1

Only the upper triangle is written, so the lower one still is H where a factorization fails. The factorization from the last column on
is Cholesky's of H with both orders reversed. Source: Golub and Van Loan, Matrix Computations, 3.1 (triangular systems), 4.2 (Cholesky).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 384  # columns at a time, factored by LAPACK: 1.2 to 1.4 times as fast as 1536, and what stands beside the matrix is a quarter


def reorder(matrix: Tensor, order: Tensor, step: int = 256) -> None:
    """matrix[order][:, order] in its own memory."""
    for rows in matrix.split(step):
        rows.copy_(rows[:, order])
    for columns in matrix.split(step, 1):
        columns.copy_(columns[order])


def invert(matrix: Tensor) -> bool:
    """Make the upper triangle of H [K, K] float64 that of U; the lower one, without the diagonal, stays.

    False: H is not positive definite, and its diagonal and upper triangle are lost.
    """
    blocks = [slice(i, min(i + BLOCK, len(matrix))) for i in range(0, len(matrix), BLOCK)]
    for here in reversed(blocks):
        until, behind = slice(0, here.stop), slice(here.stop, len(matrix))
        column = torch.addmm(matrix[until, here], matrix[until, behind], matrix[here, behind].mT, alpha=-1)
        inverse = _inverse_of_block(column[here])
        if inverse is None:
            return False
        above = slice(0, here.start)
        torch.mm(column[above], inverse.mT, out=matrix[above, here])
        matrix[here, here] = inverse + matrix[here, here].tril(-1)
    for column_of, above in _pairs(blocks):
        between = slice(above.stop, column_of.start)
        found = matrix[above, above].triu() @ matrix[above, column_of]
        found.addmm_(matrix[above, between], matrix[between, column_of])
        torch.mm(found.neg_(), matrix[column_of, column_of].triu(), out=matrix[above, column_of])
    return True


def restore(matrix: Tensor) -> None:
    """The upper triangle without the diagonal from the lower one."""
    for start in range(0, len(matrix), BLOCK):
        here, above = slice(start, start + BLOCK), slice(0, start)
        matrix[above, here] = matrix[here, above].mT
        lower = matrix[here, here].tril(-1)
        matrix[here, here] = lower + lower.mT


def work(width: int) -> float:
    """Operations of `invert`, as those of one block of so large a width: by blocks, half of a triangular inverse falls away."""
    alone = min(width, BLOCK) / width
    return width**3 * (1 + alone**2) / 2


def _pairs(blocks: list[slice]) -> Iterator[tuple[slice, slice]]:
    """Blocks of columns in order, each with the blocks of rows above it."""
    for i, block in enumerate(blocks):
        for above in blocks[:i]:
            yield block, above


def _inverse_of_block(matrix: Tensor) -> Tensor | None:
    """U of a block as a whole, zeros below the diagonal; None: it is not positive definite."""
    turned = matrix.flip(0, 1)  # upper becomes lower, as LAPACK has it
    lower, info = torch.linalg.cholesky_ex(turned)
    if int(info):
        return None
    inverse = torch.eye(len(lower), out=turned)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return inverse.flip(0, 1)
