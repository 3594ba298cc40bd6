"""A tensor that a model makes empty and fills piece by piece: its pieces, joined.

    y = new_empty(x, [..., a + b]);    copy_(y[..., :a], p);    copy_(y[..., a:], q)    ->  y = cat([p, q], -1)

Latent attention joins the keys of every head with those that all heads share in this way. Where the pieces do not cover the last dimension,
or something reads the tensor before it is full, it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Graph, Node

from resq_compiler.frontend.composites import WHOLE, last_dim_slice
from resq_compiler.ir import values
from resq_compiler.ir.args import argument
from resq_compiler.ir.graph_tools import aten, emit, is_call, only_user, replace
from resq_compiler.ir.meta import Origin

EMPTY = (aten.new_empty.default, aten.empty_like.default, aten.empty.memory_format)


def join_filled(graph: Graph) -> int:
    """Join the pieces of every tensor that is filled along its last dimension; how many were."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    done = 0
    for node in [n for n in graph.nodes if is_call(n, *EMPTY)]:
        pieces = _pieces(node)
        readers = [user for user in node.users if user not in [piece.target for piece in pieces]]
        if not pieces or not readers or any(order[r] < order[p.copy] for r in readers for p in pieces):
            continue
        if not _cover(pieces, node):
            continue
        last = max((piece.copy for piece in pieces), key=order.__getitem__)
        with graph.inserting_after(last):
            joined = emit(graph, aten.cat.default, ([p.source for p in pieces], -1), node, Origin().made_by)
        for reader in readers:
            reader.replace_input_with(node, joined)
        for piece in pieces:
            graph.erase_node(piece.copy)
            graph.erase_node(piece.target)
        replace(node, joined)
        done += 1
    return done


@dataclass(frozen=True)
class _Piece:
    """copy_(target, source), where target is columns start:stop of the tensor."""

    start: int
    stop: int
    target: Node
    source: Node
    copy: Node


def _pieces(node: Node) -> list[_Piece]:
    """What is written into a tensor, by columns."""
    found = []
    for target in node.users:
        span, copy = last_dim_slice(target, node), only_user(target)
        if span is None or argument(target, "step") != 1 or not is_call(copy, aten.copy_.default) or copy.users:
            continue
        source = argument(copy, "src")
        if argument(copy, "self") is target and isinstance(source, Node):
            stop = values.width(node) if span[1] == WHOLE else span[1]
            found.append(_Piece(span[0], stop, target, source, copy))
    return sorted(found, key=lambda piece: piece.start)


def _cover(pieces: list[_Piece], node: Node) -> bool:
    """Whether the pieces stand side by side along the whole last dimension, in the shape and type of the rest."""
    before = tuple(map(int, values.shape(node)))[:-1]
    starts = [0, *(piece.stop for piece in pieces)]
    return all(
        piece.start == start
        and tuple(map(int, values.shape(piece.source))) == (*before, piece.stop - start)
        and values.dtype(piece.source) == values.dtype(node)
        for piece, start in zip(pieces, starts, strict=False)
    ) and starts[-1] == values.width(node)
