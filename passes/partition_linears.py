"""partition-linears: every linear becomes one linear for each precision, on its own columns of the input.

    linear(x, W, b) -> add(add(linear(columns(x, 0, r), W[:, :r]), linear(columns(x, r, K), W[:, r:])), b)

Columns are [low | high]. The input of an output projection is split inside every head, because U_B acts on heads: its columns
become [low of all heads | high of all heads]. Nothing is quantized yet: the sum of the parts is the linear.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import ColumnPart, ColumnPlan
from resq_compiler.analysis.topology import STREAM_ROLES, Topology
from resq_compiler.errors import ConfigError
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.args import source
from resq_compiler.ir.graph_tools import aten, emit, replace
from resq_compiler.ir.promises import Around
from resq_compiler.ir.views import Linear, MergeHeads
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory

SITE_OF_ROLE = {
    **dict.fromkeys(STREAM_ROLES, "attention"), "q_b": "qlatent", "q_b_rope": "qlatent", "k_b": "latent", "v_b": "latent",
    "gate": "mlp", "up": "mlp", "down": "down",
}  # fmt: skip


@dataclass(frozen=True)
class PartitionLinears(Pass):
    """Split every linear of the blocks (and lm_head if it is quantized) by precision, as the ColumnPlan says."""

    name: ClassVar[str] = "partition-linears"
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if any(meta.get(node, meta.LinearPart) for node in gm.graph.nodes):
            return 0
        topology, plan = ctx.facts.get(Topology), ctx.facts.get(ColumnPlan)
        check_experts(plan, topology)
        pieces: dict[tuple, Node] = {}
        done = 0
        for linear in topology.linears:
            site = meta.require(linear, meta.LinearSite)
            parts, heads = parts_of(values.width(source(linear)), site, topology, plan)
            view = Linear.require(linear)
            count = values.shape(view.weight)[0] if view.of_experts else 0
            experts = [plan.expert_bits(part, site.block, count, site.name) if count else None for part in parts]
            done += split(gm, linear, site, parts, experts, heads, pieces)
            memory.trim()
        if (bits := plan.lm_head_bits) is not None:
            site = meta.require(topology.head, meta.LinearSite)
            whole = ColumnPart(0, topology.hidden_size, bits, bits)
            done += split(gm, topology.head, site, (whole,), [None], 1, pieces)
        graph_tools.delete_unused_tensors(gm)
        return done


def check_experts(plan: ColumnPlan, topology: Topology) -> None:
    """Raise ConfigError where bits are said of experts that there are none of, or of high columns that experts do not have."""
    for said in plan.experts.items:
        widths = {
            (values.width(source(n)), SITE_OF_ROLE[meta.require(n, meta.LinearSite).role])
            for block, f, _ in topology.mixtures if block.index == said.block for n in (*f.gates, *f.ups, f.down)
        }  # fmt: skip
        if not widths:
            raise ConfigError(
                f"option expert_bits: expected a block with experts; got block {said.block}, which has none"
            )
        split_up = any(part.kind == "high" for w, site in widths for part in plan.linear_parts(w, site, said.block))
        if said.high and not split_up:
            raise ConfigError(
                f"option expert_bits: expected no bits of high columns, block {said.block} has none of them; got {said}"
            )


def parts_of(
    width: int, site: meta.LinearSite, topology: Topology, plan: ColumnPlan
) -> tuple[tuple[ColumnPart, ...], int]:  # fmt: skip
    """The parts of a linear's input of a width, and how many heads it consists of, each split alike."""
    if site.role != "o":
        return plan.linear_parts(width, SITE_OF_ROLE[site.role], site.block), 1
    assert site.block is not None
    attention = topology.blocks[site.block].attention
    return plan.linear_parts(attention.value_dim, "o", site.block), attention.num_heads


def split(
    gm: GraphModule, linear: Node, site: meta.LinearSite, parts: tuple[ColumnPart, ...], experts: Sequence[tuple[int, ...] | None],
    heads: int, pieces: dict[tuple, Node],
) -> int:  # fmt: skip
    """Replace a linear by its parts; pieces of inputs that several linears read are shared. experts: bits of each one, for every part."""
    view = Linear.require(linear)
    x, bias, rows = view.x, view.bias, view.weight_shape(gm)[:-1]
    total: Node | None = None
    for i, part in enumerate(parts):
        piece = input_piece(gm, x, part, heads, len(parts) == 1, pieces)
        name, shape = f"{site.name}.part{i}.weight", (*rows, heads * (part.stop - part.start))
        if shape == view.weight_shape(gm):
            tensor = graph_tools.add_tensor(gm, name, graph_tools.held(gm, view.weight), PartitionLinears.name)
        else:
            change = functools.partial(take, part=part, heads=heads)
            around = Around(before=functools.partial(give, part=part, width=view.weight_shape(gm)[-1], heads=heads))
            tensor = graph_tools.derive_tensor(
                gm, view.weight, name, change, shape, PartitionLinears.name, view.of_experts, around
            )
        with gm.graph.inserting_before(linear):
            y = view.like(gm.graph, piece, tensor, None, PartitionLinears.name)
            most = part.weight_bits if experts[i] is None else max(experts[i] or ())
            fact = meta.LinearPart(site, i, part.start, part.stop, most, part.activation_bits, heads, experts[i])
            meta.put(y, fact)
            total = y if total is None else emit(gm.graph, aten.add.Tensor, (total, y), linear, PartitionLinears.name)
    assert total is not None
    if bias is not None:
        target, args = (ops.add_expert_bias, (view.indices,)) if view.of_experts else (aten.add.Tensor, ())
        with gm.graph.inserting_before(linear):
            total = emit(gm.graph, target, (total, bias, *args), linear, PartitionLinears.name)
    replace(linear, total)
    graph_tools.erase_tensor(gm, view.weight)
    return 1


def input_piece(gm: GraphModule, x: Node, part: ColumnPart, heads: int, whole: bool, pieces: dict[tuple, Node]) -> Node:
    """The columns of x that a part reads, made once."""
    if whole:
        return x
    key = (x, part.start, part.stop)
    if key not in pieces:
        merged = MergeHeads.of(x) if heads > 1 else None
        of = x if merged is None else merged.x
        with gm.graph.inserting_after(x):
            piece = emit(gm.graph, ops.columns, (of, part.start, part.stop), x, PartitionLinears.name)
        if of is not x:
            with gm.graph.inserting_after(piece):
                piece = emit(gm.graph, ops.merge_heads, (piece,), x, PartitionLinears.name)
        pieces[key] = piece
    return pieces[key]


def take(weight: Tensor, part: ColumnPart, heads: int) -> Tensor:
    """The input columns of a part, of every head."""
    width = weight.shape[-1] // heads
    grouped = weight.unflatten(-1, (heads, width))
    return grouped[..., part.start : part.stop].flatten(-2).clone(memory_format=torch.contiguous_format)


def give(x: Tensor, part: ColumnPart, width: int, heads: int) -> Tensor:
    """A value [..., width] of a whole linear whose product is that of the input x of a part: nothing in the columns of the others."""
    whole = x.new_zeros(*x.shape[:-1], heads, width // heads)
    whole[..., part.start : part.stop] = x.unflatten(-1, (heads, -1))
    return whole.flatten(-2)
