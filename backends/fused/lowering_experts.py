"""Mixtures: `experts` in the place of the linears of experts, what lies between them, and the sum over a token's choices."""

from __future__ import annotations

from dataclasses import replace

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.expert_patterns import Mixture, mixture_of
from resq_compiler.backends.fused.experts import ExpertCodesAt, ExpertPart, PackedExperts, experts_below, pack_experts
from resq_compiler.backends.fused.formats import LOW_BITS, InputPart
from resq_compiler.backends.fused.lowering import Lowering
from resq_compiler.backends.fused.lowering_inputs import codes_for, why_not_transformed
from resq_compiler.backends.fused.patterns import Inputs, calls, coded_parts, part_of
from torch import Tensor
from torch.fx import Node

from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.expert_views import CombineExperts
from resq_compiler.ir.linears import LinearSum, linear_sums, read_part

WIDE_BITS = 8


def lower_experts(low: Lowering) -> None:
    """Replace every mixture that the target's kernels take; why they do not take another is kept for its linears."""
    sums = {linear.root: linear for linear in linear_sums(low.gm) if coded_parts(linear)}
    for node in list(low.graph.find_nodes(op="call_function", target=ops.combine_experts)):
        combine = CombineExperts.require(node)
        found = mixture_of(combine, sums)
        reason = found if isinstance(found, str) else _why_not(low, found)
        if isinstance(found, Mixture) and reason is None:
            _replace(low, found)
        elif combine.y in sums:
            low.mixtures[read_part(sums[combine.y].parts[0]).indices] = (
                f"of a mixture that no grouped kernel takes: {reason}"
            )


def _why_not(low: Lowering, mixture: Mixture) -> str | None:
    both = (mixture.inputs, mixture.hidden)
    columns = (low.target.why_not_columns(sum(part_of(one).columns for one in inputs)) for inputs in both)
    reason = next((reason for reason in columns if reason is not None), None) or _why_not_packed(low, mixture)
    return reason or (None if mixture.transform == "none" else why_not_transformed(low, mixture.hidden))


def _why_not_packed(low: Lowering, mixture: Mixture) -> str | None:
    """Where activations and weights are packed alike: one part of up to 4 bits, one of more, and weights no wider than that."""
    if low.target.any_parts:
        return None
    for inputs, linears in ((mixture.inputs, mixture.rows), (mixture.hidden, (mixture.down,))):
        made = _parts(low, inputs, linears)
        if len(calls(made)) > 1:
            return f"its input has parts of {[part.bits for part in made]} bits; expected at most one of up to 4 and one of more"
        for i, part in enumerate(made):
            widest = max(max(_bits(linear, i)) for linear in linears)
            if part.is_low and widest > LOW_BITS:
                return f"experts have weights of {widest} bits beside activations of {part.bits}, and codes are packed alike"
    return None


def _parts(low: Lowering, inputs: Inputs, linears: tuple[LinearSum, ...]) -> tuple[InputPart, ...]:
    """What an operator reads: where activations and weights are packed apart, the first of two parts is low, whatever weights have."""
    made = [part_of(one) for one in inputs]
    if not low.target.any_parts:
        return tuple(made)
    most = [max(max(_bits(linear, i)) for linear in linears) for i in range(len(made))]
    if len(most) == 2:
        most = [min(most[0], LOW_BITS), most[1] if most[1] > LOW_BITS else WIDE_BITS]
    return tuple(replace(part, weight_bits=bits) for part, bits in zip(made, most, strict=True))


def _bits(linear: LinearSum, part: int) -> list[int]:
    """Of the weights of every expert."""
    coded = coded_parts(linear)[part]
    fact = meta.require(coded.node, meta.LinearPart)
    return [fact.bits_of(expert) for expert in range(int(values.shape(coded.qdata)[0]))]


