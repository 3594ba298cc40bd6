"""quantize-weights: weights become integer codes, by rounding (rtn) or by GPTQ, block by block in execution order.

    linear(x, W)                       -> weight_only_linear(x, q, scale)
    linear(dequantize(codes), W)       -> quantized_linear(codes, q, scale)

GPTQ sees every input as the layers before it, already quantized, make it. Before quantize-activations in the recipe, these
inputs are float (the paper's order, W then A); after it, they carry the activation error too (A then W). Linears that read
the same input share one second moment. One stretch of a block is run at a time on all calibration windows: no layer runs twice.

Source: GPTQ, arXiv 2210.17323; columns in order, 8-bit columns last, so that they absorb the error (ResQ, arXiv 2412.14363).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler import executor, graph_tools, memory, meta, ops, resume
from resq_compiler.config import CompileConfig
from resq_compiler.graph_tools import aten, emit, is_call
from resq_compiler.numerics import gptq as gptq_core
from resq_compiler.numerics import weights as weight_core
from resq_compiler.numerics.basis import SecondMoment
from resq_compiler.numerics.quantized import Part
from resq_compiler.partition import FLOAT_BITS
from resq_compiler.pipeline import Pass, PassContext, relative_error
from resq_compiler.topology import Topology

LINEAR = aten.linear.default
CHEAP = {
    ops.rms_norm, ops.columns, ops.merge_heads, ops.quantize, ops.dequantize, aten.layer_norm.default,
}  # computed again rather than kept  # fmt: skip
ROOM = 1 / 3  # of the weights: values of all batches that would need more are computed again too


@dataclass
class Site:
    """One linear of the model: the nodes of its parts, in column order."""

    fact: meta.LinearSite
    nodes: list[Node]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The values its parts read."""
        return tuple(n.args[0] for n in self.nodes)

    def parts(self) -> list[Part]:
        """Weight bits and columns of each part, in the order that the parts' inputs have side by side."""
        result, start = [], 0
        for node in self.nodes:
            width = graph_columns(node)
            fact = meta.get(node, meta.LinearPart)
            assert fact is not None
            result.append(Part(fact.weight_bits, start, start + width))
            start += width
        return result


def graph_columns(node: Node) -> int:
    """in_features of a part."""
    return node.args[0].meta["val"].shape[-1]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize the weights of all partitioned linears."""

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        sites = find_sites(gm)
        head = [s for s in sites if s.fact.role == "head"]
        sites = [s for s in sites if s.fact.role != "head"]
        if not sites and not head:
            return 0
        if ctx.config.weight_method == "gptq":
            run_gptq(gm, ctx, sites)
        else:
            for i, site in enumerate(sites):
                ctx.progress("quantize weights", i, len(sites))
                round_to_nearest(gm, [site], ctx.config)
        for site in head:
            round_to_nearest(gm, [site], ctx.config)
        graph_tools.delete_unused_tensors(gm)
        return len(sites) + len(head)


def find_sites(gm: GraphModule) -> list[Site]:
    """Partitioned linears whose weights are to be quantized, in execution order."""
    sites: dict[meta.LinearSite, Site] = {}
    for node in gm.graph.nodes:
        part = meta.get(node, meta.LinearPart)
        if part is not None and is_call(node, LINEAR) and part.weight_bits < FLOAT_BITS:
            sites.setdefault(part.site, Site(part.site, [])).nodes.append(node)
    return list(sites.values())


def by_input(sites: list[Site]) -> list[list[Site]]:
    """Group the sites that read the same values."""
    groups: dict[tuple[Node, ...], list[Site]] = {}
    for site in sites:
        groups.setdefault(source_of(site), []).append(site)
    return list(groups.values())


def source_of(site: Site) -> tuple[Node, ...]:
    """The values behind a site's inputs: the codes where inputs are images of codes."""
    return tuple(n.args[0] if is_call(n, ops.dequantize) else n for n in site.inputs)


def stacked_weight(gm: GraphModule, group: list[Site]) -> Tensor:
    """All weights of a group: rows of all sites, columns of all parts."""
    rows = [torch.cat([graph_tools.get_tensor(gm, n.args[1]) for n in site.nodes], 1) for site in group]
    return torch.cat(rows)


def round_to_nearest(gm: GraphModule, group: list[Site], config: CompileConfig) -> None:
    clip = "max" if config.weight_clip == "max" else "mse"
    store(gm, group, weight_core.quantize_weight_rtn(stacked_weight(gm, group), group[0].parts(), clip=clip))


def store(gm: GraphModule, group: list[Site], codes: list[weight_core.QuantizedWeight]) -> None:
    """Replace the linears of a group by linears on codes and release the float weights."""
    rows = [graph_tools.get_tensor(gm, site.nodes[0].args[1]).shape[0] for site in group]
    for site, pieces in zip(group, weight_core.split_rows(codes, rows), strict=True):
        for node, piece in zip(site.nodes, pieces, strict=True):
            replace_by_codes(gm, node, piece)


