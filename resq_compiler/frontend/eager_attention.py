"""Attention written out in single operators: what its queries, keys, values, mask, scale and soft-cap are.

    product = matmul(softmax(f(matmul(q, kᵀ))), v),    f made of: times or over a number, cap · tanh, plus a bias or a mask,
                                                        where(seen, ·, lowest), masked_fill(·, hidden, lowest), views, casts

Found from the softmax by dataflow: inwards to the product that makes the scores, outwards to the product with the values. Whatever the
order of f, softmax(f(·)) v is softmax(scale · q kᵀ + mask) v with one mask, or is refused. Products of [B·H, S, D] tensors count too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.args import argument, float_arg, node_arg, operands, other_operand, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, is_call, only_user

LOWEST = -1e4  # what hides a key is below this
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.dropout.default)
SCALINGS = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
LIMITS = (aten.max.other, aten.maximum.default)


@dataclass
class WrittenOut:
    """product: the node whose value is the attention. q, k, v as the products read them: [B, H, S, D] or [B·H, S, D]; k transposed."""

    product: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float
    softcap: float | None


@dataclass
class _Scores:
    """softcap(scale · q kᵀ) + mask while it is put together, from the product outwards."""

    gm: GraphModule
    like: Node
    made_by: str
    heads: int
    scale: float = 1.0
    softcap: float | None = None
    in_tanh: bool = False
    mask: Node | None = None

    def emit(self, target: Callable, *args: Any) -> Node:
        return emit(self.gm.graph, target, args, self.like, self.made_by)

    def add(self, term: Node) -> None:
        """x + term"""
        shape = values.shape(term)
        if len(shape) == 3 and shape[0] % self.heads == 0 and shape[0] > self.heads:
            term = self.emit(aten.unflatten.int, term, 0, [-1, self.heads])
        if self.mask is None:
            self.mask = term
        elif _is_bool(self.mask):
            self.mask = self.emit(aten.where.ScalarOther, self.mask, term, _lowest(term))
        else:
            self.mask = self.emit(aten.add.Tensor, self.mask, term)

    def keep(self, seen: Node) -> None:
        """where(seen, x, lowest)"""
        if self.mask is None:
            self.mask = seen
        elif _is_bool(self.mask):
            self.mask = self.emit(aten.logical_and.default, self.mask, seen)
        else:
            self.mask = self.emit(aten.where.ScalarOther, seen, self.mask, _lowest(self.mask))

    def times(self, factor: float) -> str | None:
        """x · factor"""
        if self.in_tanh:
            self.softcap, self.scale, self.in_tanh = factor, self.scale * factor, False
            return None
        if self.softcap is not None and factor != 1:
            return "its soft-capped scores are scaled again"
        self.scale *= factor
        if self.mask is not None and not _is_bool(self.mask):
            self.mask = self.emit(aten.mul.Tensor, self.mask, factor)
        return None

    def tanh(self) -> str | None:
        """tanh(x)"""
        if self.mask is not None or self.softcap is not None:
            return "tanh is applied to masked or soft-capped scores"
        self.in_tanh = True
        return None


def _is_bool(node: Node) -> bool:
    return values.dtype(node) == torch.bool


def _lowest(node: Node) -> float:
    return torch.finfo(values.dtype(node)).min


def find(gm: GraphModule, softmax: Node, is_cache: Callable[[Node], bool], made_by: str) -> WrittenOut | None:
    """The attention around a softmax; None where it makes no attention (a router).

    Raises TopologyError naming the softmax: it reads products of cached keys, and is not understood.
    """
    x = source(softmax)
    path = _inwards(gm, x)
    if path is None:
        if any(is_cache(n) for n in graph_tools.ancestors([softmax])) and _values(softmax):
            raise TopologyError(_refusal(softmax, f"its scores come from {x.format_node()}"))
        return None
    product, steps = path[-1], path[:-1][::-1]
    outer = _values(softmax)
    if outer is None or not any(is_cache(n) for n in graph_tools.ancestors([product])):
        return None
    dim = argument(softmax, "dim")
    if dim not in (-1, len(values.shape(softmax)) - 1):
        raise TopologyError(_refusal(softmax, f"it runs over dimension {dim}"))
    return _put_together(gm, softmax, product, steps, outer, made_by)


def _put_together(
    gm: GraphModule, softmax: Node, product: Node, steps: list[Node], outer: Node, made_by: str
) -> WrittenOut:  # fmt: skip
    biased = is_call(product, aten.baddbmm.default)
    q, k = (node_arg(product, name) for name in ("batch1", "batch2")) if biased else operands(product)
    shape, batch = values.shape(q), values.shape(graph_tools.placeholders(gm.graph)[0])[0]
    scores = _Scores(gm, softmax, made_by, heads=shape[0] // batch if len(shape) == 3 else shape[1])
    with gm.graph.inserting_before(softmax):
        if biased:
            scores.scale = float_arg(product, "alpha")
            scores.add(_times_beta(scores, product))
        for node, inner in zip(steps, [product, *steps], strict=False):
            reason = _step(scores, gm, node, inner)
            if reason is not None:
                raise TopologyError(_refusal(softmax, reason))
        if scores.in_tanh:
            raise TopologyError(_refusal(softmax, "no factor follows the tanh of its scores"))
    return WrittenOut(outer, q, k, operands(outer)[1], scores.mask, scores.scale, scores.softcap)


def _times_beta(scores: _Scores, product: Node) -> Node:
    beta, bias = float_arg(product, "beta"), source(product)
    return bias if beta == 1 else scores.emit(aten.mul.Tensor, bias, beta)


def _step(scores: _Scores, gm: GraphModule, node: Node, inner: Node) -> str | None:
    """Apply one operator on the way from the product to the softmax; a reason where it cannot be."""
    if is_call(node, *SCALINGS):
        factor = _number(gm, other_operand(node, inner))
        assert factor is not None
        return scores.times(1 / factor if is_call(node, aten.div.Tensor, aten.div.Scalar) else factor)
    if is_call(node, aten.tanh.default):
        return scores.tanh()
    if scores.in_tanh and not is_call(node, *VIEW_OPS, *CASTS, *LIMITS):
        return "no factor follows the tanh of its scores"
    if is_call(node, aten.add.Tensor):
        scores.add(other_operand(node, inner))
    elif is_call(node, aten.where.self, aten.where.ScalarOther):
        condition = node_arg(node, "condition")
        shown = argument(node, "self") is inner
        scores.keep(condition if shown else scores.emit(aten.logical_not.default, condition))
    elif is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores.keep(scores.emit(aten.logical_not.default, argument(node, "mask")))
    return None


def _inwards(gm: GraphModule, node: Node) -> list[Node] | None:
    """The nodes from one that a softmax reads to the product of queries and keys; None where none is reached."""
    if is_call(node, *PRODUCTS):
        return [node] if all(isinstance(a, Node) for a in node.args) else None
    for operand in _operands(gm, node):
        rest = _inwards(gm, operand)
        if rest is not None:
            return [node, *rest]
    return None


def _operands(gm: GraphModule, node: Node) -> list[Node]:
    """Through which operands of an operator the way to the scores may go."""
    if is_call(node, *VIEW_OPS, *CASTS, aten.tanh.default):
        return [source(node)]
    if is_call(node, aten.add.Tensor):
        return [a for a in operands(node) if isinstance(a, Node)] if "alpha" not in node.kwargs else []
    if is_call(node, *SCALINGS):
        return [a for a, b in _both_ways(*operands(node)) if _number(gm, b) is not None]
    if is_call(node, *LIMITS):
        return [a for a, b in _both_ways(*operands(node)) if _hides(gm, b)]
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return [source(node)] if _hides(gm, argument(node, "value")) else []
    if is_call(node, aten.where.self, aten.where.ScalarOther):
        choices = _both_ways(argument(node, "self"), argument(node, "other"))
        return [a for a, b in choices if _hides(gm, b)]
    return []


def _both_ways(first: Any, second: Any) -> list[tuple[Node, Any]]:
    """Each operand that is a value of the graph, with the other one."""
    return [(a, b) for a, b in ((first, second), (second, first)) if isinstance(a, Node)]


def _hides(gm: GraphModule, value: object) -> bool:
    if isinstance(value, Node) and value.op == "get_attr":
        tensor = graph_tools.get_tensor(gm, value)
        if tensor.is_meta and tensor.numel() == 1:
            return True  # a model without weights has no values; its structure is all that is asked for
    number = _number(gm, value)
    return number is not None and number <= LOWEST


def _number(gm: GraphModule, value: object) -> float | None:
    """A Python number, or what a tensor constant of one element holds."""
    if isinstance(value, (int, float)):
        return float(value)
    if is_call(value, aten.full.default):
        return _number(gm, argument(value, "fill_value")) if list(argument(value, "size")) == [] else None
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    tensor = graph_tools.get_tensor(gm, value)
    return float(tensor) if isinstance(tensor, Tensor) and tensor.numel() == 1 and not tensor.is_meta else None


def _values(softmax: Node) -> Node | None:
    """The product of the softmax with values, through casts and views that nothing else reads."""
    node = softmax
    while True:
        user = only_user(node)
        if is_call(user, aten.matmul.default, aten.bmm.default) and source(user) is node:
            return user
        if not is_call(user, *VIEW_OPS, *CASTS):
            return None
        node = user


def _refusal(softmax: Node, reason: str) -> str:
    where = graph_tools.module_of(softmax)
    return (
        f"node {softmax.name}{f' ({where})' if where else ''}: expected attention, softmax(scale · q kᵀ + mask) v with keys and values "
        f"from the cache; {reason}"
    )
