"""What the lowering recognises in a quantized graph. Functions look at nodes and change nothing.

What does not match is a sentence that says why, or None where there was nothing to match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from resq_compiler.backends.fused.foreseen import EXPERTS
from resq_compiler.backends.fused.formats import InputPart
from torch.fx import Node

from resq_compiler.ir import values
from resq_compiler.ir.args import argument, operands
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.linears import LinearSum, read_part
from resq_compiler.ir.views import (
    AppendCache,
    CacheParts,
    CodedLinear,
    Columns,
    Hadamard,
    Norm,
    Project,
    Quantize,
    QuantizeDequantize,
    Rope,
)

aten = torch.ops.aten
ACTIVATIONS: dict[object, str] = {aten.silu.default: "silu", aten.relu.default: "relu"}
Viewed = TypeVar("Viewed")
Inputs = tuple[Quantize, ...]
"""The quantizers of a linear's input, one for each part."""


# linears ------------------------------------------------------------------------------------------------------------


def coded_parts(linear: LinearSum) -> tuple[CodedLinear, ...]:
    """The parts that have weight codes: all of them, or none where weights are float."""
    return tuple(part for part in map(read_part, linear.parts) if isinstance(part, CodedLinear))


def inputs_of(linear: LinearSum, experts: str | None = EXPERTS) -> Inputs | str:
    """The quantizers of the parts, or why no operator takes this linear. experts: why it takes no linear of experts, if it does not."""
    quantizers: list[Quantize] = []
    for part in map(read_part, linear.parts):
        if not isinstance(part, CodedLinear):
            return "some of its parts have float weights"
        if part.of_experts and experts is not None:
            return experts
        if not part.on_codes:
            return "16-bit activations: there is no weight-only kernel; compile with activation_bits=4 or 8"
        if part.group_size is not None:
            return (
                f"its weights have a scale for every {part.group_size} columns, and kernels take one a row and part; compile with "
                "weight_group_size=None, or use the reference or onnx backend"
            )
        quantizer = Quantize.require(part.x)
        if quantizer.scale is not None:
            return "its input has static scales, and kernels make them for every token; compile with activation_scales='dynamic'"
        quantizers.append(quantizer)
    return tuple(quantizers)


def part_of(quantizer: Quantize, weight_bits: int = 0) -> InputPart:
    """What a quantizer makes for weights of so many bits."""
    return InputPart(quantizer.bits, quantizer.columns // quantizer.groups, quantizer.groups, weight_bits)


def calls(parts: Sequence[InputPart]) -> list[tuple[InputPart, ...]]:
    """Cut parts into operators of at most one low and one high part; the last takes two."""
    two = len(parts) > 1 and [part.is_low for part in parts[-2:]] == [True, False]
    cut = max(0, len(parts) - 2) if two else len(parts)
    return [*((part,) for part in parts[:cut]), *((tuple(parts[cut:]),) if two else ())]


# inputs of linears ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What quantizers read: consecutive columns of all of `x`. readers: the nodes between x and the quantizers, or these."""

    x: Node
    readers: frozenset[Node]

    def norm(self) -> Norm | str | None:
        """How x is computed, if that is a norm; a reason where it is one that has to be computed apart."""
        norm = Norm.of(self.x)
        if norm is None:
            return None
        others = sorted(node.name for node in set(self.x.users) - self.readers)
        if others:
            return f"others than the quantizers of one linear's input read it: {', '.join(others)}"
        if norm.subtracts_mean and len(argument(self.x, "normalized_shape")) > 1:
            return "it is over more than the last dimension"
        return norm


def common_source(inputs: Inputs) -> Source | None:
    """The value whose columns the quantizers read, in order and without gaps; None where they read different values."""
    columns = [Columns.of(one.x) for one in inputs]
    if len(inputs) == 1 and columns[0] is None:
        return Source(inputs[0].x, frozenset([inputs[0].node]))
    found = [one for one in columns if one is not None]
    edges = [0, *(one.stop for one in found)]
    same = len(found) == len(inputs) and len({one.x for one in found}) == 1
    if not same or [one.start for one in found] != edges[:-1] or edges[-1] != values.width(found[0].x):
        return None
    return Source(found[0].x, frozenset(one.node for one in found))


def gated(node: Node) -> tuple[Node, Node | None, str]:
    """(gate, up, activation) of act(gate) * up, of act(gate), or of anything."""
    gate: Node = node
    up: Node | None = None
    if is_call(node, aten.mul.Tensor):
        first, second = operands(node)
        if isinstance(second, Node) and values.shape(first) == values.shape(second):
            gate, up = (first, second) if _activation(first) else (second, first)
    name = _activation(gate)
    return (argument(gate, "self"), up, name) if name else (gate, up, "none")


def _activation(node: Node) -> str | None:
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if argument(node, "approximate") == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target)