def replace_by_codes(gm: GraphModule, node: Node, piece: weight_core.QuantizedWeight) -> None:
    weight = node.args[1]
    base = str(weight.target).removesuffix(".weight")
    tensors = [
        graph_tools.add_tensor(gm, f"{base}.{label}", value.contiguous(), QuantizeWeights.name)
        for label, value in (("qdata", piece.qdata), ("scale", piece.scale))
    ]
    x: Node = node.args[0]
    coded = is_call(x, ops.dequantize)
    target, source = (ops.quantized_linear, x.args[0]) if coded else (ops.weight_only_linear, x)
    with gm.graph.inserting_before(node):
        new = emit(gm.graph, target, (source, *tensors), node, QuantizeWeights.name)
    new.meta["val"] = node.meta["val"]
    meta.put(new, meta.get(node, meta.LinearPart))
    noise = relative_error(piece.dequantize(), graph_tools.get_tensor(gm, weight))
    meta.put(new, meta.WeightNoise(float(f"{noise:.4g}")))
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    if coded and not x.users:
        gm.graph.erase_node(x)
    graph_tools.erase_tensor(gm, weight)


def run_gptq(gm: GraphModule, ctx: PassContext, sites: list[Site]) -> None:
    """Quantize block by block; the values alive between two stretches are kept for every batch."""
    topology: Topology = ctx.topology
    assert ctx.calibration is not None
    batches = executor.batches(ctx.calibration)
    start = topology.blocks[0].start
    tables = {shape: executor.shared_values(gm, ids, start) for shape, ids in {b.shape: b for b in batches}.items()}
    states = []
    for ids in batches:
        env = dict(executor.first_tokens(gm, ids))
        executor.Schedule(gm, [start], env).run(env)
        states.append({start: env[start]})
    room = sum(t.nbytes for t in gm.state_dict().values()) * ROOM
    runner = _Lockstep(gm, states, [tables[b.shape] for b in batches], room)
    for block in topology.blocks:
        ctx.progress("quantize weights", block.index, len(topology.blocks))
        groups = by_input([s for s in sites if s.fact.block == block.index])
        finished, before = resume.block_codes(ctx, block.index), len(ctx.notes)
        made = []
        for i, group in enumerate(groups):
            if finished is None:
                moment = runner.moment(list(source_of(group[0])), block.end, group[0].fact.name)
                made.append(quantize_group(gm, group, moment, ctx))
            store(gm, group, made[i] if finished is None else finished[i])
        if finished is None:
            resume.keep_block(ctx, block.index, made, ctx.notes[before:])
        runner.advance(block.end)
        memory.trim()
    ctx.progress("quantize weights", len(topology.blocks), len(topology.blocks))


def quantize_group(
    gm: GraphModule, group: list[Site], moment: SecondMoment, ctx: PassContext
) -> list[weight_core.QuantizedWeight]:
    """GPTQ on the stacked weights of a group."""
    config = ctx.config
    result = gptq_core.gptq(
        stacked_weight(gm, group), moment.mean(), group[0].parts(), damping=config.gptq_damping, act_order=config.gptq_act_order,
        clip="max" if config.weight_clip == "max" else "mse", weighted_clip=config.weight_clip == "hessian",
    )  # fmt: skip
    where = f"{group[0].fact.name} and linears of the same input"
    if result.damping != config.gptq_damping:
        ctx.note(
            f"GPTQ on {where}: damping raised to {result.damping:g}, the calibration moment was not positive definite"
        )
    return result.parts


class _Lockstep:
    """Advances all calibration batches through the graph together, one stretch at a time.

    Between two stretches every batch keeps what the way to the goal needs, unless it grew by more than `room` bytes over all batches:
    then the next stretch starts where this one did. The results are the same to the bit.
    """

    def __init__(self, gm: GraphModule, states: list[dict[Node, Any]], shared: list[dict[Node, Any]], room: float):
        self.gm, self.states, self.shared, self.room = gm, states, shared, room

    def _run(self, targets: list[Node], goal: Node, see: Any) -> None:
        plan = executor.Stretch(self.gm, targets, {**self.shared[0], **self.states[0]}, goal)
        moves = True if goal in plan.alive else None
        kept = plan.alive if moves else not_cheap(plan.alive, set(self.shared[0]))
        for state, shared in zip(self.states, self.shared, strict=True):
            env = {**shared, **state}
            plan.run(env)
            see(env)
            after = {n: v for n, v in env.items() if n in kept and n not in shared}
            if moves is None:
                moves = (_bytes(after) - _bytes(state)) * len(self.states) <= self.room
            if moves:
                state.clear()
                state.update(after)

    def moment(self, inputs: list[Node], goal: Node, name: str) -> SecondMoment:
        """Second moment of the values side by side, over all batches."""
        moment = SecondMoment(name, sum(_width(n) for n in inputs))
        self._run(inputs, goal, lambda env: moment.update(torch.cat([_float(env[n]) for n in inputs], -1)))
        return moment

    def advance(self, goal: Node) -> None:
        """Run to the end of a block and forget everything inside it."""
        self._run([goal], goal, lambda env: None)


def not_cheap(values: set[Node], given: set[Node]) -> set[Node]:
    """Without the given values and those that cheap operators make of the others."""
    kept: set[Node] = set()

    def cheap(node: Node) -> bool:
        return all(n.op != "call_function" or n in kept or n in given or cheap(n) for n in node.all_input_nodes) and is_call(node, *CHEAP)

    for node in sorted(values - given):
        if not cheap(node):
            kept.add(node)
    return kept


def _bytes(values: dict[Node, Any]) -> int:
    """Memory of tensors and of the codes of quantized activations."""
    return sum(v.qdata.nbytes if isinstance(v, ops.QuantizedActivation) else v.nbytes for v in values.values())


def _width(node: Node) -> int:
    value = node.meta["val"]
    return (value.qdata if isinstance(value, ops.QuantizedActivation) else value).shape[-1]


def _float(value: Any) -> Tensor:
    return ops.dequantize(value) if isinstance(value, ops.QuantizedActivation) else value
