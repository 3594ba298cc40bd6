"""Norms and rotary embeddings that a model writes out in single operators, named.

    mul(weight, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps))))  -> rms_norm(x, weight, eps)      rsqrt(y), or pow(y, -0.5)
    the same on x = y - mean(y, -1)                            -> layer_norm(y, weight)
    add(mul(x, cos), mul(cat(neg(x[h:]), x[:h]), sin))         -> rope(x, cos, sin)
    cat(a·cos - b·sin, b·cos + a·sin), a and b halves of x     -> rope(x, cat(cos, cos), cat(sin, sin))
    (a + ib) · (cos + i sin), a and b every other column of x  -> flatten(stack(a·cos - b·sin, a·sin + b·cos))
    cat(rope(x[:r], cos, sin), x[r:])   (partial rotary)       -> rope(x, cos, sin) with cos narrower than x

A matcher rewrites what it finds at its root and returns None, or it returns why the root is no such thing; "" where it is not even near.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import argument, operands, other_operand, source
from resq_compiler.ir.graph_tools import aten, emit, is_call, only_user, rewrite
from resq_compiler.ir.views import Rope

WHOLE = sys.maxsize  # the end of a slice that has none


def name_composites(gm: GraphModule, made_by: str) -> tuple[int, list[str]]:
    """How many were named, and what comes near to one but is none, in words."""
    done, misses = 0, []
    for match, root in ROOTS.items():
        for node in list(gm.graph.find_nodes(op="call_function", target=root)):
            reason = match(gm, node, made_by)
            done += reason is None
            if reason:
                misses.append(f"node {node.name}: {reason}")
    return done, misses


def match_power_norm(gm: GraphModule, power: Node, made_by: str) -> str | None:
    """Root at pow(mean(x²) + eps, -0.5), another way to write rsqrt."""
    return match_rms_norm(gm, power, made_by) if argument(power, "exponent") == -0.5 else ""


def match_rms_norm(gm: GraphModule, rsqrt: Node, made_by: str) -> str | None:
    """Root at rsqrt: it must see mean(x²) + eps and be multiplied with the same x."""
    found = _mean_square(source(rsqrt))
    if isinstance(found, str):
        return f"no norm: {found}"
    x, eps = found
    normed = only_user(rsqrt)
    if not is_call(normed, aten.mul.Tensor):
        return "no norm: it is not multiplied with one value"
    other, base = other_operand(normed, rsqrt), _centred(x)
    if other is not x and (base is None or _centred(other) is not base):
        return f"no norm: it is the size of {x} but multiplied with {other}"
    scaled, gain = _gain_after(gm, normed)
    if base is None:
        rewrite(scaled, ops.rms_norm, (x, gain, eps), made_by)
    else:
        rewrite(scaled, aten.layer_norm.default, (base, [values.width(base)], gain, None, eps), made_by)
    return None


def _mean_square(node: Node) -> tuple[Node, float] | str:
    """(x, eps) of mean(x², -1) + eps, or why it is not that."""
    if not is_call(node, aten.add.Tensor) or not isinstance(operands(node)[1], float):
        return f"expected mean(x²) + eps, got {node.format_node()}"
    mean, eps = operands(node)
    if not is_call(mean, aten.mean.dim) or list(argument(mean, "dim")) != [-1]:
        return f"expected a mean over the last dimension, got {mean.format_node() if isinstance(mean, Node) else mean}"
    square = source(mean)
    if not is_call(square, aten.pow.Tensor_Scalar) or argument(square, "exponent") != 2:
        return f"expected a mean of squares, got {square.format_node()}"
    return source(square), eps


def _gain_after(gm: GraphModule, normed: Node) -> tuple[Node, Node | None]:
    """The node that multiplies a normed value with a vector of the model, and the vector; the value and None without one."""
    scaled = only_user(normed)
    if scaled is None or not is_call(scaled, aten.mul.Tensor):
        return normed, None
    gain = other_operand(scaled, normed)
    if not isinstance(gain, Node) or gain.op != "get_attr" or graph_tools.held(gm, gain).dim() != 1:
        return normed, None
    return scaled, gain


def _centred(x: object) -> Node | None:
    """y where x is y - mean(y) over the last dimension."""
    if not is_call(x, aten.sub.Tensor):
        return None
    y, mean = operands(x)
    if not is_call(mean, aten.mean.dim) or source(mean) is not y or list(argument(mean, "dim")) != [-1]:
        return None
    return source(mean)


def match_rope(gm: GraphModule, node: Node, made_by: str) -> str | None:
    """Root at the add of x·cos and rotate_half(x)·sin, in either order."""
    first, second = operands(node)
    for straight, turned in ((first, second), (second, first)):
        if not is_call(straight, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
            continue
        rotated = next((a for a in operands(turned) if is_call(a, aten.cat.default)), None)
        x = None if rotated is None else _rotated_half(rotated)
        if x is not None and x in operands(straight):
            rewrite(node, ops.rope, (x, other_operand(straight, x), other_operand(turned, rotated)), made_by)
            return None
    return ""


def _rotated_half(node: Node) -> Node | None:
    """x where the node is cat(neg(x[h:]), x[:h]) with h half of the last dimension."""
    pieces = argument(node, "tensors")
    if len(pieces) != 2 or not is_call(pieces[0], aten.neg.default) or not is_call(pieces[1], aten.slice.Tensor):
        return None
    upper, lower = source(pieces[0]), pieces[1]
    x = source(lower)
    half = values.width(x) // 2
    fits = last_dim_slice(lower, x) == (0, half) and last_dim_slice(upper, x) == (half, WHOLE)
    return x if fits else None


def last_dim_slice(node: object, x: Node) -> tuple[int, int] | None:
    """(start, stop) where a node cuts x along its last dimension."""
    if not is_call(node, aten.slice.Tensor) or source(node) is not x:
        return None
    if argument(node, "dim") not in (-1, len(values.shape(x)) - 1):
        return None
    return argument(node, "start"), argument(node, "end")


def match_halves_rope(gm: GraphModule, node: Node, made_by: str) -> str | None:
    """Root at cat(a·cos - b·sin, b·cos + a·sin), where a and b are the halves of x."""
    pieces = argument(node, "tensors")
    if len(pieces) != 2 or not is_call(pieces[0], aten.sub.Tensor) or not is_call(pieces[1], aten.add.Tensor):
        return ""
    products = [operands(x) if is_call(x, aten.mul.Tensor) else None for p in pieces for x in operands(p)]
    if any(product is None for product in products):
        return ""
    (a, cos), (b, sin), *second = [product for product in products if product is not None]
    if second != [(b, cos), (a, sin)] or (x := _of_halves(a, b)) is None:
        return ""
    with gm.graph.inserting_before(node):
        wide = [emit(gm.graph, aten.cat.default, ([t, t], -1), node, made_by) for t in (cos, sin)]
    rewrite(node, ops.rope, (x, *wide), made_by)
    return None


def _of_halves(a: object, b: object) -> Node | None:
    """x where a and b are the two chunks of its last dimension."""
    if not (is_call(a, operator.getitem) and is_call(b, operator.getitem)) or source(a) is not source(b):
        return None
    chunk, picked = source(a), (argument(a, "b"), argument(b, "b"))
    halves = is_call(chunk, aten.chunk.default) and picked == (0, 1) and argument(chunk, "chunks") == 2
    return source(chunk) if halves and argument(chunk, "dim") in (-1, 3) else None


def match_complex_rope(gm: GraphModule, node: Node, made_by: str) -> str | None:
    """Root at view_as_real(view_as_complex(pairs of x) · polar(1, angle) · scale): the same in real numbers, pairs side by side."""
    product = source(node)
    if not is_call(product, aten.mul.Tensor):
        return f"no rotary embedding: expected a product of complex numbers, got {product.format_node()}"
    first, second = operands(product)
    for pairs, turn in ((first, second), (second, first)):
        x = _of_pairs(pairs)
        found = None if x is None else _turning(turn, made_by)
        if x is not None and found is not None:
            rewrite(node, aten.stack.default, (_turned_pairs(gm, node, x, found, made_by), -1), made_by)
            return None
    return f"no rotary embedding: expected pairs of columns times polar(1, angle), got {product.format_node()}"


def _of_pairs(value: object) -> Node | None:
    """x where a value is view_as_complex of its columns, two by two."""
    pairs = source(value) if is_call(value, aten.view_as_complex.default) else None
    if pairs is None or not is_call(pairs, aten.reshape.default, aten.view.default):
        return None
    before, after = values.shape(source(pairs)), values.shape(pairs)
    return source(pairs) if after == (*before[:-1], before[-1] // 2, 2) else None


def _turned_pairs(
    gm: GraphModule, like: Node, x: Node, turning: tuple[Node, float], made_by: str
) -> list[Node]:  # fmt: skip
    """[a·cos - b·sin, a·sin + b·cos] of the pairs (a, b) of x's columns."""
    angle, scale = turning

    def put(target: Callable, *args: Any) -> Node:
        return emit(gm.graph, target, args, like, made_by)

    with gm.graph.inserting_before(like):
        a, b = (put(aten.slice.Tensor, x, -1, i, WHOLE, 2) for i in (0, 1))
        cos, sin = (put(f, angle) for f in (aten.cos.default, aten.sin.default))
        if scale != 1:
            cos, sin = (put(aten.mul.Tensor, t, scale) for t in (cos, sin))
        lower = put(aten.sub.Tensor, put(aten.mul.Tensor, a, cos), put(aten.mul.Tensor, b, sin))
        upper = put(aten.add.Tensor, put(aten.mul.Tensor, a, sin), put(aten.mul.Tensor, b, cos))
    return [lower, upper]


