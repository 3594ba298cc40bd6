"""quantize-activations: dynamic integer codes for the input of every quantized linear.

    linear(x, W)                    -> linear(dequantize(quantize(x, bits)), W)
    weight_only_linear(x, q, scale) -> quantized_linear(quantize(x, bits), q, scale)

One quantizer for each value and width, shared by the linears that read it (q, k, v; gate, up). Per token; the input of an
output projection per token and head, or per token (`o_granularity`); with `group_size` inputs of attention and feed-forwards per token
and group of columns, each with its share of every part. How much of the range the codes cover is `clip`;
"input" searches it for each of them on calibration tokens, by the error of the value, "output" by that of the linears that read it.
Linears that read a quantized cache read its codes (quantize-kv-cache), and get no quantizer.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS
from resq_compiler.analysis.topology import STREAM_ROLES, Topology
from resq_compiler.calibration import executor, precision
from resq_compiler.calibration.statistics import both, observe, observe_blocks
from resq_compiler.frontend.latent import is_quantized_vector
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import set_argument, source
from resq_compiler.ir.graph_tools import emit, is_call
from resq_compiler.ir.views import CodedLinear, Linear, Quantize
from resq_compiler.numerics.clip import ClipSearch
from resq_compiler.numerics.static_scales import Range, StaticSearch
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import devices, processes

SITE_NAMES = {**dict.fromkeys(STREAM_ROLES, "attention_input"), "q_b": "qlatent_input", "q_b_rope": "qlatent_input",
              "k_b": "latent_input", "v_b": "latent_input",
              "o": "o_input", "gate": "mlp_input",
              "up": "mlp_input", "down": "down_input", "head": "head_input"}  # fmt: skip

ON_CODES: dict[object, Callable] = {
    ops.weight_only_linear: ops.quantized_linear, ops.weight_only_expert_linear: ops.quantized_expert_linear
}  # fmt: skip
OPEN = (*Linear.targets, *ON_CODES)
"""Linears whose activations are float."""

EXPERTS = (ops.expert_linear, ops.weight_only_expert_linear)
GROUPED_ROLES = (*STREAM_ROLES, "gate", "up", "down")
"""Linears whose input `group_size` cuts."""

SEARCH_TOKENS = 2048  # shares that are nearly as good are all that more tokens would tell apart


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Insert activation quantizers.

    clip: the share of the range that codes cover, or by what error it is searched. o_granularity: of the scales at output projections.
    scales "static": one scale and zero point for all tokens, with the least error on calibration tokens; `clip` means nothing then.
    group_size: columns that share a scale at the inputs of attention and of feed-forwards without experts, about; none: all of a part.
    Parts of less than 8 bits are cut into equal groups of the width nearest to it. Source of groups: Atom, arXiv 2310.19102, section 4.2.
    """

    name: ClassVar[str] = "quantize-activations"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology,)

    clip: float | Literal["input", "output"] = option(1.0, 0.1, 1)
    o_granularity: Literal["head", "token"] = "head"
    scales: Literal["dynamic", "static"] = "dynamic"
    group_size: Literal[32, 64, 128] | None = None

    @property
    def needs_calibration(self) -> bool:
        return isinstance(self.clip, str) or self.scales == "static"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        shared: dict[tuple, Node] = {}
        done = 0
        static = self.scales == "static"
        cut = {} if self.group_size is None else groups_of_inputs(gm, self.group_size, ctx.note)
        search = isinstance(self.clip, str) and not static
        clips = search_clips(gm, ctx, self.clip == "output", cut) if search else {}
        for node, part in open_parts(gm):
            wide = 1.0 if isinstance(self.clip, str) else self.clip
            clip = clips.get(source(node), wide) if may_clip(part) else 1.0
            groups = cut.get(part, part.heads if self.o_granularity == "head" else 1)
            done += quantize_input(gm, node, part, 1.0 if static else clip, groups, shared)
        if static:
            give_static_scales(gm, ctx, list(shared.values()))
        return done


