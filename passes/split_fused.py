"""split-fused: one linear per purpose, and one form for splitting and merging heads.

    view(linear(x, W)), transpose                      -> split_heads(linear(x, W))
    chunk / slice / view of a fused linear (qkv, gate_up) -> one linear per piece, with the rows that the piece reads; of experts too
    transpose, reshape of an attention's output         -> merge_heads(attention)

Which rows a piece reads is found by running the view operators on row numbers, so any layout of fused rows is understood,
interleaved ones too. Rows are copied, never changed: the pass is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.frontend.experts import is_flattened
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import argument, operands, set_argument, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, evaluate, is_call, replace
from resq_compiler.ir.views import Linear
from resq_compiler.pipeline.passes import Pass, PassContext

LINEAR = aten.linear.default
OF_HEADS = (ops.rms_norm, aten.layer_norm.default, ops.rope)
"""What works on the columns of a head, whatever the order of the other dimensions."""


@dataclass(frozen=True)
class Piece:
    """A value made of some rows of a linear: rows [H, D] for `heads` (of layout "bhsd" or "bshd"), or [n] without."""

    node: Node
    rows: Tensor
    layout: str


@dataclass(frozen=True)
class SplitFused(Pass):
    """Split fused linears; name split_heads and merge_heads."""

    name: ClassVar[str] = "split-fused"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        env = dict(zip(graph_tools.placeholders(gm.graph), ctx.example_inputs, strict=True))
        done = 0
        for node in list(gm.graph.nodes):
            if is_call(node, ops.expert_linear):
                done += split_experts(gm, node, env)
            elif is_root(node):
                done += split_root(gm, node, env)
            elif is_call(node, ops.attention):
                done += merge(gm, node, env)
        gm.graph.eliminate_dead_code()
        done += move_transposes(gm)
        graph_tools.delete_unused_tensors(gm)
        return done


def is_root(node: Node) -> bool:
    """What heads are split from: a linear, a full-width norm of one, or a scaled one; only linears may be fused."""
    if is_call(node, LINEAR):
        return True
    scaled = is_call(node, aten.mul.Tensor) and is_call(operands(node)[0], LINEAR)
    return (scaled or is_call(node, ops.rms_norm, aten.layer_norm.default)) and len(values.shape(node)) == 3


def frontier(root: Node) -> list[Node]:
    """The values that view operators make of root and that something else consumes."""
    found, pending, seen = [], [root], {root}
    while pending:
        node = pending.pop(0)
        if serves_one_purpose(node):
            found.append(node)
            continue
        consumed = False
        for user in node.users:
            if is_call(user, *VIEW_OPS) and source(user) is node and not _every_other(user) and not is_flattened(user):
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
            else:
                consumed = True
        if consumed and not isinstance(values.value(node), (tuple, list)):
            found.append(node)
    return found


def serves_one_purpose(node: Node) -> bool:
    """True for heads whose channels are taken apart only to meet again: a rotary embedding of some of them, not a fused linear."""
    value = values.value(node)
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    width = value.shape[-1]
    slices = [
        u
        for u in node.users
        if is_call(u, aten.slice.Tensor) and argument(u, "dim") in (-1, 3) and values.width(u) < width
    ]
    return len(slices) > 1 and len(purposes(node)) == 1


def purposes(node: Node) -> set[tuple[Node, int]]:
    """What a value is made for: operands of attentions and of linears."""
    found, pending, seen = set[tuple[Node, int]](), [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if is_call(user, ops.attention, LINEAR):
                found.add((user, user.args.index(current)))
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return found


def _every_other(node: Node) -> bool:
    """x[..., 0::2]: pairs of a rotary embedding, not a part of a fused linear."""
    return is_call(node, aten.slice.Tensor) and argument(node, "step") != 1


def numbered(shape: torch.Size) -> Tensor:
    """Integers that number every element of a tensor."""
    return torch.arange(math.prod(shape)).reshape(shape)


def piece_of(gm: GraphModule, node: Node, root: Node, env: dict[Node, Tensor]) -> Piece | None:
    """The rows that `node` reads of root [B, S, N], or None if it does not keep batch and tokens apart."""
    batch, tokens, width = values.shape(root)
    value = evaluate(gm, node, {**env, root: numbered(values.shape(root))})
    rows = value % width
    position = value // width
    expected = torch.arange(batch * tokens).reshape(batch, tokens)
    if value.dim() == 3 and value.shape[:2] == (batch, tokens):
        ok = torch.equal(position, expected[:, :, None].expand_as(value))
        return Piece(node, rows[0, 0], "bsn") if ok else None
    if value.dim() != 4 or value.shape[0] != batch:
        return None
    if value.shape[2] == tokens and torch.equal(position, expected[:, None, :, None].expand_as(value)):
        return Piece(node, rows[0, :, 0], "bhsd")
    if value.shape[1] == tokens and torch.equal(position, expected[:, :, None, None].expand_as(value)):
        return Piece(node, rows[0, 0], "bshd")
    return None


def split_root(gm: GraphModule, root: Node, env: dict[Node, Tensor]) -> int:
    """Rewrite the pieces of one linear (or full-width norm) into linears of their own and split_heads."""
    nodes = [n for n in frontier(root) if n is not root]
    if not nodes:
        return 0
    shape = tuple(values.shape(root))
    if len(shape) != 3:
        raise TopologyError(
            f"node {root.name} ({graph_tools.module_of(root)}): expected a linear on [batch, tokens, features], got {shape} (experts?)",
            node=root.name,
        )
    pieces = [piece_of(gm, n, root, env) for n in nodes]
    width = values.width(root)
    whole = [p is not None and torch.equal(p.rows.flatten(), torch.arange(width)) for p in pieces]
    if not is_call(root, LINEAR) and not all(whole):
        return 0
    if any(p is None for p in pieces):
        raise TopologyError(
            f"node {nodes[0].name}: expected heads or slices of the output features of {root.name}; the views between mix tokens or rows",
            node=nodes[0].name,
        )
    for i, piece in enumerate(pieces):
        assert piece is not None
        source = root if whole[i] else part_linear(gm, root, piece.rows.flatten(), i)
        replace_piece(gm, piece, source)
    return len(pieces)


def split_experts(gm: GraphModule, root: Node, env: dict[Node, Tensor]) -> int:
    """Linears of experts for each stretch, or every other one, of the features of a fused one [B, S, k, N]."""
    pieces = [user for user in root.users if is_call(user, *VIEW_OPS)]
    pieces = [p for user in pieces for p in (user.users if isinstance(values.value(user), (tuple, list)) else (user,))]
    numbers, width = numbered(values.shape(root)), values.width(root)
    for i, piece in enumerate(pieces):
        value = evaluate(gm, piece, {**env, root: numbers})
        rows = value[0, 0, 0] % width
        if value.dim() != 4 or not torch.equal(value, numbers[..., rows]):
            raise TopologyError(
                f"node {piece.name} ({graph_tools.module_of(piece)}): expected some features of all experts of {root.name}, got "
                f"{piece.format_node()}",
                node=piece.name,
            )
        replace(piece, part_linear(gm, root, rows, i))
    return len(pieces)


def part_linear(gm: GraphModule, node: Node, rows: Tensor, index: int) -> Node:
    """A linear with some rows of a fused one."""
    linear, rows = Linear.require(node), rows.to("cpu")
    *experts, _, columns = linear.weight_shape(gm)
    name, shape = f"{linear.name}.split{index}", (*experts, len(rows), columns)
    weight = graph_tools.derive_tensor(
        gm, linear.weight, f"{name}.weight", lambda w: w[..., rows, :], shape, SplitFused.name, linear.of_experts
    )
    parts = [weight]
    if (bias := linear.bias_tensor(gm)) is not None:
        parts.append(graph_tools.add_tensor(gm, f"{name}.bias", bias[..., rows], SplitFused.name))
    with gm.graph.inserting_after(node):
        return linear.like(gm.graph, linear.x, parts[0], parts[1] if len(parts) > 1 else None, SplitFused.name)


def replace_piece(gm: GraphModule, piece: Piece, source: Node) -> None:
    """Give the readers of a piece the same value made from `source` alone."""
    graph, new = gm.graph, source
    if piece.layout != "bsn":
        with graph.inserting_after(source):
            new = emit(graph, ops.split_heads, (source, piece.rows.shape[0]), piece.node, SplitFused.name)
    if piece.layout == "bshd":
        with graph.inserting_after(new):
            new = emit(graph, aten.transpose.int, (new, 1, 2), piece.node, SplitFused.name)
    replace(piece.node, new)


def merge(gm: GraphModule, root: Node, env: dict[Node, Tensor]) -> int:
    """The views from an attention's output [B, H, S, D] to the next linear are merge_heads."""
    if all(is_call(user, ops.merge_heads) for user in root.users):
        return 0
    done = 0
    index = numbered(values.shape(root))
    for node in frontier(root):
        if not torch.equal(evaluate(gm, node, {**env, root: index}), ops.merge_heads(index)):
            raise TopologyError(
                f"node {node.name}: expected the heads of {root.name} merged to [B, S, H·D]; it computes something else",
                node=node.name,
            )
        with gm.graph.inserting_after(root):
            new = emit(gm.graph, ops.merge_heads, (root,), node, SplitFused.name)
        replace(node, new)
        done += 1
    return done


