"""insert-projections: the four changes of basis of ResQ, as explicit nodes; U and its inverse, so the model stays the same.

    U_A  residual stream:  project after every writer, inverse before every reader.  A permutation passes the gain of the reading norm,
         which is permuted with it; any other basis needs a norm without one (fold-norms).  Where norms with a gain write into the
         stream (post-norm models) U_A cannot pass them: project and inverse then stand together before the reading linears,
         behind the gain, and the projection stays an operator of its own; every value that linears read has its own basis.  So do
         linears whose norm keeps its gain (fold-norms) in a stream that changes basis: out of U, the gain, and into their basis are
         one matrix.
    U_B  values: project_heads before the cache, inverse after every attention that reads them.
    U_C  keys, after RoPE, and the queries of every attention that reads them: project both; the product q kᵀ does not change.
    U_L  compressed vectors of latent attention: project before the norm, inverse before the linears that read them.  A rotation passes
         a norm without gain (fold-norms); where the gain stays, the projection stands behind it and is an operator of its own.
    U_D  input of down projections: Hadamard transform and its inverse; inside each part where channels are split by energy. Before it,
         where Bases have them, the principal directions of blocks of 64 channels: 64 multiplications a channel, online.

Source: ResQ, arXiv 2412.14363, section 4 and figure 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.sites import Site
from resq_compiler.analysis.topology import Attention, Compressed, ReadGroup, Topology
from resq_compiler.calibration.bases import Bases, BlockBasis, order_of
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.args import set_argument, source
from resq_compiler.ir.graph_tools import emit
from resq_compiler.ir.transforms import Placing, factors_of
from resq_compiler.ir.views import Norm
from resq_compiler.numerics.hadamard import hadamard_plan
from resq_compiler.numerics.transforms import (
    BlockRotation,
    HadamardRotation,
    HeadRotation,
    Product,
    Rotation,
)
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.pipeline.placing import place


@dataclass(frozen=True)
class InsertProjections(Pass):
    """Insert U_A, U_B and U_C of the Bases with their inverses, and U_D; down "none": no Hadamard transform."""

    name: ClassVar[str] = "insert-projections"
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    down: Literal["hadamard", "none"] = "hadamard"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if any(meta.get(node, meta.Projection) for node in gm.graph.nodes):
            return 0  # bases do not nest
        topology, bases = ctx.facts.get(Topology), ctx.facts.find(Bases) or Bases()
        done = 0
        if bases.residual is not None:
            done += insert_residual(gm, topology, bases.residual, ctx)
        if bases.reading:
            done += insert_reading(gm, topology, bases, ctx)
        for a in topology.keepers:
            if bases.value:
                done += insert_value(gm, topology.sharing(a), bases.value[a.block], ctx)
            if bases.key and ctx.facts.get(ColumnPlan).kv_bits < FLOAT_BITS:
                done += insert_key(gm, topology.sharing(a), bases.key[a.block], ctx)
        for block in topology.blocks:
            for vector in block.attention.vectors:
                basis = bases.latent.get(Site(vector.site, block.index))
                done += 0 if basis is None else insert_vector(gm, vector, basis, block.index, ctx)
            downs = [f.down for f in block.feed_forwards if f.down not in topology.floats]
            for down in downs if self.down == "hadamard" else ():
                done += insert_down(gm, down, bases.down.get(down), ctx, block.index)
        return done


def insert_residual(gm: GraphModule, topology: Topology, basis: Tensor, ctx: PassContext) -> int:
    """U_A around the residual stream."""
    u = place(gm, ctx, Rotation(basis), "U_A", topology.head, InsertProjections)
    residual = topology.residual
    for writer in residual.writers:
        u.forward(writer, writer.users, meta.Projection("U_A"))
    fused = [group for group in residual.readers if not group.online]
    for group in fused:
        pass_norm(gm, group.norm, order_of(basis))
        value = source(group.linears[0])  # behind the projection, where linears read what a writer made
        u.inverse(value, group.linears, meta.Projection("U_A", inverse=True))
    return len(residual.writers) + len(fused)


def pass_norm(gm: GraphModule, node: Node | None, order: Tensor | None) -> None:
    """Let a norm with a gain read a permuted stream. Raises PassError: the basis is no permutation (order None)."""
    norm = Norm.of(node)
    if norm is None:
        return
    for name, tensor in (("weight", norm.gain), ("bias", norm.bias)):
        if tensor is None:
            continue
        if order is None:
            raise PassError(
                f"node {norm.node.name}: a norm with a gain reads the stream; expected fold-norms before this",
                node=norm.node.name,
            )
        value = graph_tools.get_tensor(gm, tensor)[order]
        target = f"resq.{norm.node.name}.{name}"
        set_argument(norm.node, name, graph_tools.add_tensor(gm, target, value, InsertProjections.name))


def insert_reading(gm: GraphModule, topology: Topology, bases: Bases, ctx: PassContext) -> int:
    """U_A before the linears where it stays online. Equal bases of a stream that keeps its own are one tensor."""
    residual = topology.residual
    names = ", ".join(sorted({graph_tools.module_of(n) for n in residual.gained_writers})[:2])
    if names:
        why = f"norms with a gain write into the residual stream ({names}, ...)"
        ctx.note(f"U_A stays online before attention and feed-forward: {why}")
    elif ctx.overrides is not None and ctx.overrides.fusable is False:
        ctx.note("U_A stays online before attention and feed-forward: the topology override says so")
    made: dict[int, Placing] = {}
    name = "U_A" if bases.residual is None else "U_A_own"  # U_A itself is a tensor of the stream
    for i, group in enumerate(topology.online):
        basis = bases.reading[group.value]
        if id(basis) not in made:
            made[id(basis)] = place(gm, ctx, Rotation(basis), f"{name}.{len(made)}", topology.head, InsertProjections)
        u, online = made[id(basis)], meta.Projection("U_A", online=True)
        if bases.residual is None:
            projected = u.forward(group.value, group.linears, online)
        else:
            projected = insert_change(gm, group, bases.residual, basis, f"resq.U_A_change.{i}", u.like)
        u.inverse(projected, group.linears, meta.Projection("U_A", inverse=True))
    return 2 * len(topology.online)


def insert_change(gm: GraphModule, group: ReadGroup, stream: Tensor, basis: Tensor, name: str, like: Tensor) -> Node:
    """Of a norm of the stream x U, without gain: n U -> n diag(g) U', with one matrix Uᵀ diag(g) U'."""
    norm = Norm.of(group.norm)
    matrix = stream.mT @ basis
    if norm is not None and norm.gain is not None:
        matrix = stream.mT @ (graph_tools.get_tensor(gm, norm.gain).double()[:, None] * basis)
        norm.drop_affine()
    tensor = graph_tools.add_tensor(gm, name, matrix.to(like.device, like.dtype), InsertProjections.name)
    with gm.graph.inserting_after(group.value):
        projected = emit(gm.graph, ops.project, (group.value, tensor), group.value, InsertProjections.name)
    for linear in group.linears:
        linear.replace_input_with(group.value, projected)
    return meta.put(projected, meta.Projection("U_A", online=True))


def insert_value(gm: GraphModule, sharing: Sequence[Attention], basis: Tensor, ctx: PassContext) -> int:
    """U_B between the value projection and the cache; its inverse after every attention that reads it, the first of which keeps it."""
    keeper = sharing[0]
    u = place(gm, ctx, HeadRotation(basis), f"U_B.{keeper.block}", keeper.v, InsertProjections)
    value, reader = keeper.values
    u.forward(value, [reader], meta.Projection("U_B", online=not keeper.value_is_linear, block=keeper.block))
    for a in sharing:
        u.inverse(a.core, a.core.users, meta.Projection("U_B", inverse=True, block=a.block))
    return 1 + len(sharing)


def insert_key(gm: GraphModule, sharing: Sequence[Attention], basis: Tensor, ctx: PassContext) -> int:
    """U_C on new keys after RoPE, and on the queries of every attention that reads them, the first of which keeps them."""
    keeper = sharing[0]
    transform = Rotation(basis) if basis.dim() == 2 else HeadRotation(basis)
    u, fact = (
        place(gm, ctx, transform, f"U_C.{keeper.block}", keeper.k, InsertProjections),
        meta.Projection("U_C", block=keeper.block),
    )
    u.forward(keeper.new_keys, [keeper.key_cache], fact)
    for a in sharing:
        query, reader = a.queries
        u.forward(query, [reader], dataclasses.replace(fact, block=a.block))
    return 1 + len(sharing)


def insert_vector(gm: GraphModule, vector: Compressed, basis: Tensor, index: int, ctx: PassContext) -> int:
    """The basis of a compressed vector of latent attention: before its norm, which a rotation passes where it has no gain, or behind it."""
    u = place(gm, ctx, Rotation(basis), f"U_L.{vector.site}.{index}", vector.writer, InsertProjections)
    norm = Norm.of(vector.norm)
    behind = norm is not None and (norm.gain is not None or norm.subtracts_mean)
    made = vector.written if behind else vector.writer
    turned = u.forward(made, made.users, meta.Projection("U_L", online=behind, block=index))
    read = turned if made is vector.value else vector.value
    u.inverse(read, vector.linears, meta.Projection("U_L", inverse=True, block=index))
    return 2


def insert_down(gm: GraphModule, down: Node, blocks: BlockBasis | None, ctx: PassContext, index: int) -> int:
    """U_D and its inverse before a down projection: a Hadamard transform, behind principal directions of blocks where there are any."""
    turn = hadamard(values.width(source(down)), ctx, index)
    transform = turn if blocks is None else Product((BlockRotation(blocks.vectors, blocks.order), turn))
    u = place(gm, ctx, transform, f"U_D.{down.name}", down, InsertProjections)
    turned = u.forward(source(down), [down], meta.Projection("U_D", block=index))
    u.inverse(turned, [down], meta.Projection("U_D", inverse=True, block=index))
    return 2 * len(factors_of(transform))


def hadamard(width: int, ctx: PassContext, block: int) -> HadamardRotation:
    """The Hadamard transform of a down projection's input, one for each of its parts; a note where one has no full width."""
    plan = ctx.facts.get(ColumnPlan)
    parts = tuple(plan.sizes(width, "down", block=block)) if plan.split_down else (width,)
    for transform in map(hadamard_plan, parts):
        if not transform.full_width:
            ctx.note(
                f"U_D on {transform.n} channels is a block transform of width {transform.block}: {transform.reason}"
            )
    return HadamardRotation(parts)
