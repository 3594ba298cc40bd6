"""insert-projections: the four changes of basis of ResQ, as explicit nodes; U and its inverse, so the model stays the same.

    U_A  residual stream:  project after every writer, inverse before every reader.  A permutation passes the gain of the reading norm,
         which is permuted with it; any other basis needs a norm without one (fold-norms).  Where norms with a gain write into the
         stream (post-norm models) U_A cannot pass them: project and inverse then stand together before the reading linears,
         behind the gain, and the projection stays an operator of its own; every value that linears read has its own basis.
    U_B  values: project_heads before the cache, inverse after attention.
    U_C  queries and keys, after RoPE: project both; the product q kᵀ does not change.
    U_D  input of down projections: Hadamard transform and its inverse; inside each part where channels are split by energy. Before it,
         where Bases have them, the principal directions of blocks of 64 channels: 64 multiplications a channel, online.

Source: ResQ, arXiv 2412.14363, section 4 and figure 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.topology import Attention, Topology
from resq_compiler.calibration.bases import Bases, BlockBasis, order_of
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.args import set_argument, source
from resq_compiler.ir.graph_tools import emit
from resq_compiler.ir.views import Linear, Norm
from resq_compiler.numerics.hadamard import hadamard_plan
from resq_compiler.pipeline.passes import Pass, PassContext


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
            done += insert_residual(gm, topology, bases.residual)
        if bases.reading:
            done += insert_reading(gm, topology, bases.reading, ctx)
        for block in topology.blocks:
            if bases.value:
                done += insert_value(gm, block.attention, bases.value[block.index], block.index)
            if bases.key and ctx.facts.get(ColumnPlan).kv_bits < FLOAT_BITS:
                done += insert_key(gm, block.attention, bases.key[block.index], block.index)
            downs = [f.down for f in block.feed_forwards if f.down not in topology.floats]
            for down in downs if self.down == "hadamard" else ():
                done += insert_hadamard(gm, down, ctx, block.index)
                done += insert_down_blocks(gm, down, bases.down[down], block.index) if down in bases.down else 0
        return done


def insert_after(
    gm: GraphModule, value: Node, users: list[Node], target: Callable, args: tuple, fact: meta.Projection
) -> Node:
    """target(value, *args) between a value and some of its users."""
    with gm.graph.inserting_after(value):
        node = emit(gm.graph, target, (value, *args), value, InsertProjections.name)
    for user in users:
        user.replace_input_with(value, node)
    return meta.put(node, fact)


def basis_node(gm: GraphModule, name: str, value: Tensor, like: Tensor) -> Node:
    """A tensor node for a basis, in the model's dtype."""
    return graph_tools.add_tensor(gm, f"resq.{name}", value.to(like.dtype).to(like.device), InsertProjections.name)


def insert_residual(gm: GraphModule, topology: Topology, basis: Tensor) -> int:
    """U_A around the residual stream."""
    u = basis_node(gm, "U_A", basis, Linear.require(topology.head).weight_tensor(gm))
    forward, inverse = meta.Projection("U_A"), meta.Projection("U_A", inverse=True)
    residual = topology.residual
    for writer in residual.writers:
        insert_after(gm, writer, list(writer.users), ops.project, (u,), forward)
    for group in residual.readers:
        pass_norm(gm, group.norm, order_of(basis))
        insert_after(gm, group.value, group.linears, ops.project, (u, True), inverse)
    return len(residual.writers) + len(residual.readers)


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
                f"node {norm.node.name}: a norm with a gain reads the stream; expected fold-norms before this"
            )
        value = graph_tools.get_tensor(gm, tensor)[order]
        target = f"resq.{norm.node.name}.{name}"
        set_argument(norm.node, name, graph_tools.add_tensor(gm, target, value, InsertProjections.name))


