"""quantize-weights: weights become integer codes, by rounding (rtn) or by GPTQ, block by block in execution order.

    linear(x, W)                       -> weight_only_linear(x, q, scale)
    linear(dequantize(codes), W)       -> quantized_linear(codes, q, scale)

GPTQ sees every input as the layers before it, already quantized, make it. Before quantize-activations in the recipe, these
inputs are float (the paper's order, W then A); after it, they carry the activation error too (A then W). Linears that read
the same input share one second moment. One stretch of a block is run at a time on all calibration windows: no layer runs twice.

Source: GPTQ, arXiv 2210.17323; columns in order, 8-bit columns last, so that they absorb the error (ResQ, arXiv 2412.14363).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.analysis.columns import FLOAT_BITS, ColumnPlan
from resq_compiler.analysis.topology import Block, Experts, Topology
from resq_compiler.calibration import executor, precision, workdir
from resq_compiler.calibration.expert_moments import ExpertInputs, ExpertMoments, ExpertReport, describe
from resq_compiler.calibration.experts import check_reached, float_routes, on_every_expert
from resq_compiler.calibration.lockstep import Lockstep
from resq_compiler.calibration.statistics import pool
from resq_compiler.ir import graph_tools, meta, ops, promises, values
from resq_compiler.ir.args import source
from resq_compiler.ir.expert_views import matrices, matrix_of
from resq_compiler.ir.graph_tools import aten, is_call, rewrite
from resq_compiler.ir.linears import whole_value
from resq_compiler.ir.views import Dequantize, Linear
from resq_compiler.numerics import gptq as gptq_core
from resq_compiler.numerics import weights as weight_core
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.expert_weights import quantize_each, relative_noise
from resq_compiler.numerics.quantized import Part, QuantizedActivation
from resq_compiler.numerics.shared_weights import quantize_shared
from resq_compiler.pipeline.options import option
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import devices, memory

CODED = (ops.weight_only_linear, ops.quantized_linear)
CODED_EXPERTS = (ops.weight_only_expert_linear, ops.quantized_expert_linear)


@dataclass
class Site:
    """One linear of the model: the nodes of its parts, in column order."""

    fact: meta.LinearSite
    nodes: list[Node]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The values its parts read."""
        return tuple(map(source, self.nodes))

    @property
    def columns(self) -> list[int]:
        """in_features of each part."""
        return [values.width(x) for x in self.inputs]

    def parts(self, expert: int = 0) -> list[Part]:
        """Weight bits (of an expert, where it is one of experts) and columns of each part, in the order of their inputs side by side."""
        bits = [meta.require(node, meta.LinearPart).bits_of(expert) for node in self.nodes]
        stops = list(itertools.accumulate(self.columns))
        return [Part(b, stop - width, stop) for b, stop, width in zip(bits, stops, self.columns, strict=True)]

    @property
    def indices(self) -> Node | None:
        """The chosen experts, where it is a linear of experts."""
        return Linear.require(self.nodes[0]).indices

    def weight(self, gm: GraphModule) -> Tensor:
        """Columns of all parts side by side: [N, K], or [E, N, K] of experts; on the device that computes."""
        return torch.cat([devices.here(Linear.require(node).weight_tensor(gm)) for node in self.nodes], -1)

    def expert_weight(self, gm: GraphModule, expert: int) -> Tensor:
        """The same of one expert, [N, K], without those of others."""
        return torch.cat([devices.here(matrix_of(gm, Linear.require(node), expert)) for node in self.nodes], -1)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize the weights of all partitioned linears.

    clip: how their scales are chosen. max keeps the whole range, mse has the least error of the weights, hessian that of the output of
    linears (rtn looks at no inputs and takes mse), output that for rtn too. Of gptq only: damping, added to the diagonal of the moment,
    relative to its mean; act_order, columns by descending energy inside each part; token_weighting "residual", errors of layers that
    write into the residual stream count relative to its size at each token.

    Of experts, where inputs are looked at: expert_tokens, how many tokens one needs for a moment of its own, others take that of their
    layer; all_experts, every token counts for every expert; unreached, whether one without tokens is an error; routing, whose choice of
    experts counts.
    """

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False
    requires: ClassVar[tuple[type, ...]] = (Topology, ColumnPlan)

    method: Literal["gptq", "rtn"] = "gptq"
    clip: Literal["mse", "hessian", "output", "max"] = "mse"
    damping: float = option(0.01, 0, 1)
    act_order: bool = False
    token_weighting: Literal["none", "residual"] = "none"
    expert_tokens: int = option(128, 1)
    all_experts: bool = False
    unreached: Literal["error", "layer"] = "error"
    routing: Literal["float", "quantized"] = "float"

    @property
    def needs_calibration(self) -> bool:
        return self.by_block

    @property
    def by_block(self) -> bool:
        """Whether inputs of linears are looked at."""
        return self.method == "gptq" or self.clip == "output"

    @property
    def plain_clip(self) -> Literal["mse", "max"]:
        """How scales are chosen on the weight alone."""
        return "max" if self.clip == "max" else "mse"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        sites = find_sites(gm)
        head = [s for s in sites if s.fact.role == "head"]
        sites = [s for s in sites if s.fact.role != "head"]
        if not sites and not head:
            return 0
        if self.by_block and sites:
            run_blocks(gm, ctx, sites, self)
        else:
            round_blocks(gm, ctx, sites, self.plain_clip)
        for site in head:
            codes, noise = rounded_by_rows(gm, site, self.plain_clip)
            store(gm, [site], codes, [[noise]])
        graph_tools.delete_unused_tensors(gm)
        return len(sites) + len(head)


def find_sites(gm: GraphModule) -> list[Site]:
    """Partitioned linears whose weights are to be quantized, in execution order."""
    sites: dict[meta.LinearSite, Site] = {}
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is not None and is_call(node, *Linear.targets) and part.weight_bits < FLOAT_BITS:
            sites.setdefault(part.site, Site(part.site, [])).nodes.append(node)
    return list(sites.values())


def by_input(sites: list[Site]) -> list[list[Site]]:
    """Group the sites that read the same values, and are all of the same experts or of none."""
    groups: dict[tuple[Node | None, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault((*source_of(site), site.indices), []).append(site)
    return list(groups.values())


def source_of(site: Site) -> tuple[Node, ...]:
    """The values behind a site's inputs: the codes where inputs are images of codes."""
    return tuple(source(n) if is_call(n, ops.dequantize) else n for n in site.inputs)


