"""fuse-projections: multiply every projection that meets a linear or an embedding into its weight, in float64.

    project(linear(x, W, b), U)                   -> linear(x, Uᵀ W, Uᵀ b)
    project(embedding(E), U)                      -> embedding(E U)
    linear(project(x, U, inverse), W)             -> linear(x, W U)
    project_heads(split_heads(linear(x, W)), U)   -> split_heads(linear(x, blockdiag(U)ᵀ W))
    linear(merge_heads(project_heads(x, U, inverse)), W) -> linear(merge_heads(x), W blockdiag(U))
    linear(hadamard(x, transpose), W)             -> linear(x, W H)
    linear(project_blocks(x, U, order, inverse), W) -> linear(x, project_blocks(W, U, order))

What meets none of these stays an operator of the graph (online): U_C, the Hadamard transform itself, U_A in post-norm models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration.bases import Bases
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import source
from resq_compiler.ir.graph_tools import is_call, only_user, replace
from resq_compiler.ir.views import Embedding, Hadamard, Linear, Project, SplitHeads
from resq_compiler.numerics.float64 import by_row_chunks
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory

TARGETS = (ops.project, ops.project_heads, ops.project_blocks, ops.hadamard)


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Fuse projections into weights."""

    name: ClassVar[str] = "fuse-projections"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        bases = ctx.facts.find(Bases) or Bases()
        found = [n for n in gm.graph.nodes if is_call(n, *TARGETS)]
        left, before = found, None
        while left != before:  # an inverse may meet a linear only once the one behind it is gone
            left, before = [n for n in left if not fuse(gm, n, bases)], left
        done = len(found) - len(left)
        gm.graph.eliminate_dead_code()
        graph_tools.delete_unused_tensors(gm)
        return done


def fuse(gm: GraphModule, node: Node, bases: Bases) -> bool:
    """Fuse one projection if it meets a linear on the side where it can."""
    fact = meta.get(node, meta.Projection)
    if fact is None or fact.basis == "U_C" or fact.online:
        return False
    fused = fuse_inverse(gm, node, fact, bases) if fact.inverse else fuse_forward(gm, node, fact, bases)
    if fused:
        replace(node, source(node))
        memory.trim()  # the weights before
    return fused


def exact_basis(node: Node, fact: meta.Projection, bases: Bases) -> Tensor:
    """U in float64: U_A [d, d], or U_B of a block [G, D, D]. The graph holds it in the type of the weights."""
    if fact.basis == "U_A":
        if bases.residual is not None:
            return bases.residual
        return bases.reading[source(source(node))]  # node is the inverse behind the projection of a value
    assert fact.block is not None
    return bases.value[fact.block]


def fuse_forward(gm: GraphModule, node: Node, fact: meta.Projection, bases: Bases) -> bool:
    """Into the linear or embedding that makes the value, if nothing else reads it."""
    project = Project.of(node)
    if project is None:
        return False
    x, u = project.x, exact_basis(node, fact, bases)
    if project.by_head:
        split = SplitHeads.of(x)
        if split is None or only_user(x) is None:
            return False
        x = split.x
    if only_user(x) is None:
        return False
    embedding, linear = Embedding.of(x), Linear.of(x)
    if embedding is not None:
        embedding.set_table(gm, by_row_chunks(embedding.table_tensor(gm), lambda w: w @ u))
    elif linear is not None:
        rotate_outputs(gm, linear, u)
    return embedding is not None or linear is not None


def fuse_inverse(gm: GraphModule, node: Node, fact: meta.Projection, bases: Bases) -> bool:
    """Into all linears that read the value."""
    merged = only_user(node)
    readers = list((merged if is_call(node, ops.project_heads) and is_call(merged, ops.merge_heads) else node).users)
    linears = [linear for reader in readers if (linear := Linear.of(reader)) is not None]
    if not linears or len(linears) < len(readers):
        return False
    for linear in linears:
        change = _column_change(gm, node, fact, linear, bases)
        linear.set_weight(gm, by_row_chunks(linear.weight_tensor(gm), change))
    return True


def _column_change(
    gm: GraphModule, node: Node, fact: meta.Projection, linear: Linear, bases: Bases
) -> Callable[[Tensor], Tensor]:
    """The map W -> W U for the input columns of a linear."""
    hadamard = Hadamard.of(node)
    if hadamard is not None:
        return lambda w: ops.hadamard(w, False, hadamard.sizes)
    if is_call(node, ops.project_blocks):
        blocks = bases.down[linear.node]
        return lambda w: ops.project_blocks(w, blocks.vectors, blocks.order)
    u = exact_basis(node, fact, bases)
    if is_call(node, ops.project):
        return lambda w: w @ u
    heads = _repeat(u, linear.weight_tensor(gm).shape[1] // u.shape[-1])
    return lambda w: torch.einsum("nhd,hde->nhe", w.unflatten(1, heads.shape[:2]), heads).flatten(1)


def _repeat(u: Tensor, heads: int) -> Tensor:
    """U per key/value head [G, D, D] for each of `heads` query heads."""
    return u.repeat_interleave(heads // u.shape[0], 0)


def rotate_outputs(gm: GraphModule, linear: Linear, u: Tensor) -> None:
    """W <- Uᵀ W and b <- Uᵀ b; u is [N, N], or [G, D, D] for N = G·D outputs."""

    def turn(value: Tensor) -> Tensor:
        wide = value.double()
        if u.dim() == 2:
            return (u.mT @ wide).to(value.dtype)
        grouped = wide.unflatten(0, u.shape[:2])
        return torch.einsum("gde,gd...->ge...", u, grouped).flatten(0, 1).to(value.dtype)

    linear.set_weight(gm, turn(linear.weight_tensor(gm)))
    bias = linear.bias_tensor(gm)
    if bias is not None:
        linear.set_bias(gm, turn(bias), FuseProjections.name)