def move_transposes(gm: GraphModule) -> int:
    """norm(transpose(x)) -> transpose(norm(x)), rope too, and two transposes that meet are none: heads before tokens, [B, H, S, D].

    Norms of heads and rotary embeddings do not care for the order of the other dimensions.
    """
    done, tables = 0, dict[Node, Node]()
    for node in list(gm.graph.nodes):
        if is_call(node, *OF_HEADS) and turns_tokens_and_heads(source(node)) and has_heads_first(source(source(node))):
            move_behind(gm, node, tables)
            done += 1
        elif turns_tokens_and_heads(node) and turns_tokens_and_heads(source(node)):
            replace(node, source(source(node)))
            done += 1
    gm.graph.eliminate_dead_code()
    return done


def has_heads_first(node: Node) -> bool:
    """[B, H, S, D]: split heads, behind norms of them and rotary embeddings."""
    while is_call(node, *OF_HEADS):
        node = source(node)
    return is_call(node, ops.split_heads)


def move_behind(gm: GraphModule, node: Node, tables: dict[Node, Node]) -> None:
    """Let a norm or a rotary embedding work on what was transposed for it. tables: cosines and sines that lie as the others do by now."""
    users, turn = list(node.users), source(node)
    set_argument(node, "input" if is_call(node, aten.layer_norm.default) else "x", source(turn))
    if is_call(node, ops.rope):
        for name in ("cos", "sin"):
            table = argument(node, name)
            if table not in tables:
                with gm.graph.inserting_after(table):
                    tables[table] = emit(gm.graph, aten.transpose.int, (table, 1, 2), table, SplitFused.name)
            set_argument(node, name, tables[table])
    values.forget(node)
    with gm.graph.inserting_after(node):
        turned = emit(gm.graph, aten.transpose.int, (node, 1, 2), node, SplitFused.name)
    for user in users:
        user.replace_input_with(node, turned)


def turns_tokens_and_heads(node: Node) -> bool:
    """transpose(x, 1, 2)"""
    return is_call(node, aten.transpose.int) and (argument(node, "dim0"), argument(node, "dim1")) == (1, 2)
