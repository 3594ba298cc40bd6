"""quantize-kv-cache: keys and values are quantized per token and head before they enter the cache, compressed vectors per token.

    append_cache(past, new)                          -> append_cache(past, quantize_dequantize(new, parts))
    linear(dequantize(quantize(cached vector)), W)   -> linear(cached vector, W)

Only new tokens are quantized; the past already is. The graph carries the float image of the codes; backends that store the codes
themselves read the parts from this node. Linears that make keys and values of a compressed vector read its codes as they are cached,
at the bits of the cache: a quantizer of their own goes away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.topology import Topology
from resq_compiler.frontend.latent import readers_of_vector
from resq_compiler.ir import meta, ops, values
from resq_compiler.ir.args import set_argument
from resq_compiler.ir.graph_tools import emit, is_call, replace
from resq_compiler.ir.views import AppendCache, CodedLinear, Quantize
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext


@dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """Insert cache quantizers, with the parts of the ColumnPlan; clip: the share of the range that codes cover."""

    name: ClassVar[str] = "quantize-kv-cache"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    clip: float = option(1.0, 0.1, 1)

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        plan = ctx.facts.get(ColumnPlan)
        if plan.kv_bits == FLOAT_BITS:
            return 0
        done = 0
        for block in ctx.facts.get(Topology).blocks:
            for kind, cache in block.attention.caches.items():
                new = AppendCache.require(cache).new
                if is_call(new, ops.quantize_dequantize):
                    continue
                split = plan.cache_parts(values.width(new), kind, block.index)
                parts = tuple((p.bits, p.start, p.stop) for p in split)
                with gm.graph.inserting_after(new):
                    image = emit(gm.graph, ops.quantize_dequantize, (new, parts, self.clip), new, self.name)
                site = meta.QuantizerSite(f"blocks.{block.index}.{kind}", "kv", block.index, parts[0][0])
                set_argument(cache, "new", meta.put(image, site))
                if kind == "latent":
                    read_cached_codes(cache)
                done += 1
        return done


def read_cached_codes(cache: Node) -> None:
    """Put the float image of what is cached in the place of codes that are made of it."""
    for x in readers_of_vector(cache):
        for quantizer in [user for user in x.users if Quantize.of(user) is not None]:
            for user in list(quantizer.users):
                if is_call(user, ops.dequantize):
                    replace(user, x)
                    continue
                linear = CodedLinear.require(user)
                user.target = ops.weight_only_linear
                user.args, user.kwargs = (x, linear.qdata, linear.scale, linear.group_size), {}
            quantizer.graph.erase_node(quantizer)
