"""The patterns a quantized graph is made of: cache sides, what rope_cache computes, inputs of linears, linears.

Functions look at nodes and change nothing; what does not match is None, or a sentence that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from resq_compiler.backends.triton.formats import PartLayout
from resq_compiler.backends.triton.norm_quantize import MAX_COLUMNS
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, ops

aten = torch.ops.aten
ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}


@dataclass
class Linear:
    """One linear of the quantized graph: its same-precision pieces, and the node that holds its result.

    root: the result, residual included.    before: the result without the residual, if there is one.
    """

    pieces: list[Node]
    root: Node
    bias: Node | None = None
    residual: Node | None = None
    before: Node | None = None

    def without_residual(self) -> Linear:
        """The same linear, the addition left to another one that ends in it."""
        return self if self.before is None else Linear(self.pieces, self.before, self.bias)

    @property
    def key(self) -> tuple[Node, ...]:
        return tuple(piece.args[0] for piece in self.pieces)


def cache_side(node: Any, inputs: list[Node]) -> tuple[Node, Node, tuple, float] | str:
    """(past, new values, parts, clip) of append_cache(past, quantize_dequantize(new, parts, clip)), or why it is not that."""
    if not graph_tools.is_call(node, ops.append_cache) or node.args[0] not in inputs[3:]:
        return "keys or values are not append_cache(past, ...) of a graph input"
    coded = node.args[1]
    if not graph_tools.is_call(coded, ops.quantize_dequantize):
        return "the key/value cache is not quantized (kv_bits of 16); compile with kv_bits=4 or 8"
    return node.args[0], coded.args[0], coded.args[1], coded.args[2] if len(coded.args) > 2 else 1.0


def strip(
    q: Node, k: Node
) -> tuple[Node, Node, Node | None, tuple[Node | None, Node | None], float, tuple[Node, Node] | None]:
    """Walk back over what rope_cache computes when q and k agree on it: basis, rotation, norms."""
    u, norms, eps, rotary = None, (None, None), 0.0, None

    def both(*targets: Callable) -> bool:
        return (
            graph_tools.is_call(q, *targets)
            and graph_tools.is_call(k, *targets)
            and len(q.users) == 1
            and len(k.users) == 1
        )

    if both(ops.project, ops.project_heads) and q.target is k.target and q.args[1] is k.args[1]:
        u, q, k = q.args[1], q.args[0], k.args[0]
    if both(ops.rope) and q.args[1:] == k.args[1:]:
        rotary, q, k = q.args[1:], q.args[0], k.args[0]
    if both(ops.rms_norm) and None not in (q.args[1], k.args[1]) and q.args[2] == k.args[2]:
        norms, eps, q, k = (q.args[1], k.args[1]), q.args[2], q.args[0], k.args[0]
    return q, k, u, norms, eps, rotary


def part_layout(node: Node) -> PartLayout:
    """Layout of quantize(x, bits, groups, clip)."""
    width = node.args[0].meta["val"].shape[-1]
    groups = node.args[2] if len(node.args) > 2 else 1
    return PartLayout(node.args[1], int(width) // groups, groups)


def launches(layouts: list[PartLayout]) -> list[tuple[PartLayout, ...]]:
    """Cut parts of ascending bits into launches of at most one 4-bit container and one int8 part; the last takes two."""
    cut = max(0, len(layouts) - 2)
    if len(layouts) > 1 and [la.packed for la in layouts[-2:]] != [True, False]:
        cut = len(layouts)
    singles = [(la,) for la in layouts[:cut]]
    return singles + ([tuple(layouts[cut:])] if cut < len(layouts) else [])


def common_source(key: tuple[Node, ...]) -> tuple[Node | None, tuple | None]:
    """(x, norm) when the quantizers read consecutive columns of all of x; norm is how to compute x when nobody else reads it."""
    inputs = [node.args[0] for node in key]
    if len(key) == 1 and not graph_tools.is_call(inputs[0], ops.columns):
        source, readers = inputs[0], {key[0]}
    else:
        if not all(graph_tools.is_call(x, ops.columns) for x in inputs) or len({x.args[0] for x in inputs}) != 1:
            return None, None
        edges = [0, *(x.args[2] for x in inputs)]
        source, readers = inputs[0].args[0], set(inputs)
        if [x.args[1] for x in inputs] != edges[:-1] or edges[-1] != source.meta["val"].shape[-1]:
            return None, None
    grouped = len(key[0].args) > 2 and key[0].args[2] != 1
    if set(source.users) == readers and not grouped:
        if graph_tools.is_call(source, ops.rms_norm):
            return source, ("rms", source.args[0], source.args[1], None, source.args[2])
        if graph_tools.is_call(source, getattr(ops, "layer_norm", None)):
            return source, ("layer", *source.args)
    return source, None


def gated(node: Node) -> tuple[Node, Node | None, str]:
    """(gate, up, activation) of act(gate) * up, of act(gate), or of anything."""
    gate, up = node, None
    if graph_tools.is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node):
        first, second = node.args
        if first.meta["val"].shape == second.meta["val"].shape:
            gate, up = (first, second) if _activation(first) else (second, first)
    name = _activation(gate)
    return (gate.args[0], up, name) if name else (gate, up, "none")


def split_hadamard(key: tuple[Node, ...], layouts: list[PartLayout]) -> Node | None:
    """The hadamard node whose stretches the quantizers read, one each and in order; None if it is not that, or has other readers."""
    inputs = [node.args[0] for node in key]
    spans: list[tuple[int, int]] = []
    if len(inputs) > 1:
        if not all(graph_tools.is_call(x, ops.columns) for x in inputs):
            return None
        spans = [tuple(x.args[1:3]) for x in inputs]
        inputs = [x.args[0] for x in inputs]
    source = inputs[0]
    if any(x is not source for x in inputs) or not graph_tools.is_call(source, ops.hadamard):
        return None
    stretches = source.args[2] if len(source.args) > 2 else None
    widths = [la.columns for la in layouts]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    fits = spans == [(a, a + w) for a, w in zip(starts, widths, strict=True)] if spans else len(widths) == 1
    same = stretches is None or list(stretches) == widths
    return (
        source
        if fits and same and len(source.users) == max(len(spans), 1) and (spans == [] or stretches is not None)
        else None
    )


def _activation(node: Node) -> str | None:
    if graph_tools.is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" or node.args[1:] == ("tanh",) else "gelu"
    return ACTIVATIONS.get(node.target)


def linear_from(gm: GraphModule, piece: Node) -> Linear:
    """Follow adds from a quantized_linear up: sums of pieces, then a bias, then a residual."""
    pieces, root, bias = [piece], piece, None
    while (
        len(root.users) == 1
        and graph_tools.is_call(user := next(iter(root.users)), aten.add.Tensor)
        and len(user.args) == 2
    ):
        other = user.args[1] if user.args[0] is root else user.args[0]
        if not isinstance(other, Node) or other is root:
            break
        if graph_tools.is_call(other, ops.quantized_linear) and bias is None and _same_input(piece, other):
            pieces.append(other)
        elif other.op == "get_attr" and bias is None and graph_tools.get_tensor(gm, other).dim() == 1:
            bias = other
        elif "val" in other.meta and other.meta["val"].shape == root.meta["val"].shape:
            return Linear(_ascending(pieces), user, bias, other, root)
        else:
            break
        root = user
    return Linear(_ascending(pieces), root, bias)


def _ascending(pieces: list[Node]) -> list[Node]:
    return sorted(pieces, key=lambda p: p.args[0].args[1])


def _same_input(a: Node, b: Node) -> bool:
    """Two pieces belong to one linear when their weights have equally many rows and their bits differ."""
    return a.meta["val"].shape == b.meta["val"].shape and a.args[0].args[1] != b.args[0].args[1]


def clip_of(node: Node) -> float:
    """The share of the range that a quantize node keeps."""
    return node.args[3] if len(node.args) > 3 else 1.0


def why_not_linear(linear: Linear) -> str | None:
    for piece in linear.pieces:
        xq = piece.args[0]
        if not graph_tools.is_call(xq, ops.quantize):
            return f"its input {xq} is not a quantize node"
        if "val" not in xq.args[0].meta:
            return f"the shape of {xq.args[0]} is not known"
    groups = [n.args[2] if len(n.args) > 2 else 1 for n in linear.key]
    if len(set(groups)) != 1:
        return f"its parts differ in groups: {groups}"
    columns = sum(part_layout(n).columns for n in linear.key)
    return f"{columns} input columns, one pass holds at most {MAX_COLUMNS}" if columns > MAX_COLUMNS else None


def leftover(node: Node) -> str:
    if node.target is ops.weight_only_linear:
        return "16-bit activations: there is no weight-only kernel; compile with activation_bits=4 or 8"
    return f"{node.target.__name__} is not part of a pattern a kernel takes"
