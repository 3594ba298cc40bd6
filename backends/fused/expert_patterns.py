"""A mixture of experts as the lowering recognises it: what `experts` computes, from the sum of a token's choices back to the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from resq_compiler.backends.fused.patterns import Inputs, common_source, gated, inputs_of, split_hadamard
from torch.fx import Node

from resq_compiler.ir.args import argument, operands
from resq_compiler.ir.expert_views import CombineExperts
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.linears import LinearSum, read_part

aten = torch.ops.aten


@dataclass(frozen=True)
class Gated:
    """act(gate) * up, or act(gate); limit and slope of `clamped` (kernels.EXPERT_ACTIVATIONS)."""

    gate: Node
    up: Node | None
    activation: str
    limit: float = 0.0
    slope: float = 0.0


@dataclass(frozen=True)
class Mixture:
    """The linears of a mixture: gate, and up if there is one, that read `inputs`, and down that reads `hidden`.

    transform: one of experts.TRANSFORMS, between the product of gate and up and `hidden`.
    """

    combine: CombineExperts
    indices: Node
    rows: tuple[LinearSum, ...]
    down: LinearSum
    inputs: Inputs
    hidden: Inputs
    gating: Gated
    transform: str


def mixture_of(combine: CombineExperts, sums: dict[Node, LinearSum]) -> Mixture | str:
    """What a sum over choices is made of, or why no operator takes it. sums: every linear with weight codes, by its result."""
    down = sums.get(combine.y)
    if down is None:
        return "what is summed over the choices of a token is not a linear of experts with weight codes"
    hidden = inputs_of(down, experts=None)
    if isinstance(hidden, str):
        return hidden
    found = _before(hidden)
    if isinstance(found, str):
        return found
    product, transform = found
    gating = clamped(product) or Gated(*gated(product))
    rows = [sums.get(node) for node in (gating.gate, gating.up) if node is not None]
    known = tuple(linear for linear in rows if linear is not None)
    if len(known) < len(rows):
        return (
            f"node {product.name}: expected act(gate) * up of linears of experts, with an activation that kernels know"
        )
    inputs = [inputs_of(linear, experts=None) for linear in known]
    indices = {read_part(part).indices for linear in (*known, down) for part in linear.parts}
    index = indices.pop()
    if isinstance(inputs[0], str) or index is None:
        return str(inputs[0])
    if indices or any(other != inputs[0] for other in inputs):
        return "gate, up and down do not read the same values, or do not go through the same experts"
    reason = next((reason for reason in map(_why_not, (inputs[0], hidden)) if reason is not None), None)
    return reason or Mixture(combine, index, known, down, inputs[0], hidden, gating, transform)


def _why_not(inputs: Inputs) -> str | None:
    """At most two precisions, each with one scale a token."""
    if len(inputs) > 2:
        return f"its input has parts of {[one.bits for one in inputs]} bits; grouped kernels take two"
    return "its input is quantized in groups" if any(one.groups != 1 for one in inputs) else None


def _before(hidden: Inputs) -> tuple[Node, str] | str:
    """What is transformed and quantized for down, and the transform; or why that is not known."""
    transform = split_hadamard(hidden)
    if isinstance(transform, str):
        return transform
    if transform is not None:
        return transform.x, "transposed" if transform.transpose else "hadamard"
    source = common_source(hidden)
    return "its quantizers read different values" if source is None else (source.x, "none")


def clamped(node: Node) -> Gated | None:
    """(clamp(up, -l, l) + 1) * (g * sigmoid(slope * g)) with g = clamp(gate, None, l); None where a node is something else."""
    for raised, glu in _both(node, aten.mul.Tensor):
        shifted = [pair[0] for pair in _both(raised, aten.add.Tensor) if pair[1] == 1]
        limits = _limits(shifted[0]) if shifted else None
        for gate, sigmoid in _both(glu, aten.mul.Tensor):
            slope = _slope(sigmoid, gate)
            bounds = _limits(gate)
            if (
                slope is None
                or limits is None
                or bounds is None
                or bounds != (None, limits[1])
                or limits[0] != -limits[1]
            ):
                continue
            return Gated(argument(gate, "self"), argument(shifted[0], "self"), "clamped", float(limits[1]), slope)
    return None


def _both(node: object, target: object) -> list[tuple]:
    """The operands of a call of `target`, in both orders."""
    if not isinstance(node, Node) or node.target is not target:
        return []
    first, second = operands(node)
    return [(first, second), (second, first)]


def _limits(node: object) -> tuple | None:
    return (argument(node, "min"), argument(node, "max")) if is_call(node, aten.clamp.default) else None


def _slope(node: object, gate: object) -> float | None:
    """Of sigmoid(slope * gate)."""
    if not is_call(node, aten.sigmoid.default):
        return None
    found = [factor for x, factor in _both(argument(node, "self"), aten.mul.Tensor) if x is gate]
    return float(found[0]) if found and isinstance(found[0], (int, float)) else None