def insert_reading(gm: GraphModule, topology: Topology, bases: Mapping[Node, Tensor], ctx: PassContext) -> int:
    """U_A before the linears that read a value, where the stream itself cannot change basis. Equal bases are one tensor."""
    residual = topology.residual
    names = ", ".join(sorted({graph_tools.module_of(n) for n in residual.gained_writers})[:2])
    if names:
        why = f"norms with a gain write into the residual stream ({names}, ...)"
        ctx.note(f"U_A stays online before attention and feed-forward: {why}")
    elif ctx.overrides is not None and ctx.overrides.fusable is False:
        ctx.note("U_A stays online before attention and feed-forward: the topology override says so")
    like = Linear.require(topology.head).weight_tensor(gm)
    forward, inverse = meta.Projection("U_A", online=True), meta.Projection("U_A", inverse=True)
    made: dict[int, Node] = {}
    for group in topology.readers:
        basis = bases[group.value]
        if id(basis) not in made:
            made[id(basis)] = basis_node(gm, f"U_A.{len(made)}", basis, like)
        u = made[id(basis)]
        projected = insert_after(gm, group.value, group.linears, ops.project, (u,), forward)
        insert_after(gm, projected, group.linears, ops.project, (u, True), inverse)
    return 2 * len(topology.readers)


def insert_value(gm: GraphModule, attention: Attention, basis: Tensor, index: int) -> int:
    """U_B between the value projection and the cache; its inverse after attention."""
    value, core = attention.new_values, attention.core
    u = basis_node(gm, f"U_B.{index}", basis, Linear.require(attention.v).weight_tensor(gm))
    forward = meta.Projection("U_B", online=not attention.value_is_linear, block=index)
    insert_after(gm, value, [attention.value_cache], ops.project_heads, (u,), forward)
    insert_after(
        gm, core, list(core.users), ops.project_heads, (u, True), meta.Projection("U_B", inverse=True, block=index)
    )
    return 2


def insert_key(gm: GraphModule, attention: Attention, basis: Tensor, index: int) -> int:
    """U_C on queries and new keys after RoPE."""
    key, query = attention.new_keys, attention.view.q
    u = basis_node(gm, f"U_C.{index}", basis, Linear.require(attention.k).weight_tensor(gm))
    project = ops.project if basis.dim() == 2 else ops.project_heads
    fact = meta.Projection("U_C", block=index)
    insert_after(gm, key, [attention.key_cache], project, (u,), fact)
    insert_after(gm, query, [attention.core], project, (u,), fact)
    return 2


def insert_hadamard(gm: GraphModule, down: Node, ctx: PassContext, block: int) -> int:
    """U_D and its inverse before a down projection."""
    x = source(down)
    width = values.width(x)
    plan = ctx.facts.get(ColumnPlan)
    parts = tuple(plan.sizes(width, "down", block=block)) if plan.split_down else (width,)
    stretches = parts if len(parts) > 1 else None
    for transform in map(hadamard_plan, parts):
        if not transform.full_width:
            ctx.note(
                f"U_D on {transform.n} channels is a block transform of width {transform.block}: {transform.reason}"
            )
    turned = insert_after(gm, x, [down], ops.hadamard, (False, stretches), meta.Projection("U_D", block=block))
    inverse = meta.Projection("U_D", inverse=True, block=block)
    insert_after(gm, turned, [down], ops.hadamard, (True, stretches), inverse)
    return 2


def insert_down_blocks(gm: GraphModule, down: Node, basis: BlockBasis, block: int) -> int:
    """Principal directions of blocks of channels before the Hadamard transform of a down projection, and back behind its inverse."""
    name, dtype = f"resq.U_D.{down.name}", Linear.require(down).weight_tensor(gm).dtype
    u = graph_tools.add_tensor(gm, name, basis.vectors.to(dtype), InsertProjections.name)
    columns = graph_tools.add_tensor(gm, f"{name}_order", basis.order, InsertProjections.name)
    back = source(down)
    turn = source(back)
    inverse, forward = (meta.Projection("U_D", inverse=inverse, block=block) for inverse in (True, False))
    insert_after(gm, back, [down], ops.project_blocks, (u, columns, True), inverse)
    insert_after(gm, source(turn), [turn], ops.project_blocks, (u, columns, False), forward)
    return 2