def split_hadamard(inputs: Inputs) -> Hadamard | str | None:
    """The transform whose stretches the quantizers read, one each and in order; None if there is none."""
    columns = [Columns.of(one.x) for one in inputs]
    read = [one.x if piece is None else piece.x for one, piece in zip(inputs, columns, strict=True)]
    transform = next((found for found in map(Hadamard.of, read) if found is not None), None)
    if transform is None:
        return None
    source = common_source(inputs)
    if source is None or source.x is not transform.node:
        return "its quantizers do not read consecutive stretches of it"
    stretches, quantized = list(transform.sizes or [values.width(transform.node)]), [one.columns for one in inputs]
    if stretches != quantized:
        return f"its stretches {stretches} are not those that are quantized, {quantized}"
    alone = set(transform.node.users) == source.readers
    return transform if alone else "others than the quantizers of one linear's input read it"


# attention ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheSide:
    """Keys or values: append_cache(past, quantize_dequantize(new, spans, clip)) of the cache input `past`."""

    past: Node
    new: Node
    spans: CacheParts
    clip: float

    @staticmethod
    def of(node: object, cache_inputs: Sequence[Node]) -> CacheSide | str:
        """The view of a node, or why it is none."""
        cache = AppendCache.of(node)
        if cache is None or cache.past not in cache_inputs:
            return "keys or values are not append_cache(past, ...) of a graph input"
        coded = QuantizeDequantize.of(cache.new)
        if coded is None:
            return "the key/value cache is not quantized (kv_bits of 16); compile with kv_bits=4 or 8"
        return CacheSide(cache.past, coded.x, coded.parts, coded.clip)


@dataclass(frozen=True)
class Turned:
    """What queries and keys were before norms, rotary embedding and basis, where both have the same ones, and what these are."""

    q: Node
    k: Node
    u: Node | None = None
    cos_sin: tuple[Node, Node] | None = None
    q_norm: Node | None = None
    k_norm: Node | None = None
    eps: float = 0.0


def turned(q: Node, k: Node) -> Turned:
    """Walk back over basis, rotary embedding and norms, as far as q and k agree on them and nobody else reads between."""
    found = Turned(q, k)
    projects = _both(found, Project.of)
    if projects is not None:
        first, second = projects
        if first.u is second.u and first.by_head == second.by_head and not (first.inverse or second.inverse):
            found = replace(found, q=first.x, k=second.x, u=first.u)
    ropes = _both(found, Rope.of)
    if ropes is not None and (ropes[0].cos, ropes[0].sin) == (ropes[1].cos, ropes[1].sin):
        found = replace(found, q=ropes[0].x, k=ropes[1].x, cos_sin=(ropes[0].cos, ropes[0].sin))
    norms = _both(found, Norm.of)
    if norms is not None and _alike(*norms):
        first_norm, second_norm = norms
        gains = dict(q_norm=first_norm.gain, k_norm=second_norm.gain, eps=first_norm.eps)
        found = replace(found, q=first_norm.x, k=second_norm.x, **gains)  # type: ignore[arg-type]
    return found


def _alike(q: Norm, k: Norm) -> bool:
    """Two RMSNorms with gains that one operator can compute."""
    return None not in (q.gain, k.gain) and q.eps == k.eps and not (q.subtracts_mean or k.subtracts_mean)


def _both(found: Turned, view: Callable[[object], Viewed | None]) -> tuple[Viewed, Viewed] | None:
    """The same view of q and of k, which nobody else reads."""
    first, second = view(found.q), view(found.k)
    if first is None or second is None or any(len(node.users) != 1 for node in (found.q, found.k)):
        return None
    return first, second


# what is left ---------------------------------------------------------------------------------------------------------


def leftover(node: Node) -> str:
    """Why a quantized node is still there when everything that matches has been taken."""
    return f"{getattr(node.target, '__name__', node.target)} is not part of a pattern that a fused operator takes"