def open_parts(gm: GraphModule) -> list[tuple[Node, meta.LinearPart]]:
    """Linears whose input is to be quantized and still float."""
    found = []
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is None or part.activation_bits == FLOAT_BITS:
            continue
        if is_call(node, *OPEN) and not is_call(source(node), ops.dequantize) and not is_quantized_vector(source(node)):
            found.append((node, part))
    return found


def groups_of_inputs(gm: GraphModule, size: int, note: Callable[[str], None]) -> dict[meta.LinearPart, int]:
    """Into how many groups the parts are cut of linears that read the stream or hidden channels and have no experts: those of less than
    8 bits into groups of about `size` columns, the others into one. Notes where those of a wider
    part are half or twice as wide, and where no part is cut."""
    found: dict[meta.LinearPart, int] = {}
    experts = set()
    for node, part in open_parts(gm):
        if part.site.role not in GROUPED_ROLES:
            continue
        if is_call(node, *EXPERTS):
            experts.add(part.site)
        else:
            found[part] = groups_of(part.stop - part.start, size) if part.activation_bits < 8 else 1
    cut = {(part.stop - part.start, groups) for part, groups in found.items() if part.activation_bits < 8}
    far = [
        f"{width // groups} of {width}"
        for width, groups in sorted(cut)
        if width > size and not size < 2 * width / groups < 4 * size
    ]
    if far:
        note(
            f"activation_group_size={size}: some parts of inputs have no divisor near it; their groups have other widths: {', '.join(far)}"
        )
    if found and not cut:
        note(f"activation_group_size={size}: nothing is cut, because inputs have no part of less than 8 bits")
    if experts:
        note(
            f"activation_group_size={size}: inputs of experts ({len(experts)} linears) keep one scale a token and part"
        )
    return found


def groups_of(width: int, size: int) -> int:
    """Into how many equal groups a part is cut: those whose width is nearest to `size`, by ratio; of two as near, the narrower."""
    divisors = [groups for groups in range(width, 0, -1) if width % groups == 0]
    return min(divisors, key=lambda groups: abs(math.log(width / groups / size)))


def quantize_input(
    gm: GraphModule, node: Node, part: meta.LinearPart, clip: float, groups: int, shared: dict[tuple, Node]
) -> int:
    """Put a quantizer before one part of a linear."""
    x = source(node)
    key = (x, part.activation_bits, groups)
    if key not in shared:
        with gm.graph.inserting_after(x):
            new = emit(gm.graph, ops.quantize, (x, part.activation_bits, groups, clip), x, QuantizeActivations.name)
        fact = meta.QuantizerSite(name_of(part), "activation", part.site.block, part.activation_bits)
        shared[key] = meta.put(new, fact)
    codes = shared[key]
    if node.target in ON_CODES:
        node.target = ON_CODES[node.target]
        set_argument(node, "x", codes)
        return 1
    with gm.graph.inserting_before(node):
        image = emit(gm.graph, ops.dequantize, (codes,), x, QuantizeActivations.name)
    node.replace_input_with(x, image)
    return 1


