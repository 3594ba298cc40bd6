"""How much whatever reads a value amplifies an error in it: second moments of the reading weights.

An error e in the input of linears W becomes e Wᵀ at their output; over errors of equal size in all directions its energy is
e (sum of Wᵀ W) eᵀ. Directions with much of this energy deserve bits as much as directions with much variance.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.topology import Attention, ReadGroup
from resq_compiler.ir import values
from resq_compiler.ir.expert_views import matrices
from resq_compiler.ir.views import Linear
from resq_compiler.util import devices


def residual_readers(gm: GraphModule, groups: Iterable[ReadGroup]) -> Tensor:
    """Sum of Wᵀ W over linears that read the residual stream: float64 [d, d]. An expert counts by the share of tokens that it would get
    if all were chosen equally often."""
    readers = [Linear.require(linear) for group in groups for linear in group.linears]
    return added(_reader(gm, linear) for linear in readers)


def _reader(gm: GraphModule, linear: Linear) -> Tensor:
    weights = (devices.here(weight).float() for weight in matrices(gm, linear))
    found = added((w.mT @ w).double() for w in weights)
    if linear.indices is None:
        return found
    return found / values.shape(linear.weight)[0] * values.width(linear.indices)


def added(matrices: Iterable[Tensor]) -> Tensor:
    """Their sum, one of them in memory at a time; in sums of 16, which is how `torch.stack(...).sum(0)` adds up to 255 of them."""
    total: Tensor | float = 0.0
    part: Tensor | float = 0.0
    for i, matrix in enumerate(matrices, 1):
        part = part + matrix
        if i % 16 == 0:
            total, part = total + part, 0.0
    found = part + total
    assert isinstance(found, Tensor), "linears read every value that has a basis"
    return found


def value_readers(gm: GraphModule, sharing: Iterable[Attention]) -> Tensor:
    """For each key/value head, Wᵀ W of the output projections' columns of its query heads: float64 [G, D, D].

    sharing: all attentions that read these values.
    """

    def of_one(attention: Attention) -> Tensor:
        weight = devices.here(Linear.require(attention.o).weight_tensor(gm)).double()
        heads = weight.unflatten(1, (attention.value_heads, -1, attention.value_dim))
        return torch.einsum("nghd,nghe->gde", heads, heads)

    return added(map(of_one, sharing))


def weigh(moment: Tensor, readers: Tensor) -> Tensor:
    """A moment with directions that readers amplify raised: both scaled to unit trace and added. [..., d, d].

    The bottom eigenvectors of the sum lower a bound of tr(Uᵀ M U) tr(Uᵀ R U), the energy of the 4-bit part times how much
    its noise is amplified (the arithmetic mean of both factors bounds their geometric mean).
    """
    return moment / _trace(moment) + readers / _trace(readers)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(matrix.dtype).tiny)