def stacked_weight(gm: GraphModule, group: list[Site]) -> Tensor:
    """All weights of a group: rows of all sites, columns of all parts; on the device that computes."""
    whole = torch.empty(sum(rows_of(group)), sum(group[0].columns), device=devices.current())
    with promises.keeping():
        for node, part in weights_of_parts(group, whole).items():
            part.copy_(graph_tools.get_tensor(gm, node))
    return whole


def weights_of_parts(group: list[Site], whole: Tensor) -> dict[Node, Tensor]:
    """Where the weight of every part of a group lies in `stacked_weight`, by the node that reads it from the model."""
    return {
        Linear.require(node).weight: part
        for site, here in zip(group, whole.split(rows_of(group)), strict=True)
        for node, part in zip(site.nodes, here.split(site.columns, 1), strict=True)
    }


def rows_of(group: list[Site]) -> list[int]:
    """Rows of the weight of each linear."""
    return [values.width(site.nodes[0]) for site in group]


def round_blocks(gm: GraphModule, ctx: PassContext, sites: list[Site], clip: Literal["mse", "max"]) -> None:
    """Quantize block by block without looking at inputs."""
    size, total = ctx.facts.get(ColumnPlan).weight_group_size, len(sites)
    done = 0
    for block, group in itertools.groupby(sites, lambda site: site.fact.block):
        here, work = list(group), None if block is None else ctx.work
        finished = workdir.block_codes(work, block or 0)
        made, names = [] if finished is None else finished[0], []
        for i, site in enumerate(here):
            ctx.progress("quantize weights", done + i, total)
            with promises.keeping(until_end=True):
                if finished is None:
                    made.append(rounded(gm, site, clip, size))
                names.append(store(gm, [site], made[i]))
        if finished is None:
            workdir.keep_block(work, block or 0, made, [])
        workdir.put_away(gm, work, block or 0, names)
        done += len(here)


def rounded(
    gm: GraphModule, site: Site, clip: Literal["mse", "max"], group_size: int | None
) -> list[weight_core.QuantizedWeight]:
    """Codes of a linear, or of those of experts, without a look at their inputs."""

    def quantize(expert: int, weight: Tensor) -> list[weight_core.QuantizedWeight]:
        parts = site.parts(expert)
        rows = functools.partial(weight_core.quantize_weight_rtn, parts=parts, clip=clip, group_size=group_size)
        return quantize_shared(weight, parts, group_size, rows)

    if site.indices is None:
        return quantize(0, site.weight(gm))
    return quantize_each(experts_of(gm, [site]), quantize)


