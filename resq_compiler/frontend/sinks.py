"""Attention sinks: a learned score for each head that takes a share of the softmax and gives no value.

softmax(cat(scores, sinks) - max)[..., :-1]                              ->    softmax(scores), and the sinks beside it
softmax(scores - max)                                                    ->    softmax(scores), without sinks
(softmax(scores) v) · sigmoid(logsumexp(scores) - sinks)                 ->    softmax(scores) v, and the sinks beside it
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.frontend.eager_attention import CASTS
from resq_compiler.ir import graph_tools, values
from resq_compiler.ir.args import argument, operands, other_operand, set_argument, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, evaluate, is_call, only_user, replace


def take_sinks(gm: GraphModule, softmax: Node, env: dict[Node, Tensor], made_by: str) -> tuple[Node, Node | None]:
    """The softmax over the scores alone, and the sinks [H], a tensor of the model; the softmax as it is and None where it has none.

    The graph computes something else until an attention with these sinks stands in the place of the softmax.
    """
    joined = _without_largest(source(softmax))
    kept = only_user(softmax)
    if not is_call(joined, aten.cat.default) or not _drops_last(kept, softmax):
        set_argument(softmax, "self", joined)
        return softmax, None
    pieces = argument(joined, "tensors")
    if len(pieces) != 2 or argument(joined, "dim") not in (-1, 3):
        return softmax, None
    scores, spread = pieces
    sinks = _spread_vector(gm, spread, env)
    if sinks is None:
        return softmax, None
    assert kept is not None
    with gm.graph.inserting_before(kept):
        alone = emit(gm.graph, aten.softmax.int, (scores, -1), softmax, made_by)
    values.forget(alone)  # as wide as without sinks
    vector = graph_tools.derive_tensor(
        gm, sinks, f"resq.{softmax.name}.sinks", lambda t: t.flatten(), (values.shape(scores)[1],), made_by
    )
    return replace(kept, alone), vector


def take_share(
    gm: GraphModule, product: Node, scores: Node, env: dict[Node, Tensor], made_by: str
) -> tuple[Node, Node | None]:
    """What weighs an attention with the share that keys have beside sinks, and these; the product as it is and None without.

    product: softmax(scores) v. With one more score s in the softmax the others keep 1 / (1 + exp(s - logsumexp(scores))) of it.
    """
    weighed = only_user(product)
    if not is_call(weighed, aten.mul.Tensor):
        return product, None
    share = other_operand(weighed, product)
    while isinstance(share, Node) and is_call(share, *VIEW_OPS, *CASTS):
        share = source(share)
    beside = source(share) if is_call(share, aten.sigmoid.default) else None
    if not is_call(beside, aten.sub.Tensor):
        return product, None
    total, spread = operands(beside)
    if not is_call(total, aten.logsumexp.default) or source(total) is not scores or not isinstance(spread, Node):
        return product, None
    sinks = _spread_vector(gm, spread, env) if list(argument(total, "dim")) == [-1] else None
    if sinks is None:
        return product, None
    name = f"resq.{product.name}.sinks"
    return weighed, graph_tools.derive_tensor(
        gm, sinks, name, lambda t: t.flatten(), (values.shape(product)[1],), made_by
    )


def _without_largest(x: Node) -> Node:
    """y where x is y - max(y): the same softmax."""
    if not is_call(x, aten.sub.Tensor):
        return x
    y, largest = operands(x)
    whole = source(largest) if isinstance(largest, Node) else None
    return y if is_call(whole, aten.max.dim) and source(whole) is y else x


def _drops_last(node: Node | None, softmax: Node) -> bool:
    """softmax[..., :-1]"""
    if not is_call(node, aten.slice.Tensor):
        return False
    cut = tuple(argument(node, name) for name in ("dim", "start", "end", "step"))
    return cut in ((3, 0, -1, 1), (-1, 0, -1, 1), (3, None, -1, 1), (-1, None, -1, 1)) and source(node) is softmax


def _spread_vector(gm: GraphModule, spread: Node, env: dict[Node, Tensor]) -> Node | None:
    """The tensor of H values of the model that is spread to [B, H, S, 1], or to what broadcasts to it."""
    root = spread
    while is_call(root, *VIEW_OPS):
        root = source(root)
    heads = values.shape(spread)[1]
    if root.op != "get_attr" or values.shape(root).numel() != heads:
        return None
    numbers = torch.arange(heads)
    found = evaluate(gm, spread, {**env, root: numbers.reshape(values.shape(root))})
    return root if torch.equal(found, numbers.reshape(1, -1, *[1] * (found.dim() - 2)).expand_as(found)) else None
