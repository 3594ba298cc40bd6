"""From the size that a compiled model may have to the average bits of its linears."""

from __future__ import annotations

import math

from torch.fx import GraphModule

from resq_compiler.analysis.columns import FLOAT_BITS
from resq_compiler.calibration.moments import BLOCK, input_width
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools
from resq_compiler.pipeline.passes import PassContext

MEGABYTE = 10**6


def average_bits(gm: GraphModule, ctx: PassContext) -> float | None:
    """`average_bits`, or what `model_megabytes` leaves for a weight of the linears; None without a budget.

    gm: before bases, float. Where more is allowed than half of all columns at the high bits take, the rest is not spent, with a note.
    Raises: PassError: not even the main bits (with allocation="widths", a quarter of the columns below them) fit.
    """
    config = ctx.config
    if config.model_megabytes is None:
        return config.average_bits
    weights = sum(graph_tools.get_tensor(gm, n.args[1]).numel() for n in ctx.topology.linears)
    fixed, allowed = fixed_bytes(gm, ctx), config.model_megabytes * MEGABYTE
    least, most = config.least_average(config.weight_bits), (config.weight_bits + config.high_bits) / 2
    bits = 8 * (allowed - fixed) / weights
    at_least, at_most, other = ((fixed + b * weights / 8) / MEGABYTE for b in (least, most, 0))
    if bits < least:
        raise PassError(
            f"option model_megabytes: {config.model_megabytes:g} MB are too few: at {least:g} bits linears take {at_least - other:.3f} MB, "
            f"and everything else {other:.3f} MB; expected at least {at_least:.3f}, or fewer weight_bits, or lm_head_bits=8"
        )
    if bits > most:
        ctx.note(f"model_megabytes: {at_most:.3f} MB are all that is spent, {most:g} average bits")
    return min(bits, most)


def fixed_bytes(gm: GraphModule, ctx: PassContext) -> int:
    """Bytes of the compiled model without the codes of its linears, at most: as report.memory_bytes counts, rows padded to bytes."""
    topology, config = ctx.topology, ctx.config
    linears = {str(n.args[1].target): graph_tools.get_tensor(gm, n.args[1]) for n in topology.linears}
    tensors = {str(n.target): graph_tools.get_tensor(gm, n) for n in gm.graph.find_nodes(op="get_attr")}
    total = sum(t.numel() * t.element_size() for name, t in tensors.items() if name not in linears)
    parts = 3 if config.allocation == "widths" else 2
    total += sum(
        parts * len(w) * (4 + 1) for w in linears.values()
    )  # a float32 scale, and less than a byte that is not full
    if config.lm_head_bits is not None:
        head = graph_tools.get_tensor(gm, topology.head.args[1])
        total += len(head) * 4 - head.numel() * (head.element_size() - 1)
    return total + projection_bytes(ctx) + prefix_bytes(ctx)


def prefix_bytes(ctx: PassContext) -> int:
    """Float32 keys and values of as many prefix tokens as there may be."""
    from resq_compiler.passes.insert_prefix import MOST

    entries = sum(
        b.attention.num_kv_heads * (b.attention.head_dim + b.attention.value_dim) for b in ctx.topology.blocks
    )
    return 4 * MOST * entries if ctx.config.prefix_tokens != "none" else 0


def projection_bytes(ctx: PassContext) -> int:
    """Bases that stay online: U_C, U_A where norms write into the stream, U_B where values are no plain linear, blocks of U_D; float32."""
    topology, config = ctx.topology, ctx.config
    values = 0 if topology.residual.fusable else topology.hidden_size**2
    for block in topology.blocks:
        a = block.attention
        if config.kv_bits < FLOAT_BITS:
            values += a.head_dim**2 * (a.num_kv_heads if config.key_basis == "head" else 1)
        if not a.value_is_linear:
            values += a.num_kv_heads * a.value_dim**2
        if config.down_proj == "block-pca":
            widths = [input_width(f.down) for f in block.feed_forwards]
            values += sum(n * math.gcd(n, BLOCK) + 2 * n for n in widths)  # and the order of columns, in int64
    return 4 * values