def _turning(turn: object, made_by: str) -> tuple[Node, float] | None:
    """(angle, scale) of scale · polar(1, angle); what is unsqueezed behind it is unsqueezed before it."""
    if is_call(turn, aten.to.dtype, aten.to.dtype_layout, aten.to.device):
        return _turning(source(turn), made_by)
    if is_call(turn, aten.unsqueeze.default):
        found = _turning(source(turn), made_by)
        if found is None:
            return None
        with turn.graph.inserting_before(turn):
            angle = emit(turn.graph, aten.unsqueeze.default, (found[0], argument(turn, "dim")), turn, made_by)
        return angle, found[1]
    if is_call(turn, aten.mul.Tensor) and isinstance(factor := operands(turn)[1], (int, float)):
        found = _turning(operands(turn)[0], made_by)
        return None if found is None else (found[0], found[1] * float(factor))
    if not is_call(turn, aten.polar.default) or not is_call(argument(turn, "abs"), aten.ones_like.default):
        return None
    return argument(turn, "angle"), 1.0


def match_partial_rope(gm: GraphModule, node: Node, made_by: str) -> str | None:
    """Root at cat(rope(x[..., :r]), x[..., r:]); x[..., :r] is x itself where r is the whole width."""
    pieces = argument(node, "tensors")
    if len(pieces) != 2 or not is_call(pieces[0], ops.rope) or not is_call(pieces[1], aten.slice.Tensor):
        return ""
    rope, x = Rope.require(pieces[0]), source(pieces[1])
    width = values.width(rope.x)
    if rope.x is not x and last_dim_slice(rope.x, x) != (0, width):
        return f"no partial rotary embedding: it turns {rope.x}, which is not the first {width} columns of {x}"
    if last_dim_slice(pieces[1], x) != (width, WHOLE):
        return f"no partial rotary embedding: {pieces[1]} is not the rest of {x} behind column {width}"
    rewrite(node, ops.rope, (x, rope.cos, rope.sin), made_by)
    return None


ROOTS: dict[Callable[[GraphModule, Node, str], str | None], Callable] = {
    match_rms_norm: aten.rsqrt.default,
    match_power_norm: aten.pow.Tensor_Scalar,
    match_rope: aten.add.Tensor,
    match_halves_rope: aten.cat.default,
    match_complex_rope: aten.view_as_real.default,
    match_partial_rope: aten.cat.default,
}