def rounded_by_rows(
    gm: GraphModule, site: Site, clip: Literal["mse", "max"]
) -> tuple[list[weight_core.QuantizedWeight], float]:
    """Codes of a linear of one part, and their noise, some thousands of rows of a table at a time, each made once: that of lm_head is the
    largest matrix of all."""
    (node,), parts = site.nodes, site.parts()
    rows = functools.partial(weight_core.quantize_weight_rtn, parts=parts, clip=clip)
    weight = Linear.require(node).weight
    whole: list[weight_core.QuantizedWeight] = []

    def beside() -> Iterator[tuple[Tensor, Tensor, Tensor, int | None]]:
        start = 0
        for piece in map(devices.here, graph_tools.pieces(gm, weight)):
            some = quantize_shared(piece, parts, None, rows)
            whole[:] = whole or weight_core.room_for(int(values.shape(weight)[0]), some)
            weight_core.put_rows(whole, start, some)
            yield some[0].qdata, some[0].scale, piece, None
            start += len(piece)

    noise = weight_core.noise_of(beside())
    return whole, noise


def experts_of(gm: GraphModule, group: list[Site]) -> Iterator[Tensor]:
    """The weights of experts, one after the other: rows of all sites [N, K]."""
    count, *_ = values.shape(Linear.require(group[0].nodes[0]).weight)
    for expert in range(int(count)):
        yield torch.cat([site.expert_weight(gm, expert) for site in group])


def store(
    gm: GraphModule, group: list[Site], codes: list[weight_core.QuantizedWeight], noise: list[list[float]] | None = None
) -> list[list[str]]:
    """Replace the linears of a group by linears on codes and release the float weights; the names of the codes, by linear and part.

    noise: of the codes, by linear and part, where it is known.
    """
    known: Sequence[Sequence[float | None]] = noise or [[None] * len(codes)] * len(group)
    return [
        [replace_by_codes(gm, node, piece, lost) for node, piece, lost in zip(site.nodes, pieces, each, strict=True)]
        for site, pieces, each in zip(group, weight_core.split_rows(codes, rows_of(group)), known, strict=True)
    ]


def noise_of_parts(group: list[Site], codes: list[weight_core.QuantizedWeight], weight: Tensor) -> list[list[float]]:
    """Of the codes of a group, by linear and part; weight: what they are of."""
    rows, columns = rows_of(group), group[0].columns
    return [
        [weight_core.rows_noise(piece, [part]) for piece, part in zip(pieces, here.split(columns, 1), strict=True)]
        for pieces, here in zip(weight_core.split_rows(codes, rows), weight.split(rows), strict=True)
    ]


def replace_by_codes(
    gm: GraphModule, node: Node, piece: weight_core.QuantizedWeight, noise: float | None = None
) -> str:  # fmt: skip
    """Put a linear on codes in the place of a part; the name of the codes. noise: of the codes, where it is known."""
    linear, image = Linear.require(node), Dequantize.of(source(node))
    tensors = [
        graph_tools.add_tensor(gm, f"{linear.name}.{label}", value.cpu().contiguous(), QuantizeWeights.name)
        for label, value in (("qdata", piece.qdata), ("scale", piece.scale))
    ]
    part = meta.require(node, meta.LinearPart)
    if linear.indices is None:
        experts: tuple[Node, ...] = ()
        coded = CODED
        noise = weight_core.rows_noise(piece, graph_tools.pieces(gm, linear.weight)) if noise is None else noise
    else:
        noise, coded, experts = relative_noise(piece, matrices(gm, linear)), CODED_EXPERTS, (linear.indices,)
    if image is None:
        new = rewrite(node, coded[0], (linear.x, *tensors, *experts), QuantizeWeights.name)
    else:
        new = rewrite(node, coded[1], (image.codes, *tensors, *experts), QuantizeWeights.name)
    if piece.group_size is not None:
        new.update_kwarg("group_size", piece.group_size)
    if image is not None and not image.node.users:
        gm.graph.erase_node(image.node)
    meta.put(new, part)
    meta.put(new, meta.WeightNoise(float(f"{noise:.4g}")))
    graph_tools.erase_tensor(gm, linear.weight)
    return str(tensors[0].target)


