"""Quantized inputs of linears: norm_quantize, hadamard_quantize or attention_quantize, made once for all linears that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import LOW_BITS, HeadParts, InputPart
from resq_compiler.backends.fused.lowering import CodesNodes, Lowering
from resq_compiler.backends.fused.patterns import Inputs, calls, common_source, gated, split_hadamard
from torch.fx import Node

from resq_compiler.ir.views import Columns, MergeHeads, Norm

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """The quantizers of a linear's input, and what each makes."""

    inputs: Inputs
    parts: tuple[InputPart, ...]

    @property
    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """bits, weight_bits and widths as attributes."""
        return [p.bits for p in self.parts], [p.weight_bits for p in self.parts], [p.width for p in self.parts]

    @property
    def clips(self) -> list[float]:
        return [one.clip for one in self.inputs]

    @property
    def attributes(self) -> tuple[list[int], list[int], list[int], list[int], list[float]]:
        """The lists, groups and clips, as operators take them that quantize."""
        return *self.lists, [p.groups for p in self.parts], self.clips

    def cut(self, first: int, count: int) -> Split:
        """Some of them."""
        return Split(self.inputs[first : first + count], self.parts[first : first + count])


def codes_for(
    low: Lowering, inputs: Inputs, before: Node, parts: tuple[InputPart, ...] | None = None
) -> list[CodesNodes]:
    """The packed form of a linear's quantized input, one CodesNodes for each operator the linear takes.

    parts: what the linear reads, where that is not what the weights behind its quantizers ask for.
    """
    split = Split(inputs, parts or tuple(low.part_of(one) for one in inputs))
    key = (tuple(one.node for one in inputs), split.parts)
    if key not in low.codes:
        with low.graph.inserting_before(before):
            low.codes[key] = _make(low, split)
    return low.codes[key]


def _make(low: Lowering, split: Split) -> list[CodesNodes]:
    found = calls(split.parts)
    if len(found) > 1:
        return _in_pieces(low, split, [len(parts) for parts in found])
    fused = _of_attention(low, split) or _of_hadamard(low, split)
    return [fused or _of_norm(low, split)]


def _quantize(low: Lowering, split: Split, x: Node, norm: Norm | None = None) -> CodesNodes:
    """norm_quantize of x, whose columns are those of the inputs."""
    normed = (None, None, "none", 0.0) if norm is None else (norm.gain, norm.bias, _kind(norm), norm.eps)
    arguments = (x, *normed, *split.attributes, low.target.name)
    node = low.emit(operators.norm_quantize, arguments, split.inputs[-1].node)
    return low.codes_of(node, split.parts)


def _kind(norm: Norm) -> str:
    return "layer" if norm.subtracts_mean else "rms"


def _in_pieces(low: Lowering, split: Split, counts: list[int]) -> list[CodesNodes]:
    """More parts than one operator takes: each operator quantizes what it needs."""
    made, first = [], 0
    for count in counts:
        piece = split.cut(first, count)
        made.append(_quantize(low, piece, _joined(low, piece.inputs)))
        first += count
    return made


def _joined(low: Lowering, inputs: Inputs) -> Node:
    """The columns of all inputs side by side."""
    if len(inputs) == 1:
        return inputs[0].x
    return low.emit(aten.cat.default, ([one.x for one in inputs], -1), inputs[0].node)


def _of_norm(low: Lowering, split: Split) -> CodesNodes:
    """Any input, the norm that makes it included where nobody else reads it."""
    source = common_source(split.inputs)
    if source is None:
        return _quantize(low, split, _joined(low, split.inputs))
    norm = source.norm()
    if isinstance(norm, Norm):
        return _quantize(low, split, norm.x, norm)
    if norm is not None:
        low.left[source.x.name] = norm
    return _quantize(low, split, source.x)


def _of_attention(low: Lowering, split: Split) -> CodesNodes | None:
    """o's input: every part merge_heads(columns(attention)), split as values are or as the target likes."""
    spans: list[tuple[int, int]] = []
    nodes: set[Node] = set()
    inputs = split.inputs
    for one, part in zip(inputs, split.parts, strict=True):
        merged = MergeHeads.of(one.x)
        if merged is None:
            return None
        columns = Columns.of(merged.x)
        spans.append((0, part.width) if columns is None else (columns.start, columns.stop))
        nodes.add(merged.x if columns is None else columns.x)
    site = low.attention_sites.get(nodes.pop()) if len(nodes) == 1 else None
    if site is None:
        return None
    clips = set(split.clips)
    if len(clips) > 1 or not _fits(low, inputs, spans, site.values):
        low.left[inputs[0].node.name] = (
            f"the input of the output projection is split as {spans} and values as {site.values.spans}: it is quantized apart from "
            "attention"
        )
        return None
    arguments = (*site.arguments, *split.lists, clips.pop(), low.target.name)
    quantized = low.emit(operators.attention_quantize, arguments, inputs[-1].node)
    return low.codes_of(quantized, split.parts)


def _fits(low: Lowering, inputs: Inputs, spans: list[tuple[int, int]], of_values: HeadParts) -> bool:
    """Whether attention quantizes its result in these parts."""
    if low.target.any_parts:
        edges = [0, *(stop for _, stop in spans)]
        return [start for start, _ in spans] == edges[:-1] and edges[-1] == of_values.head_dim
    same_columns = spans == [(start, stop) for _, start, stop in of_values.spans]
    return same_columns and [one.bits > LOW_BITS for one in inputs] == [
        bits > LOW_BITS for bits, _, _ in of_values.spans
    ]


def _of_hadamard(low: Lowering, split: Split) -> CodesNodes | None:
    """down's input: hadamard(act(gate) * up), or of anything else; parts have transforms of their own."""
    transform = split_hadamard(split.inputs)
    if transform is None:
        return None
    reason = transform if isinstance(transform, str) else why_not_transformed(low, split.inputs)
    if isinstance(transform, str) or reason is not None:
        for one in split.inputs:
            low.left[one.x.name] = f"its Hadamard transform is computed by PyTorch: {reason}"
        return None
    gate, up, activation = gated(transform.x)
    arguments = (gate, up, activation, transform.transpose, *split.attributes, low.target.name)
    node = low.emit(operators.hadamard_quantize, arguments, split.inputs[-1].node)
    return low.codes_of(node, split.parts)


def why_not_transformed(low: Lowering, inputs: Inputs) -> str | None:
    """Why no kernel computes the transforms of these; None where one does."""
    reasons = (low.target.why_not_transform(one.columns) for one in inputs)
    return next((reason for reason in reasons if reason is not None), None)
