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
from resq_compiler.passes.fold_norms import by_row_chunks, linear_weight, replace_weight
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.calibration.bases import Bases
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory

LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Fuse projections into weights."""

    name: ClassVar[str] = "fuse-projections"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        exact = _float64_bases(ctx)
        found = [
            n for n in gm.graph.nodes if is_call(n, ops.project, ops.project_heads, ops.project_blocks, ops.hadamard)
        ]
        left, before = found, None
        while left != before:  # an inverse may meet a linear only once the one behind it is gone
            left, before = [n for n in left if not fuse(gm, n, exact)], left
        done = len(found) - len(left)
        gm.graph.eliminate_dead_code()
        graph_tools.delete_unused_tensors(gm)
        return done


def _float64_bases(ctx: PassContext) -> dict[str, Tensor]:
    bases = ctx.facts.find(Bases) or Bases()
    table = {"resq.U_A": bases.residual}
    table |= {f"resq.U_B.{i}": u for i, u in enumerate(bases.value)}
    table |= {f"resq.U_D.{down.name}": basis.vectors for down, basis in bases.down.items()}
    return {name: u for name, u in table.items() if u is not None}


def fuse(gm: GraphModule, node: Node, bases: dict[str, Tensor]) -> int:
    """Fuse one projection if it meets a linear on the side where it can; 0 if it stays."""
    fact = meta.get(node, meta.Projection)
    if fact is None or fact.basis == "U_C" or fact.online:
        return 0
    fused = fuse_inverse(gm, node, bases) if fact.inverse else fuse_forward(gm, node, bases)
    if fused:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        memory.trim()  # the weights before
    return int(fused)


def fuse_forward(gm: GraphModule, node: Node, bases: dict[str, Tensor]) -> bool:
    """Into the linear or embedding that makes the value, if nothing else reads it."""
    if is_call(node, ops.hadamard, ops.project_blocks):
        return False
    u = bases[str(node.args[1].target)]
    source = node.args[0]
    if is_call(node, ops.project_heads):
        if not is_call(source, ops.split_heads) or len(source.users) != 1:
            return False
        source = source.args[0]
    if len(source.users) != 1 or not is_call(source, LINEAR, EMBEDDING):
        return False
    if is_call(source, EMBEDDING):
        table = source.args[0]
        graph_tools.set_tensor(gm, str(table.target), by_row_chunks(graph_tools.get_tensor(gm, table), lambda w: w @ u))
        return True
    rotate_outputs(gm, source, u if is_call(node, ops.project) else _repeat(u, u.shape[0]))
    return True


def fuse_inverse(gm: GraphModule, node: Node, bases: dict[str, Tensor]) -> bool:
    """Into all linears that read the value."""
    readers = list(node.users)
    if is_call(node, ops.project_heads) and len(readers) == 1 and is_call(readers[0], ops.merge_heads):
        readers = list(readers[0].users)
    if not readers or not all(is_call(r, LINEAR) for r in readers):
        return False
    for reader in readers:
        weight = linear_weight(gm, reader)
        replace_weight(gm, reader, by_row_chunks(weight, _column_change(gm, node, weight, bases)))
    return True


def _column_change(gm: GraphModule, node: Node, weight: Tensor, bases: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The map W -> W U for the input columns of a weight."""
    if is_call(node, ops.hadamard):
        return lambda w: ops.hadamard(w, False, node.args[2])
    u = bases[str(node.args[1].target)]
    if is_call(node, ops.project):
        return lambda w: w @ u
    if is_call(node, ops.project_blocks):
        order = graph_tools.get_tensor(gm, node.args[2])
        return lambda w: ops.project_blocks(w, u, order)
    heads = _repeat(u, weight.shape[1] // u.shape[-1])
    return lambda w: torch.einsum("nhd,hde->nhe", w.unflatten(1, heads.shape[:2]), heads).flatten(1)


def _repeat(u: Tensor, heads: int) -> Tensor:
    """U per key/value head [G, D, D] for each of `heads` query heads."""
    return u.repeat_interleave(heads // u.shape[0], 0)


def rotate_outputs(gm: GraphModule, linear: Node, u: Tensor) -> None:
    """W <- Uᵀ W and b <- Uᵀ b; u is [N, N], or [G, D, D] for N = G·D outputs."""

    def turn(value: Tensor) -> Tensor:
        wide = value.double()
        if u.dim() == 2:
            return (u.mT @ wide).to(value.dtype)
        grouped = wide.unflatten(0, u.shape[:2])
        return torch.einsum("gde,gd...->ge...", u, grouped).flatten(0, 1).to(value.dtype)

    replace_weight(gm, linear, turn(linear_weight(gm, linear)))
    bias = linear.args[2] if len(linear.args) > 2 else None
    if bias is not None:
        graph_tools.set_tensor(gm, str(bias.target), turn(graph_tools.get_tensor(gm, bias)))
