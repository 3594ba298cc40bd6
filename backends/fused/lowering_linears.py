"""Linears: mixed_linear in the place of the sum of their pieces, bias and residual included; those of one input stacked."""

from __future__ import annotations

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import InputPart, PackedWeight, pack_weight
from resq_compiler.backends.fused.lowering import CodesNodes, Lowering
from resq_compiler.backends.fused.lowering_inputs import codes_for
from resq_compiler.backends.fused.patterns import Inputs, Linear, linear_from
from resq_compiler.backends.fused.source import CodesAt
from torch.fx import Node

from resq_compiler.ir import ops

aten = torch.ops.aten


def lower_linears(low: Lowering) -> None:
    """Replace every linear that an operator takes; the pieces of the others get a reason."""
    groups: dict[object, tuple[Inputs, list[Linear]]] = {}
    for linear in _find(low):
        inputs = linear.inputs()
        reason = inputs if isinstance(inputs, str) else _why_not_wide(low, inputs)
        if isinstance(inputs, str) or reason is not None:
            low.reasons |= {piece.name: str(reason) for piece in linear.pieces}
        else:
            key = inputs if low.target.stacked else linear.root
            groups.setdefault(key, (inputs, []))[1].append(linear)
    for inputs, linears in groups.values():
        _replace(low, inputs, linears)


def _why_not_wide(low: Lowering, inputs: Inputs) -> str | None:
    return low.target.why_not_columns(sum(one.part.columns for one in inputs))


def _find(low: Lowering) -> list[Linear]:
    """All linears in order. Two that meet in one addition (parallel attention and feed-forward) share no root: one adds."""
    found: list[Linear] = []
    seen: set[Node] = set()
    roots: set[Node] = set()
    for node in low.graph.find_nodes(op="call_function", target=ops.quantized_linear):
        if node not in seen:
            linear = linear_from(low.gm, node)
            linear = linear.without_residual() if linear.root in roots else linear
            roots.add(linear.root)
            seen.update(linear.pieces)
            found.append(linear)
    order = {node: i for i, node in enumerate(low.graph.nodes)}
    return sorted(found, key=lambda linear: order[linear.root])


def _replace(low: Lowering, inputs: Inputs, linears: list[Linear]) -> None:
    alone = len(linears) == 1
    first = linears[0].root  # of all roots the earliest, and after the quantizers of its input
    codes = codes_for(low, inputs, first)
    weights = _stacked(low, linears, [made.parts for made in codes])
    with low.graph.inserting_before(first):
        y, bias = low.current(linears[0].residual) if alone else None, _stacked_bias(low, linears)
        for i, (made, weight) in enumerate(zip(codes, weights, strict=True)):
            y = _emit(low, made, weight, bias if i == len(codes) - 1 else None, y, first)
    assert y is not None
    start = 0
    for linear in linears:
        stop = start + _outputs(low, linear)
        low.replace(linear.root, y if alone else _share(low, linear, y, start, stop))
        start = stop


def _emit(low: Lowering, made: CodesNodes, weight: list[Node], bias: Node | None, y: Node | None, like: Node) -> Node:
    bits, widths = [part.bits for part in made.parts], [part.width for part in made.parts]
    parts = (bits, widths, made.parts[0].groups)
    return low.emit(operators.mixed_linear, (*made.values, *weight, bias, y, *parts, low.dtype, low.target.name), like)


def _outputs(low: Lowering, linear: Linear) -> int:
    return low.value_of(linear.codes[0]).shape[0]


def _share(low: Lowering, linear: Linear, y: Node, start: int, stop: int) -> Node:
    """One linear's share of a stacked product, with its residual."""
    with low.graph.inserting_before(linear.root):
        share = low.emit(ops.columns, (y, start, stop), linear.root)
        residual = low.current(linear.residual)
        return share if residual is None else low.emit(aten.add.Tensor, (share, residual), linear.root)


def _stacked(low: Lowering, linears: list[Linear], operators_: list[tuple[InputPart, ...]]) -> list[list[Node]]:
    """Packed weights of the linears stacked along their outputs, four tensors for each operator."""
    made, first = [], 0
    for i, parts in enumerate(operators_):
        prefix = f"packed.{linears[0].root.name}_{i}"
        weight = _packed(low, linears, parts, first)
        _note_places(low, linears, parts, first, prefix)
        tensors = dict(low=weight.low, high=weight.high, scale=weight.scale, row_sum=weight.row_sum)
        made.append([low.tensor(f"{prefix}.{name}", tensor) for name, tensor in tensors.items()])
        first += len(parts)
    return made


def _packed(low: Lowering, linears: list[Linear], parts: tuple[InputPart, ...], first: int) -> PackedWeight:
    """The parts of the linears from number `first` on."""
    stacked = []
    for j, part in enumerate(parts, first):
        codes = torch.cat([low.value_of(linear.codes[j]) for linear in linears])
        scales = torch.cat([low.value_of(linear.scales[j]) for linear in linears])
        stacked.append((codes, scales, part))
    return pack_weight(low.target.codes, stacked)


def _note_places(low: Lowering, linears: list[Linear], parts: tuple[InputPart, ...], first: int, prefix: str) -> None:
    """Remember where each weight's codes go."""
    for j, part in enumerate(parts, first):
        start, tensor = 0, f"{prefix}.{'low' if part.is_low else 'high'}"
        for linear in linears:
            stop = start + _outputs(low, linear)
            low.places[str(linear.codes[j].target)] = CodesAt(tensor, part, start, stop)
            start = stop


def _stacked_bias(low: Lowering, linears: list[Linear]) -> Node | None:
    if all(linear.bias is None for linear in linears):
        return None
    biases = []
    for linear in linears:
        nothing = low.value_of(linear.scales[0]).new_zeros(_outputs(low, linear))
        biases.append(nothing if linear.bias is None else low.value_of(linear.bias))
    return low.tensor(f"packed.{linears[0].root.name}.bias", torch.cat(biases))
