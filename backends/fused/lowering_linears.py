"""Linears: mixed_linear in the place of the sum of their pieces, bias and residual included; those of one input stacked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.foreseen import EXPERTS
from resq_compiler.backends.fused.formats import InputPart, PackedWeight
from resq_compiler.backends.fused.lowering import CodesNodes, Lowering
from resq_compiler.backends.fused.lowering_inputs import codes_for
from resq_compiler.backends.fused.packing import below, pack_weight
from resq_compiler.backends.fused.patterns import Inputs, coded_parts, inputs_of, part_of
from resq_compiler.backends.fused.source import CodesAt
from torch.fx import Node

from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.linears import LinearSum, linear_sums, read_part

aten = torch.ops.aten


def lower_linears(low: Lowering) -> None:
    """Replace every linear that an operator takes; the pieces of the others get a reason, unless they are left already."""
    groups: dict[object, tuple[Inputs, list[LinearSum]]] = {}
    for linear in _find(low):
        if all(part.name in low.left for part in linear.parts):
            continue
        inputs = inputs_of(linear, low.mixtures.get(read_part(linear.parts[0]).indices, EXPERTS))
        reason = inputs if isinstance(inputs, str) else _why_not_wide(low, inputs)
        if isinstance(inputs, str) or reason is not None:
            low.reasons |= {part.name: str(reason) for part in linear.parts}
        else:
            key = inputs if low.target.stacked else linear.root
            groups.setdefault(key, (inputs, []))[1].append(linear)
    if low.target.any_parts:
        for inputs, linears in groups.values():
            _note_weight_bits(low, inputs, linears)
    for inputs, linears in groups.values():
        _replace(low, inputs, linears)


def _note_weight_bits(low: Lowering, inputs: Inputs, linears: list[LinearSum]) -> None:
    """Remember what the weights behind each quantizer need."""
    for linear in linears:
        for one, part in zip(inputs, coded_parts(linear), strict=True):
            bits = meta.require(part.node, meta.LinearPart).weight_bits
            low.weight_bits[one.node] = max(bits, low.weight_bits.get(one.node, 0))


def _why_not_wide(low: Lowering, inputs: Inputs) -> str | None:
    return low.target.why_not_columns(sum(part_of(one).columns for one in inputs))


def _find(low: Lowering) -> list[LinearSum]:
    """All linears with weight codes, in the order of their results."""
    order = {node: i for i, node in enumerate(low.graph.nodes)}
    found = [linear for linear in linear_sums(low.gm) if coded_parts(linear)]
    low.left |= {linear.root.name: linear.apart for linear in found if linear.apart is not None}
    return sorted(found, key=lambda linear: order[_end(linear)])


def _end(linear: LinearSum) -> Node:
    """The node that holds a linear's result, residual included."""
    return linear.total or linear.root


def _replace(low: Lowering, inputs: Inputs, linears: list[LinearSum]) -> None:
    alone = len(linears) == 1
    first = _end(linears[0])  # of all ends the earliest, and after the quantizers of its input
    codes = codes_for(low, inputs, first)
    weights = stacked(low, linears, [made.parts for made in codes])
    with low.graph.inserting_before(first):
        y, bias = low.current(linears[0].residual) if alone else None, _stacked_bias(low, linears)
        for i, (made, weight) in enumerate(zip(codes, weights, strict=True)):
            y = _emit(low, made, weight, bias if i == len(codes) - 1 else None, y, first)
    assert y is not None
    start = 0
    for linear in linears:
        stop = start + _outputs(low, linear)
        low.replace(_end(linear), y if alone else _share(low, linear, y, start, stop))
        start = stop


def _emit(low: Lowering, made: CodesNodes, weight: list[Node], bias: Node | None, y: Node | None, like: Node) -> Node:
    lists = ([getattr(part, name) for part in made.parts] for name in ("bits", "weight_bits", "width", "groups"))
    return low.emit(operators.mixed_linear, (*made.values, *weight, bias, y, *lists, low.dtype, low.target.name), like)


def _outputs(low: Lowering, linear: LinearSum) -> int:
    return int(graph_tools.held(low.gm, coded_parts(linear)[0].qdata).shape[0])


def _share(low: Lowering, linear: LinearSum, y: Node, start: int, stop: int) -> Node:
    """One linear's share of a stacked product, with its residual."""
    with low.graph.inserting_before(_end(linear)):
        share = low.emit(ops.columns, (y, start, stop), _end(linear))
        residual = low.current(linear.residual)
        return share if residual is None else low.emit(aten.add.Tensor, (share, residual), _end(linear))


def stacked(
    low: Lowering, linears: Sequence[LinearSum], operators_: Sequence[tuple[InputPart, ...]]
) -> list[list[Node]]:
    """Packed weights of the linears stacked along their outputs, four tensors for each operator."""
    made, first = [], 0
    for i, parts in enumerate(operators_):
        prefix = f"packed.{_end(linears[0]).name}_{i}"
        weight = _packed(low, linears, parts, first)
        _note_places(low, linears, parts, first, prefix)
        tensors = dict(low=weight.low, high=weight.high, scale=weight.scale, row_sum=weight.row_sum)
        made.append([low.tensor(f"{prefix}.{name}", tensor) for name, tensor in tensors.items()])
        first += len(parts)
    return made


def _packed(low: Lowering, linears: Sequence[LinearSum], parts: tuple[InputPart, ...], first: int) -> PackedWeight:
    """The parts of the linears from number `first` on."""
    below_each_other = []
    for j, part in enumerate(parts, first):
        coded = [coded_parts(linear)[j] for linear in linears]
        codes = below([graph_tools.held(low.gm, one.qdata) for one in coded], low.later)
        scales = torch.cat([one.scales(low.gm) for one in coded])
        below_each_other.append((codes, scales, part))
    return pack_weight(low.target.codes, below_each_other)


def _note_places(
    low: Lowering, linears: Sequence[LinearSum], parts: tuple[InputPart, ...], first: int, prefix: str
) -> None:
    """Remember where each weight's codes go."""
    for j, part in enumerate(parts, first):
        start, tensor = 0, f"{prefix}.{'low' if part.is_low else 'high'}"
        for linear in linears:
            stop = start + _outputs(low, linear)
            low.places[str(coded_parts(linear)[j].qdata.target)] = CodesAt(tensor, part, start, stop)
            start = stop


def _stacked_bias(low: Lowering, linears: list[LinearSum]) -> Node | None:
    if all(linear.bias is None for linear in linears):
        return None
    biases = []
    for linear in linears:
        nothing = coded_parts(linear)[0].scales(low.gm).new_zeros(_outputs(low, linear))
        biases.append(nothing if linear.bias is None else low.value_of(linear.bias))
    return low.tensor(f"packed.{_end(linears[0]).name}.bias", torch.cat(biases))
