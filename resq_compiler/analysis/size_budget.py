"""From the size that a compiled model may have to the average bits of its linears."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.calibration.bases import Bases, online_matrices
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.views import Linear

MEGABYTE = 10**6


@dataclass(frozen=True)
class SizeBudget:
    """megabytes: of the whole model. least: average bits that a linear has at least. parts: of a linear, at most. prefix_tokens: ditto."""

    megabytes: float
    least: float
    parts: int = 2
    prefix_tokens: int = 0


def average_bits(
    gm: GraphModule, topology: Topology, plan: ColumnPlan, bases: Bases, budget: SizeBudget, note: Callable[[str], None]
) -> float:  # fmt: skip
    """What a size leaves for a weight of the linears, in bits.

    gm: before bases, float. Where more is allowed than half of all columns at the high bits take, the rest is not spent, with a note.
    Raises: PassError: not even the main bits (where bits may be taken away, a quarter of the columns below them) fit.
    """
    weights = sum(Linear.require(n).weight_shape(gm).numel() for n in topology.linears)
    fixed = fixed_bytes(gm, topology, plan, bases, budget)
    least, most = budget.least, (plan.weight_bits + plan.common.high_bits) / 2
    bits = 8 * (budget.megabytes * MEGABYTE - fixed) / weights
    at_least, at_most, other = ((fixed + b * weights / 8) / MEGABYTE for b in (least, most, 0))
    if bits < least:
        raise PassError(
            f"option model_megabytes: {budget.megabytes:g} MB are too few: at {least:g} bits linears take {at_least - other:.3f} MB, "
            f"and everything else {other:.3f} MB; expected at least {at_least:.3f}, or fewer weight_bits, or lm_head_bits=8"
        )
    if bits > most:
        note(f"model_megabytes: {at_most:.3f} MB are all that is spent, {most:g} average bits")
    return min(bits, most)


def fixed_bytes(
    gm: GraphModule, topology: Topology, plan: ColumnPlan, bases: Bases, budget: SizeBudget
) -> int:  # fmt: skip
    """Bytes of the compiled model without the codes of its linears, at most: as evaluation/sizes.py counts, rows padded to bytes."""
    views = map(Linear.require, topology.linears)
    linears = {str(linear.weight.target): linear.weight_shape(gm) for linear in views}
    tensors = {str(n.target): graph_tools.held(gm, n) for n in gm.graph.find_nodes(op="get_attr")}
    total = sum(t.numel() * t.element_size() for name, t in tensors.items() if name not in linears)
    scales = 4 + 1  # a float32 scale, and less than a byte that is not full
    total += sum(budget.parts * math.prod(shape[:-1]) * scales for shape in linears.values())
    if plan.weight_group_size is not None:
        total += sum(4 * math.prod(rows) * (width // plan.weight_group_size) for *rows, width in linears.values())
    if plan.lm_head_bits is not None:
        head = graph_tools.held(gm, Linear.require(topology.head).weight)
        total += len(head) * 4 - head.numel() * (head.element_size() - 1)
    return total + projection_bytes(topology, plan, bases) + prefix_bytes(topology, budget.prefix_tokens)


def prefix_bytes(topology: Topology, tokens: int) -> int:
    """Float32 keys and values of prefix tokens."""
    shapes = [values.shape(cache) for block in topology.blocks for cache in block.attention.caches.values()]
    return 4 * tokens * sum(heads * width for _, heads, _, width in shapes)


def projection_bytes(topology: Topology, plan: ColumnPlan, bases: Bases) -> int:
    """Bases that stay online: U_C, U_A where norms write into the stream, U_B where values are no plain linear, blocks of U_D; float32."""
    numbers = online_matrices(bases) * topology.hidden_size**2
    for a in topology.keepers:
        if plan.kv_bits < FLOAT_BITS:
            numbers += bases.key[a.block].numel()
        if not a.value_is_linear:
            numbers += bases.value[a.block].numel()
        numbers += sum(vector.width**2 for vector in a.vectors if vector.online)
    for down in bases.down.values():
        numbers += down.vectors.numel() + 2 * down.order.numel()  # the order of columns is int64
    return 4 * numbers