def run_blocks(gm: GraphModule, ctx: PassContext, sites: list[Site], options: QuantizeWeights) -> None:
    """Quantize block by block; the values alive between two stretches are kept for every batch."""
    topology = ctx.facts.get(Topology)
    batches = executor.batches(ctx.own_windows)
    routes = float_routes(gm, batches, topology) if options.routing == "float" else []
    runner = Lockstep.begin(gm, batches, topology.blocks[0].start, ctx.work)
    runner.shared = (
        [{**table, **route} for table, route in zip(runner.shared, routes, strict=True)] if routes else runner.shared
    )
    reports: dict[str, ExpertReport] = {}
    for block in topology.blocks:
        ctx.progress("quantize weights", block.index, len(topology.blocks))
        groups = by_input([s for s in sites if s.fact.block == block.index])
        finished = workdir.block_codes(ctx.work, block.index)
        if finished is None:
            reports |= quantize_block(gm, block, groups, runner, ctx, options)
        else:
            codes, notes = finished
            for note in notes:
                ctx.note(note)
            names = [store(gm, group, parts) for group, parts in zip(groups, codes, strict=True)]
            workdir.put_away(gm, ctx.work, block.index, names)
            del codes, finished
        runner.advance(block.end)
        memory.trim()
    ctx.lines += describe(reports)
    ctx.progress("quantize weights", len(topology.blocks), len(topology.blocks))


def quantize_block(
    gm: GraphModule, block: Block, groups: list[list[Site]], runner: Lockstep, ctx: PassContext, options: QuantizeWeights
) -> dict[str, ExpertReport]:  # fmt: skip
    """Codes for the groups of a block, each on inputs that the groups before it, already quantized, make; what was seen of experts."""
    before, made, names, reports = len(ctx.notes), [], [], dict[str, ExpertReport]()
    for group in groups:
        stream = written_stream(group, ctx.facts.get(Topology)) if options.token_weighting == "residual" else None
        if group[0].indices is None:
            # the way to the stream multiplies with it, too
            weight = None if stream is None else stacked_weight(gm, group)
            with graph_tools.substituted(gm, {} if weight is None else weights_of_parts(group, weight)):
                hessian = input_moment(group[0], list(source_of(group[0])), stream, runner, block.end)
            memory.trim()  # of the activations, before the matrices of GPTQ: together they are the peak of a compile
            weight = stacked_weight(gm, group) if weight is None else weight
            codes, noise = quantize_group(group, weight, hessian, ctx, options)
            del weight, hessian
            names.append(store(gm, group, codes, noise))
        else:
            with promises.keeping(until_end=True):
                codes, reports[group[0].fact.name] = quantize_experts(gm, group, block, stream, runner, ctx, options)
                names.append(store(gm, group, codes))
        made.append(codes)
    workdir.keep_block(ctx.work, block.index, made, ctx.notes[before:])
    workdir.put_away(gm, ctx.work, block.index, names)
    return reports


def quantize_experts(
    gm: GraphModule, group: list[Site], block: Block, stream: Node | None, runner: Lockstep, ctx: PassContext, options: QuantizeWeights
) -> tuple[list[weight_core.QuantizedWeight], ExpertReport]:  # fmt: skip
    """GPTQ on the stacked weights of each expert, with the second moment of what it reads."""
    inputs = inputs_of_experts(group[0], block, stream, options.all_experts)
    moments = ExpertMoments(inputs, runner, block.end, 1 if options.all_experts else options.expert_tokens)
    check_reached(moments.count(), inputs.experts, options.unreached == "layer")
    hessians = moments.each()

    def quantize(expert: int, weight: Tensor) -> list[weight_core.QuantizedWeight]:
        return quantize_rows(
            weight, next(hessians), group[0].parts(expert), f"expert {expert} of {group[0].fact.name}", ctx, options
        )

    codes = quantize_each(experts_of(gm, group), quantize)
    return codes, ExpertReport(moments.counts, moments.own(), options.all_experts)


def inputs_of_experts(site: Site, block: Block, stream: Node | None, everywhere: bool) -> ExpertInputs:
    """What the experts of a site read, as their router sends tokens, or every token."""
    found_in = (f.experts for f in block.feed_forwards if f.experts is not None)
    experts = next(e for e in found_in if e.indices is site.indices)
    nodes, indices = source_of(site), experts.indices
    if everywhere:
        copies = [on_every_expert(node, experts) for node in nodes]
        nodes, indices = tuple(node for node, _ in copies), copies[0][1]
    alike = everywhere and nodes == source_of(site)
    found = ExpertInputs(
        site.fact.name, nodes, sum(site.columns), indices, experts, lambda env, n: _float(env[n]), alike=alike
    )
    if stream is None:
        return found
    factor = functools.partial(written_share, stream, experts, everywhere)
    return dataclasses.replace(found, factor=factor, also=(stream, experts.weights))


