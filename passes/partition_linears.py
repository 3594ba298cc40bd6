"""partition-linears: every linear becomes one linear for each precision, on its own columns of the input.

    linear(x, W, b) -> add(add(linear(columns(x, 0, r), W[:, :r]), linear(columns(x, r, K), W[:, r:])), b)

Columns are [low | high]. The input of an output projection is split inside every head, because U_B acts on heads: its columns
become [low of all heads | high of all heads]. Nothing is quantized yet: the sum of the parts is the linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from resq_compiler.passes.fold_norms import linear_weight
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import ColumnPart, ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten, emit, is_call
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import memory

LINEAR = aten.linear.default
SITE_OF_ROLE = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp", "down": "down"}


@dataclass(frozen=True)
class PartitionLinears(Pass):
    """Split every linear of the blocks (and lm_head if it is quantized) by precision, as the ColumnPlan says."""

    name: ClassVar[str] = "partition-linears"
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        if any(meta.get(node, meta.LinearPart) for node in gm.graph.nodes):
            return 0
        topology, plan = ctx.facts.get(Topology), ctx.facts.get(ColumnPlan)
        pieces: dict[tuple, Node] = {}
        done = 0
        for linear in topology.linears:
            site = meta.get(linear, meta.LinearSite)
            assert site is not None
            parts, heads = parts_of(linear_weight(gm, linear).shape[1], site, topology, plan)
            done += split(gm, linear, site, parts, heads, pieces)
            memory.trim()
        if (bits := plan.lm_head_bits) is not None:
            site = meta.get(topology.head, meta.LinearSite)
            assert site is not None
            whole = ColumnPart(0, topology.hidden_size, bits, bits)
            done += split(gm, topology.head, site, (whole,), 1, pieces)
        graph_tools.delete_unused_tensors(gm)
        return done


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
    gm: GraphModule, linear: Node, site: meta.LinearSite, parts: tuple[ColumnPart, ...], heads: int, pieces: dict[tuple, Node]
) -> int:  # fmt: skip
    """Replace a linear by its parts; pieces of inputs that several linears read are shared."""
    x, bias = linear.args[0], linear.args[2] if len(linear.args) > 2 else None
    weight, weight_node = linear_weight(gm, linear), linear.args[1]
    total: Node | None = None
    for i, part in enumerate(parts):
        piece = input_piece(gm, x, part, heads, len(parts) == 1, pieces)
        value = take(weight, part, heads)
        tensor = graph_tools.add_tensor(gm, f"{site.name}.part{i}.weight", value, PartitionLinears.name)
        with gm.graph.inserting_before(linear):
            y = emit(gm.graph, LINEAR, (piece, tensor), linear, PartitionLinears.name)
            fact = meta.LinearPart(site, i, part.start, part.stop, part.weight_bits, part.activation_bits, heads)
            meta.put(y, fact)
            total = y if total is None else emit(gm.graph, aten.add.Tensor, (total, y), linear, PartitionLinears.name)
    assert total is not None
    if bias is not None:
        with gm.graph.inserting_before(linear):
            total = emit(gm.graph, aten.add.Tensor, (total, bias), linear, PartitionLinears.name)
    linear.replace_all_uses_with(total)
    gm.graph.erase_node(linear)
    graph_tools.erase_tensor(gm, weight_node)
    return 1


def input_piece(gm: GraphModule, x: Node, part: ColumnPart, heads: int, whole: bool, pieces: dict[tuple, Node]) -> Node:
    """The columns of x that a part reads, made once."""
    if whole:
        return x
    key = (x, part.start, part.stop)
    if key not in pieces:
        source = x.args[0] if is_call(x, ops.merge_heads) and heads > 1 else x
        with gm.graph.inserting_after(x):
            piece = emit(gm.graph, ops.columns, (source, part.start, part.stop), x, PartitionLinears.name)
        if source is not x:
            with gm.graph.inserting_after(piece):
                piece = emit(gm.graph, ops.merge_heads, (piece,), x, PartitionLinears.name)
        pieces[key] = piece
    return pieces[key]


def take(weight: Tensor, part: ColumnPart, heads: int) -> Tensor:
    """The input columns of a part, of every head."""
    width = weight.shape[1] // heads
    if part.stop - part.start == width:
        return weight
    grouped = weight.unflatten(1, (heads, width))
    return grouped[:, :, part.start : part.stop].flatten(1).clone(memory_format=torch.contiguous_format)