def give_static_scales(gm: GraphModule, ctx: PassContext, quantizers: list[Node]) -> None:
    """Search a scale and zero point for every quantizer, on values behind quantizers with dynamic scales, and write them into the graph."""
    found = [Quantize.require(node) for node in quantizers]
    windows = ctx.windows[: max(1, SEARCH_TOKENS // ctx.windows.shape[1])]
    ranges = [Range(meta.require(q.node, meta.QuantizerSite).name, q.groups) for q in found]
    observe(gm, taps_of(found, ranges), windows, functools.partial(ctx.progress, "range of activations"))
    searches = [StaticSearch(q.bits, r) for q, r in zip(found, ranges, strict=True)]
    observe(gm, taps_of(found, searches), windows, functools.partial(ctx.progress, "search static scales"))
    seen: Counter[str] = Counter()
    for quantizer, search in zip(found, searches, strict=True):
        name = meta.require(quantizer.node, meta.QuantizerSite).name
        seen[name] += 1  # a block with several feed-forwards has several of a name
        name += f".{seen[name] - 1}" if seen[name] > 1 else ""
        for label, value in zip(("scale", "zero_point"), search.best(), strict=True):
            value = processes.current().from_first(value)
            tensor = graph_tools.add_tensor(gm, f"resq.static.{name}.{label}", value, QuantizeActivations.name)
            set_argument(quantizer.node, label, tensor)


def taps_of(
    quantizers: Sequence[Quantize], seen: Sequence[Range | StaticSearch]
) -> dict[Node, Callable[[Tensor], None]]:
    """What sees the values that quantizers read."""
    taps: dict[Node, Callable[[Tensor], None]] = {}
    for quantizer, one in zip(quantizers, seen, strict=True):
        taps[quantizer.x] = both(taps[quantizer.x], one.update) if quantizer.x in taps else one.update
    return taps


def search_clips(
    gm: GraphModule, ctx: PassContext, by_output: bool, groups: Mapping[meta.LinearPart, int] | None = None
) -> dict[Node, float]:
    """For every value in question, the share of its range that loses least on calibration tokens; told in the stage.

    groups: into how many parts of inputs are cut; the others are whole.
    """
    readers: dict[Node, list[Node]] = {}
    sites: dict[Node, meta.LinearPart] = {}
    for node, part in open_parts(gm):
        if may_clip(part):
            sites[source(node)] = part
            readers.setdefault(source(node), []).append(node)
    if not sites:
        return {}
    windows = ctx.windows[: max(1, SEARCH_TOKENS // ctx.windows.shape[1])]
    batches = len(executor.batches(windows))
    searches = {
        x: SiteSearch(gm, part.activation_bits, readers[x] if by_output else (), batches, (groups or {}).get(part, 1))
        for x, part in sites.items()
    }
    taps = {x: search.update for x, search in searches.items()}
    blocks = ctx.facts.get(Topology).blocks
    observe_blocks(gm, taps, windows, blocks, ctx.work, lambda done, total: ctx.progress("search clips", done, total))
    found = processes.current().agreed([search.found for search in searches.values()])
    ctx.lines += [f"clip of {name_of(part)}: {share:g}" for part, share in zip(sites.values(), found, strict=True)]
    return dict(zip(sites, found, strict=True))


class SiteSearch:
    """The search of one site: what its readers make of errors is held from its first batch of tokens to its last, no longer.

    readers: the linears that read it; none where the error of the value counts. batches: how many there will be. groups: of its columns.
    found: the share.
    """

    def __init__(self, gm: GraphModule, bits: int, readers: Sequence[Node], batches: int, groups: int = 1) -> None:
        self.gm, self.bits, self.readers, self.left, self.groups = gm, bits, readers, batches, groups
        self.search: ClipSearch | None = None
        self.found = 1.0

    def update(self, x: Tensor) -> None:
        """See a batch of values."""
        if self.search is None:
            weights = [float_weight(self.gm, n) for n in self.readers]
            self.search = ClipSearch(self.bits, torch.cat(weights) if weights else None, precision.dtype(), self.groups)
        self.search.update(x)
        self.left -= 1
        if not self.left:
            self.found, self.search = self.search.best(), None


def float_weight(gm: GraphModule, node: Node) -> Tensor:
    """Weight [N, K] of a linear, the float image of its codes where it has codes; of experts the rows of all."""
    coded = CodedLinear.of(node)
    if coded is None:
        return devices.here(Linear.require(node).weight_tensor(gm)).flatten(0, -2)
    return devices.here(coded.image(gm)).flatten(0, -2)


def may_clip(part: meta.LinearPart) -> bool:
    """All of the range is covered at 8 bits, and in the narrow groups of output projections."""
    return part.heads == 1 and part.activation_bits < 8


def name_of(part: meta.LinearPart) -> str:
    """Of the quantizer before a part of a linear."""
    where = f"blocks.{part.site.block}" if part.site.block is not None else "lm_head"
    return f"{where}.{SITE_NAMES[part.site.role]}.part{part.index}"
