"""quantize-activations: dynamic integer codes for the input of every quantized linear.

    linear(x, W)                    -> linear(dequantize(quantize(x, bits)), W)
    weight_only_linear(x, q, scale) -> quantized_linear(quantize(x, bits), q, scale)

One quantizer for each value and width, shared by the linears that read it (q, k, v; gate, up). Per token; the input of an
output projection per token and head, or per token (`o_proj_granularity`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from resq_compiler import meta, ops
from resq_compiler.graph_tools import aten, emit, is_call
from resq_compiler.numerics.clip import best_clip
from resq_compiler.partition import FLOAT_BITS
from resq_compiler.pipeline import Pass, PassContext

SITE_NAMES = {"q": "attention_input", "k": "attention_input", "v": "attention_input", "o": "o_input", "gate": "mlp_input",
              "up": "mlp_input", "down": "down_input", "head": "head_input"}  # fmt: skip


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Insert activation quantizers."""

    name: ClassVar[str] = "quantize-activations"
    exact: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        shared: dict[tuple, Node] = {}
        done = 0
        for node in list(gm.graph.nodes):
            part = meta.get(node, meta.LinearPart)
            if part is None or part.activation_bits == FLOAT_BITS:
                continue
            coded = is_call(node.args[0], ops.dequantize)
            if is_call(node, aten.linear.default, ops.weight_only_linear) and not coded:
                done += quantize_input(gm, node, part, ctx, shared)
        return done


def quantize_input(
    gm: GraphModule, node: Node, part: meta.LinearPart, ctx: PassContext, shared: dict[tuple, Node]
) -> int:
    """Put a quantizer before one part of a linear."""
    x: Node = node.args[0]
    groups = part.heads if ctx.config.o_proj_granularity == "head" else 1
    clip = clip_of(part, ctx.config.activation_clip)
    key = (x, part.activation_bits, groups)
    if key not in shared:
        with gm.graph.inserting_after(x):
            new = emit(gm.graph, ops.quantize, (x, part.activation_bits, groups, clip), x, QuantizeActivations.name)
        where = f"blocks.{part.site.block}" if part.site.block is not None else "lm_head"
        name = f"{where}.{SITE_NAMES[part.site.role]}.part{part.index}"
        shared[key] = meta.put(new, meta.QuantizerSite(name, "activation", part.site.block, part.activation_bits))
    codes = shared[key]
    if is_call(node, ops.weight_only_linear):
        node.target = ops.quantized_linear
        node.update_arg(0, codes)
        return 1
    with gm.graph.inserting_before(node):
        image = emit(gm.graph, ops.dequantize, (codes,), x, QuantizeActivations.name)
    node.update_arg(0, image)
    return 1


def clip_of(part: meta.LinearPart, wanted: float | str) -> float:
    """Share of the range that the codes of a part cover: all of it at 8 bits, and in the narrow groups of output projections."""
    if part.heads > 1 or part.activation_bits >= 8:
        return 1.0
    return best_clip(part.stop - part.start, part.activation_bits) if isinstance(wanted, str) else wanted
