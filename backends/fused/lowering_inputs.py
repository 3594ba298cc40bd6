"""Quantized inputs of linears: norm_quantize, hadamard_quantize or attention_quantize, made once for all linears that read them."""

from __future__ import annotations

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import LOW_BITS, HeadParts
from resq_compiler.backends.fused.lowering import CodesNodes, Lowering
from resq_compiler.backends.fused.patterns import Inputs, calls, common_source, gated, split_hadamard
from torch.fx import Node

from resq_compiler.ir.views import Columns, MergeHeads, Norm

aten = torch.ops.aten


def codes_for(low: Lowering, inputs: Inputs, before: Node) -> list[CodesNodes]:
    """The packed form of a linear's quantized input, one CodesNodes for each operator the linear takes."""
    key = tuple(one.node for one in inputs)
    if key not in low.codes:
        with low.graph.inserting_before(before):
            low.codes[key] = _make(low, inputs)
    return low.codes[key]


def _make(low: Lowering, inputs: Inputs) -> list[CodesNodes]:
    groups = calls([low.part_of(one) for one in inputs])
    if len(groups) > 1:
        return _in_pieces(low, inputs, [len(parts) for parts in groups])
    fused = _of_attention(low, inputs) or _of_hadamard(low, inputs)
    return [fused or _of_norm(low, inputs)]


def _lists(low: Lowering, inputs: Inputs) -> tuple[list[int], list[int], list[int]]:
    """bits, weight_bits and widths as attributes."""
    parts = [low.part_of(one) for one in inputs]
    return [p.bits for p in parts], [p.weight_bits for p in parts], [p.width for p in parts]


def _clips(inputs: Inputs) -> list[float]:
    return [one.clip for one in inputs]


def _quantize(low: Lowering, inputs: Inputs, x: Node, norm: Norm | None = None) -> CodesNodes:
    """norm_quantize of x, whose columns are those of the inputs."""
    normed = (None, None, "none", 0.0) if norm is None else (norm.gain, norm.bias, _kind(norm), norm.eps)
    arguments = (x, *normed, *_lists(low, inputs), inputs[0].groups, _clips(inputs), low.target.name)
    node = low.emit(operators.norm_quantize, arguments, inputs[-1].node)
    return low.codes_of(node, tuple(low.part_of(one) for one in inputs))


def _kind(norm: Norm) -> str:
    return "layer" if norm.subtracts_mean else "rms"


def _in_pieces(low: Lowering, inputs: Inputs, counts: list[int]) -> list[CodesNodes]:
    """More parts than one operator takes: each operator quantizes what it needs."""
    made, first = [], 0
    for count in counts:
        made.append(_quantize(low, inputs[first : first + count], _joined(low, inputs[first : first + count])))
        first += count
    return made


def _joined(low: Lowering, inputs: Inputs) -> Node:
    """The columns of all inputs side by side."""
    if len(inputs) == 1:
        return inputs[0].x
    return low.emit(aten.cat.default, ([one.x for one in inputs], -1), inputs[0].node)


def _of_norm(low: Lowering, inputs: Inputs) -> CodesNodes:
    """Any input, the norm that makes it included where nobody else reads it."""
    source = common_source(inputs)
    if source is None:
        return _quantize(low, inputs, _joined(low, inputs))
    norm = source.norm(inputs)
    if isinstance(norm, Norm):
        return _quantize(low, inputs, norm.x, norm)
    if norm is not None:
        low.left[source.x.name] = norm
    return _quantize(low, inputs, source.x)


def _of_attention(low: Lowering, inputs: Inputs) -> CodesNodes | None:
    """o's input: every part merge_heads(columns(attention)), split as values are or as the target likes."""
    spans: list[tuple[int, int]] = []
    nodes: set[Node] = set()
    for one in inputs:
        merged = MergeHeads.of(one.x)
        if merged is None:
            return None
        columns = Columns.of(merged.x)
        spans.append((0, low.part_of(one).width) if columns is None else (columns.start, columns.stop))
        nodes.add(merged.x if columns is None else columns.x)
    site = low.attention_sites.get(nodes.pop()) if len(nodes) == 1 else None
    if site is None:
        return None
    clips = set(_clips(inputs))
    if len(clips) > 1 or not _fits(low, inputs, spans, site.values):
        low.left[inputs[0].node.name] = (
            f"the input of the output projection is split as {spans} and values as {site.values.spans}: it is quantized apart from "
            "attention"
        )
        return None
    arguments = (*site.arguments, *_lists(low, inputs), clips.pop(), low.target.name)
    quantized = low.emit(operators.attention_quantize, arguments, inputs[-1].node)
    return low.codes_of(quantized, tuple(low.part_of(one) for one in inputs))


def _fits(low: Lowering, inputs: Inputs, spans: list[tuple[int, int]], of_values: HeadParts) -> bool:
    """Whether attention quantizes its result in these parts."""
    if low.target.any_parts:
        edges = [0, *(stop for _, stop in spans)]
        return [start for start, _ in spans] == edges[:-1] and edges[-1] == of_values.head_dim
    same_columns = spans == [(start, stop) for _, start, stop in of_values.spans]
    return same_columns and [one.bits > LOW_BITS for one in inputs] == [
        bits > LOW_BITS for bits, _, _ in of_values.spans
    ]


def _of_hadamard(low: Lowering, inputs: Inputs) -> CodesNodes | None:
    """down's input: hadamard(act(gate) * up), or of anything else; parts have transforms of their own."""
    transform = split_hadamard(inputs)
    if transform is None:
        return None
    reason = transform if isinstance(transform, str) else _why_not_transformed(low, inputs)
    if isinstance(transform, str) or reason is not None:
        for one in inputs:
            low.left[one.x.name] = f"its Hadamard transform is computed by PyTorch: {reason}"
        return None
    gate, up, activation = gated(transform.x)
    arguments = (gate, up, activation, transform.transpose, *_lists(low, inputs), _clips(inputs), low.target.name)
    node = low.emit(operators.hadamard_quantize, arguments, inputs[-1].node)
    return low.codes_of(node, tuple(low.part_of(one) for one in inputs))


def _why_not_transformed(low: Lowering, inputs: Inputs) -> str | None:
    if inputs[0].groups != 1:
        return "it is quantized in groups"
    reasons = (low.target.why_not_transform(one.columns) for one in inputs)
    return next((reason for reason in reasons if reason is not None), None)
