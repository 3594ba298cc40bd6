"""The upper Cholesky factor, in the memory of the matrix: H -> M upper triangular with M M^T = H. By blocks of columns, the last one first:

    S = H[:e, k] - M[:e, e:] M[k, e:]^T      M[k, k] M[k, k]^T = S[k]      M[:k, k] = S[:k] M[k, k]^-T         e: where block k ends

Products are in the precision of the matrix, blocks on the diagonal in float64. Only the upper triangle is written, so the lower one still
is H where a factorization fails. It is Cholesky's of H with both orders reversed. Source: Golub and Van Loan, Matrix Computations, 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # columns at a time, factored by LAPACK


def reorder(matrix: Tensor, order: Tensor, step: int = 64) -> None:
    """matrix[order][:, order] in its own memory."""
    for rows in matrix.split(step):
        rows.copy_(rows.index_select(1, order))
    for columns in matrix.split(step, 1):
        columns.copy_(columns.index_select(0, order))


def factorize(matrix: Tensor) -> bool:
    """Make the upper triangle of H [K, K] that of M; the lower one, without the diagonal, stays.

    False: H is not positive definite, and its diagonal and upper triangle are lost.
    """
    for start in reversed(range(0, len(matrix), BLOCK)):
        here, above = slice(start, start + BLOCK), slice(0, start)
        until, behind = slice(0, start + BLOCK), slice(start + BLOCK, len(matrix))
        column = torch.addmm(matrix[until, here], matrix[until, behind], matrix[here, behind].mT, alpha=-1)
        factor, inverse = _of_block(column[here])
        if factor is None:
            return False
        torch.mm(column[above], inverse.mT, out=matrix[above, here])
        matrix[here, here] = factor + matrix[here, here].tril(-1)
    return True


def restore(matrix: Tensor) -> None:
    """The upper triangle without the diagonal from the lower one."""
    for start in range(0, len(matrix), BLOCK):
        here, above = slice(start, start + BLOCK), slice(0, start)
        matrix[above, here] = matrix[here, above].mT
        lower = matrix[here, here].tril(-1)
        matrix[here, here] = lower + lower.mT


def _of_block(matrix: Tensor) -> tuple[Tensor | None, Tensor]:
    """M of a block, zeros below the diagonal, and its inverse, in the precision of the block; None: it is not positive definite."""
    turned = matrix.double().flip(0, 1)  # upper becomes lower, as LAPACK has it
    lower, info = torch.linalg.cholesky_ex(turned)
    if int(info):
        return None, matrix
    inverse = torch.eye(len(lower), out=turned)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    return lower.flip(0, 1).to(matrix.dtype), inverse.flip(0, 1).to(matrix.dtype)