def _replace(low: Lowering, mixture: Mixture) -> None:
    node = mixture.combine.node
    parts = _parts(low, mixture.inputs, mixture.rows)
    (codes,) = codes_for(low, mixture.inputs, _after(low, mixture.inputs), parts)
    hidden = _parts(low, mixture.hidden, (mixture.down,))
    gate_up = _pack(low, f"packed.{node.name}.gate_up", mixture.rows, codes.parts)
    down = _pack(low, f"packed.{node.name}.down", (mixture.down,), hidden)
    gating, clips = mixture.gating, [one.clip for one in mixture.hidden]
    with low.graph.inserting_before(node):
        routing = (low.current(mixture.indices), low.current(mixture.combine.weights))
        between = (gating.activation, gating.up is not None, gating.limit, gating.slope, mixture.transform)
        lists = (*_lists(codes.parts), *_lists(hidden), clips)
        arguments = (*codes.values, *routing, *gate_up, *down, *between, *lists, low.dtype, low.target.name)
        made = low.emit(operators.experts, arguments, node)
    low.replace(node, made)
    _erase_unread(low, mixture.down.root)


def _erase_unread(low: Lowering, node: Node) -> None:
    """Erase a node that nobody reads any more, and what only it read."""
    if node.op != "call_function" or node.users:
        return
    inputs = node.all_input_nodes
    low.graph.erase_node(node)
    for one in inputs:
        _erase_unread(low, one)


def _lists(parts: tuple[InputPart, ...]) -> tuple[list[int], list[int], list[int]]:
    return [p.bits for p in parts], [p.weight_bits for p in parts], [p.width for p in parts]


def _after(low: Lowering, inputs: Inputs) -> Node:
    """The node behind the last quantizer: whoever reads these values comes later."""
    order = {node: i for i, node in enumerate(low.graph.nodes)}
    return max((one.node for one in inputs), key=order.__getitem__).next


def _pack(
    low: Lowering, prefix: str, linears: tuple[LinearSum, ...], parts: tuple[InputPart, ...]
) -> list[Node | None]:
    """The weights of linears that read the same values, their rows side by side: codes, scale, row_sum, bits and bias."""
    stacked = [_stacked(low, linears, i) for i in range(len(parts))]
    weight = pack_experts(low.target.codes, stacked, parts, _bias(low, linears))
    _note_places(low, linears, weight, f"{prefix}.codes")
    tensors = dict(codes=weight.codes, scale=weight.scale, row_sum=weight.row_sum, bits=weight.bits)
    nodes: list[Node | None] = [low.tensor(f"{prefix}.{name}", tensor) for name, tensor in tensors.items()]
    return [*nodes, None if weight.bias is None else low.tensor(f"{prefix}.bias", weight.bias)]


def _stacked(low: Lowering, linears: tuple[LinearSum, ...], part: int) -> ExpertPart:
    coded = [coded_parts(linear)[part] for linear in linears]
    codes = experts_below([graph_tools.held(low.gm, one.qdata) for one in coded], low.later)
    scales = [one.scales(low.gm) for one in coded]
    bits = zip(*(_bits(linear, part) for linear in linears), strict=True)
    return ExpertPart(codes, torch.cat(scales, 1), tuple(max(each) for each in bits))


def _bias(low: Lowering, linears: tuple[LinearSum, ...]) -> Tensor | None:
    """[E, all rows], zeros where a linear has none; None where none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    biases = []
    for linear in linears:
        nothing = torch.zeros_like(coded_parts(linear)[0].scales(low.gm))
        biases.append(nothing if linear.bias is None else low.value_of(linear.bias).float())
    return torch.cat(biases, 1).contiguous()


def _note_places(low: Lowering, linears: tuple[LinearSum, ...], weight: PackedExperts, tensor: str) -> None:
    """Remember where each weight's codes go."""
    start, bits = 0, weight.bits.tolist()
    for linear in linears:
        coded = coded_parts(linear)
        stop = start + coded[0].scales(low.gm).shape[1]
        for i, one in enumerate(coded):
            place = ExpertCodesAt(tensor, weight.parts, bits, weight.out_features, i, start, stop)
            low.places[str(one.qdata.target)] = place
        start = stop