def written_share(stream: Node, experts: Experts, everywhere: bool, env: dict[Node, Any], rows: Tensor) -> Tensor:
    """What an error of an expert counts at each of its rows: by the size of the stream that it is written into, and its router's weight
    where every token goes only through the experts that are chosen."""
    size = env[stream].flatten(0, -2).square().mean(-1)
    share = size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt()
    if everywhere:
        return share[rows // experts.count]
    return share[rows // experts.choices] * env[experts.weights].flatten()[rows]


def quantize_group(
    group: list[Site], weight: Tensor, hessian: Tensor, ctx: PassContext, options: QuantizeWeights
) -> tuple[list[weight_core.QuantizedWeight], list[list[float]]]:
    """Codes of the stacked weights of a group, and their noise; the moment is of no use any more."""
    where = f"{group[0].fact.name} and linears of the same input"
    codes = quantize_rows(weight, hessian, group[0].parts(), where, ctx, options, overwrite=True)
    return codes, noise_of_parts(group, codes, weight)


def quantize_rows(
    weight: Tensor, hessian: Tensor, parts: list[Part], where: str, ctx: PassContext, options: QuantizeWeights, overwrite: bool = False
) -> list[weight_core.QuantizedWeight]:  # fmt: skip
    """Codes of a weight [N, K]; processes that share the work take as many of its rows each. overwrite: as for gptq."""
    group_size = ctx.facts.get(ColumnPlan).weight_group_size

    def quantize(rows: Tensor) -> list[weight_core.QuantizedWeight]:
        if options.method == "rtn":
            return weight_core.quantize_weight_rtn(
                rows, parts, clip="mse", column_weight=hessian.diagonal(), group_size=group_size
            )
        result = gptq_core.gptq(
            rows, hessian, parts, damping=options.damping, act_order=options.act_order, clip=options.plain_clip,
            weighted_clip=options.clip in ("hessian", "output"), group_size=group_size, overwrite=overwrite,
        )  # fmt: skip
        if result.damping != options.damping:
            ctx.note(
                f"GPTQ on {where}: damping raised to {result.damping:g}, the calibration moment was not positive definite"
            )
        return result.parts

    return quantize_shared(weight, parts, group_size, quantize)


def input_moment(site: Site, inputs: list[Node], stream: Node | None, runner: Lockstep, goal: Node) -> Tensor:
    """Mean of x^T x over all calibration tokens, float32 [K, K].

    With the residual stream after a linear that writes into it, tokens count by the inverse of its mean square there: norms divide
    by it before anybody reads the stream. Else a few massive tokens are all that GPTQ sees (and damping is relative to).
    """
    moment = SecondMoment(site.fact.name, sum(site.columns), dtype=precision.dtype())
    seen = whole_value(inputs)

    def see(batch: int, env: dict[Node, Any]) -> None:
        x = side_by_side(env, seen)
        if stream is not None:
            size = env[stream].flatten(0, -2).square().mean(-1, keepdim=True)
            x = x * size.clamp_min(torch.finfo(size.dtype).tiny).rsqrt()
        moment.update(x)

    runner.run([*inputs, *seen], goal, see, also=() if stream is None else (stream,))
    pool(moment)
    return moment.take_mean()


def written_stream(group: list[Site], topology: Topology) -> Node | None:
    """The value of the residual stream that a linear's output is added into; None where it goes elsewhere first."""
    stream = set(topology.residual.values)
    node = group[0].nodes[0]
    while len(group) == 1 and len(node.users) == 1:
        node = next(iter(node.users))
        if node in stream and not is_call(node, ops.combine_experts):
            return node
        if not is_call(node, aten.add.Tensor, ops.add_expert_bias, ops.combine_experts):
            return None
    return None


def side_by_side(env: dict[Node, Any], nodes: list[Node]) -> Tensor:
    """Values of nodes as rows of one matrix [tokens, columns], codes as their float images."""
    found = [_float(env[n]) for n in nodes]
    return (found[0] if len(found) == 1 else torch.cat(found, -1)).flatten(0, -2)


def _float(value: Any) -> Tensor:
    return ops.dequantize(value) if isinstance(value, QuantizedActivation) else value
