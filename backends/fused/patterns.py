"""What the lowering recognises in a quantized graph. Functions look at nodes and change nothing.

What does not match is a sentence that says why, or None where there was nothing to match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from resq_compiler.backends.fused.formats import InputPart
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import is_call

aten = torch.ops.aten
ACTIVATIONS: dict[object, str] = {aten.silu.default: "silu", aten.relu.default: "relu"}
Spans = tuple[tuple[int, int, int], ...]


def node_at(node: Node, index: int) -> Node:
    """An argument that is always a node."""
    value = node.args[index]
    assert isinstance(value, Node), node.format_node()
    return value


def padded(node: Node, *defaults: Any) -> tuple[Any, ...]:
    """All arguments of a call, the given defaults in place of the last ones it leaves out."""
    return (*node.args, *defaults[len(node.args) - len(defaults) :]) if len(node.args) < len(defaults) else node.args


def width_of(node: Node) -> int:
    """Columns of a node's value."""
    return int(node.meta["val"].shape[-1])


# linears ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantizer:
    """quantize(x, bits, groups, clip)."""

    node: Node
    x: Node
    bits: int
    groups: int
    clip: float

    @staticmethod
    def of(node: Node) -> Quantizer | str:
        """The view of a node, or why it is none."""
        if not is_call(node, ops.quantize):
            return f"its input {node} is not a quantize node"
        x, bits, groups, clip = padded(node, None, None, 1, 1.0)
        return Quantizer(node, x, bits, groups, clip) if "val" in x.meta else f"the shape of {x} is not known"

    @property
    def part(self) -> InputPart:
        return InputPart(self.bits, width_of(self.x) // self.groups, self.groups)


Inputs = tuple[Quantizer, ...]


@dataclass(frozen=True)
class Linear:
    """One linear of the model: its pieces (quantized_linear nodes), in ascending bits, and the node that holds their sum.

    root: the result, residual included.    before: the result without the residual, if there is one.
    """

    pieces: tuple[Node, ...]
    root: Node
    bias: Node | None = None
    residual: Node | None = None
    before: Node | None = None

    def without_residual(self) -> Linear:
        """The same linear, the addition left to another one that ends in it."""
        return self if self.before is None else Linear(self.pieces, self.before, self.bias)

    @property
    def codes(self) -> list[Node]:
        """Of each piece, the weight codes."""
        return [node_at(piece, 1) for piece in self.pieces]

    @property
    def scales(self) -> list[Node]:
        """Of each piece, the weight scales."""
        return [node_at(piece, 2) for piece in self.pieces]

    def inputs(self) -> Inputs | str:
        """The quantizers of the pieces, or why no operator takes this linear."""
        found = [Quantizer.of(node_at(piece, 0)) for piece in self.pieces]
        quantizers = tuple(one for one in found if isinstance(one, Quantizer))
        reasons = [one for one in found if isinstance(one, str)]
        groups = [one.groups for one in quantizers]
        if not reasons and len(set(groups)) != 1:
            return f"its parts differ in groups: {groups}"
        return reasons[0] if reasons else quantizers


def linear_from(gm: GraphModule, piece: Node) -> Linear:
    """Follow additions from a quantized_linear up: sums of pieces, then a bias, then a residual."""
    found = Linear((piece,), piece)
    while (step := _addition(found.root)) is not None:
        user, other = step
        if is_call(other, ops.quantized_linear) and found.bias is None and _same_linear(piece, other):
            pieces = sorted((*found.pieces, other), key=_bits_of)
            found = replace(found, pieces=tuple(pieces), root=user)
        elif found.bias is None and other.op == "get_attr" and graph_tools.get_tensor(gm, other).dim() == 1:
            found = replace(found, bias=other, root=user)
        elif "val" in other.meta and other.meta["val"].shape == found.root.meta["val"].shape:
            return replace(found, root=user, residual=other, before=found.root)
        else:
            break
    return found


def _addition(node: Node) -> tuple[Node, Node] | None:
    """(the sum, the other operand) where a node has no other reader than an addition of two nodes."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or not is_call(user, aten.add.Tensor) or len(user.args) != 2:
        return None
    first, second = user.args
    other = second if first is node else first
    return (user, other) if isinstance(other, Node) and other is not node else None


def _bits_of(piece: Node) -> int:
    bits = node_at(piece, 0).args[1]
    assert isinstance(bits, int)
    return bits


def _same_linear(a: Node, b: Node) -> bool:
    """Two pieces belong to one linear when their weights have equally many rows and their bits differ."""
    return a.meta["val"].shape == b.meta["val"].shape and _bits_of(a) != _bits_of(b)


def calls(parts: Sequence[InputPart]) -> list[tuple[InputPart, ...]]:
    """Cut parts of ascending bits into operators of at most one low and one high part; the last takes two."""
    two = len(parts) > 1 and [part.is_low for part in parts[-2:]] == [True, False]
    cut = max(0, len(parts) - 2) if two else len(parts)
    return [*((part,) for part in parts[:cut]), *((tuple(parts[cut:]),) if two else ())]


# inputs of linears ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormCall:
    """rms_norm or layer_norm over the last dimension of x."""

    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float

    @staticmethod
    def of(node: Node) -> NormCall | None:
        if is_call(node, ops.rms_norm):
            x, weight, eps = node.args
            return NormCall("rms", node_at(node, 0), weight, None, eps)  # type: ignore[arg-type]
        if is_call(node, aten.layer_norm.default):
            x, shape, weight, bias, eps, _ = padded(node, None, None, None, None, 1e-5, True)
            return NormCall("layer", x, weight, bias, eps) if len(shape) == 1 else None
        return None


@dataclass(frozen=True)
class Source:
    """What quantizers read: consecutive columns of all of `x`. readers: the nodes between x and the quantizers, or these."""

    x: Node
    readers: frozenset[Node]

    def norm(self, inputs: Inputs) -> NormCall | str | None:
        """How x is computed, if that is a norm; a reason where it is one that has to be computed apart."""
        norm = NormCall.of(self.x)
        if norm is None:
            return None
        others = sorted(node.name for node in set(self.x.users) - self.readers)
        if others:
            return f"others than the quantizers of one linear's input read it: {', '.join(others)}"
        return "it is quantized in groups" if inputs[0].groups > 1 else norm


def common_source(inputs: Inputs) -> Source | None:
    """The value whose columns the quantizers read, in order and without gaps; None where they read different values."""
    first = inputs[0].x
    if len(inputs) == 1 and not is_call(first, ops.columns):
        return Source(first, frozenset([inputs[0].node]))
    spans = _spans(inputs)
    if spans is None or spans[0][0] != 0 or any(a[1] != b[0] for a, b in zip(spans, spans[1:], strict=False)):
        return None
    x = node_at(first, 0)
    return Source(x, frozenset(one.x for one in inputs)) if spans[-1][1] == width_of(x) else None


def _spans(inputs: Inputs) -> list[tuple[int, int]] | None:
    """(start, stop) of the columns of one value that the quantizers read; None if they do not."""
    if not all(is_call(one.x, ops.columns) for one in inputs) or len({one.x.args[0] for one in inputs}) != 1:
        return None
    return [(one.x.args[1], one.x.args[2]) for one in inputs]  # type: ignore[misc]


def gated(node: Node) -> tuple[Node, Node | None, str]:
    """(gate, up, activation) of act(gate) * up, of act(gate), or of anything."""
    gate, up = node, None
    if is_call(node, aten.mul.Tensor) and isinstance(node.args[1], Node):
        first, second = node_at(node, 0), node.args[1]
        if first.meta["val"].shape == second.meta["val"].shape:
            gate, up = (first, second) if _activation(first) else (second, first)
    name = _activation(gate)
    return (node_at(gate, 0), up, name) if name else (gate, up, "none")


def _activation(node: Node) -> str | None:
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" or node.args[1:] == ("tanh",) else "gelu"
    return ACTIVATIONS.get(node.target)


def split_hadamard(inputs: Inputs) -> Node | str | None:
    """The hadamard node whose stretches the quantizers read, one each and in order; None if there is none."""
    nodes = {node_at(one.x, 0) if is_call(one.x, ops.columns) else one.x for one in inputs}
    transforms = [node for node in nodes if is_call(node, ops.hadamard)]
    if not transforms:
        return None
    transform = transforms[0]
    stretches = padded(transform, None, False, None)[2] or [width_of(transform)]
    if len(inputs) == 1 and inputs[0].x is transform:
        reads, readers = [width_of(transform)], {inputs[0].node}
    else:
        source = common_source(inputs)
        if source is None or source.x is not transform:
            return "its quantizers do not read consecutive stretches of it"
        reads, readers = [width_of(one.x) for one in inputs], set(source.readers)
    if list(stretches) != reads:
        return f"its stretches {list(stretches)} are not those that are quantized, {reads}"
    return transform if set(transform.users) == readers else "others than the quantizers of one linear's input read it"


# attention ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheSide:
    """Keys or values: append_cache(past, quantize_dequantize(new, spans, clip)) of the cache input `past`."""

    past: Node
    new: Node
    spans: Spans
    clip: float

    @staticmethod
    def of(node: object, cache_inputs: Sequence[Node]) -> CacheSide | str:
        """The view of a node, or why it is none."""
        if not isinstance(node, Node) or not is_call(node, ops.append_cache) or node.args[0] not in cache_inputs:
            return "keys or values are not append_cache(past, ...) of a graph input"
        coded = node_at(node, 1)
        if not is_call(coded, ops.quantize_dequantize):
            return "the key/value cache is not quantized (kv_bits of 16); compile with kv_bits=4 or 8"
        new, spans, clip = padded(coded, None, None, 1.0)
        return CacheSide(node_at(node, 0), new, tuple((b, s, e) for b, s, e in spans), clip)


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
    same_basis = q.target is k.target and padded(q, None, None, False)[1:] == padded(k, None, None, False)[1:]
    if same_basis and _both(found, ops.project, ops.project_heads) and not padded(q, None, None, False)[2]:
        found = replace(_before(found), u=node_at(q, 1))
    if _both(found, ops.rope) and found.q.args[1:] == found.k.args[1:]:
        found = replace(_before(found), cos_sin=(node_at(found.q, 1), node_at(found.q, 2)))
    if (
        _both(found, ops.rms_norm)
        and None not in (found.q.args[1], found.k.args[1])
        and found.q.args[2] == found.k.args[2]
    ):
        eps = found.q.args[2]
        assert isinstance(eps, float)
        norms = node_at(found.q, 1), node_at(found.k, 1)
        found = replace(_before(found), q_norm=norms[0], k_norm=norms[1], eps=eps)
    return found


def _both(found: Turned, *targets: Callable) -> bool:
    return all(is_call(node, *targets) and len(node.users) == 1 for node in (found.q, found.k))


def _before(found: Turned) -> Turned:
    return replace(found, q=node_at(found.q, 0), k=node_at(found.k, 0))


# what is left ---------------------------------------------------------------------------------------------------------


def leftover(node: Node) -> str:
    """Why a quantized node is still there when everything that matches has been taken."""
    if node.target is ops.weight_only_linear:
        return "16-bit activations: there is no weight-only kernel; compile with activation_bits=4 or 8"
    return f"{getattr(node.target, '__name__', node.target)} is not part of a pattern that a fused operator takes"
