"""canonicalize: drop what torch.export leaves behind and name the composites rms_norm and rope.

    mul(weight, mul(x, rsqrt(add(mean(pow(x, 2), -1), eps))))            -> rms_norm(x, weight, eps)
    the same on x = y - mean(y, -1)                                      -> layer_norm(y, weight)
    add(mul(x, cos), mul(cat(neg(x[h:]), x[:h]), sin))                   -> rope(x, cos, sin)
    cat(rope(x[:r], cos, sin), x[r:])   (partial rotary)                 -> rope(x, cos, sin) with cos narrower than x
    reshape(index_select(W, 0, reshape(ids)))                            -> embedding(W, ids)
    norm(embedding(W, ids))                                              -> embedding(norm(W), ids)
Values computed from one-dimensional weights alone, such as Gemma's 1 + w, become tensors of their own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, is_call
from resq_compiler.pipeline.passes import Pass, PassContext

IDENTITY = {
    aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
    aten.clone.default, aten.dropout.default,
}  # fmt: skip
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default}
OUT_OF_PLACE = {
    aten.add_.Tensor: aten.add.Tensor, aten.mul_.Tensor: aten.mul.Tensor, aten.div_.Tensor: aten.div.Tensor,
    aten.silu_.default: aten.silu.default, aten.relu_.default: aten.relu.default,
}  # fmt: skip
WHOLE = sys.maxsize


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop export noise; name rms_norm and rope."""

    name: ClassVar[str] = "canonicalize"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        done = drop_noise(gm) + drop_mutation(gm) + name_products(gm)
        for node in list(gm.graph.find_nodes(op="call_function", target=aten.addmm.default)):
            done += match_addmm(gm, node)
        done += name_lookups(gm) + keep_token_dimensions(gm)
        done += fold_constants(gm)
        for match in (match_rms_norm, match_rope, match_partial_rope):
            for node in list(gm.graph.find_nodes(op="call_function", target=ROOTS[match])):
                done += match(gm, node)
        gm.graph.eliminate_dead_code()
        done += fold_embedding_norms(gm)
        return done + merge_equal(gm)


def drop_noise(gm: GraphModule) -> int:
    """Remove nodes that return their input unchanged, and assertions."""
    done = 0
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
            done += 1
        elif _returns_its_input(gm, node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            done += 1
    return done


def drop_mutation(gm: GraphModule) -> int:
    """Make views that copy where they must, and in-place arithmetic on a value that nothing else reads out of place.

    Without `contiguous` a view may meet any strides; reshape takes them all.
    """
    done = 0
    for node in gm.graph.nodes:
        if is_call(node, aten.view.default):
            node.target = aten.reshape.default
            done += 1
        elif is_call(node, *OUT_OF_PLACE) and len(node.args[0].users) == 1 and not is_call(node.args[0], *VIEW_OPS):
            node.target = OUT_OF_PLACE[node.target]
            done += 1
    return done


def name_products(gm: GraphModule) -> int:
    """matmul(x, transpose(W)) -> linear(x, W)"""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.matmul.default)):
        x, turned = node.args
        if not is_call(turned, aten.numpy_T.default, aten.t.default) or turned.args[0].op != "get_attr":
            continue
        with gm.graph.inserting_after(node):
            new = emit(gm.graph, aten.linear.default, (x, turned.args[0]), node, Canonicalize.name)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        done += 1
    return done


def name_lookups(gm: GraphModule) -> int:
    """reshape(index_select(W, 0, reshape(ids, [-1])), [B, S, d]) -> embedding(W, ids)"""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.index_select.default)):
        table, dim, flat = node.args
        back = only_user(node)
        if (
            dim != 0
            or table.op != "get_attr"
            or not is_call(flat, aten.reshape.default)
            or not is_call(back, aten.reshape.default)
        ):
            continue
        ids = flat.args[0]
        if len(ids.meta["val"].shape) != 2 or back.meta["val"].shape != (
            *ids.meta["val"].shape,
            node.meta["val"].shape[-1],
        ):
            continue
        with gm.graph.inserting_after(back):
            new = emit(gm.graph, aten.embedding.default, (table, ids), node, Canonicalize.name)
        new.meta["val"] = back.meta["val"]
        back.replace_all_uses_with(new)
        gm.graph.erase_node(back)
        done += 1
    return done


def match_addmm(gm: GraphModule, node: Node) -> int:
    """addmm(bias, x, W) -> linear(x, Wᵀ, bias), as the Conv1D layers of GPT-2 want it."""
    bias, x, weight = node.args
    nodes = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == getattr(weight, "target", None)]
    if node.kwargs or bias.op != "get_attr" or weight.op != "get_attr" or nodes != [weight] or len(weight.users) != 1:
        return 0
    turned = graph_tools.get_tensor(gm, weight).t().contiguous()
    graph_tools.set_tensor(gm, str(weight.target), turned)
    weight.meta["val"] = turned
    with gm.graph.inserting_after(node):
        new = emit(gm.graph, aten.linear.default, (x, weight, bias), node, Canonicalize.name)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return 1


def _returns_its_input(gm: GraphModule, node: Node) -> bool:
    if is_call(node, *IDENTITY):
        return True
    if is_call(node, aten.mul.Tensor) and node.args[1] == 1.0 and isinstance(node.args[1], float):
        return True
    if is_call(node, *CASTS):
        before, after = value_of(gm, node.args[0]), node.meta.get("val")
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    if is_call(node, aten.slice.Tensor):
        start, stop = (*node.args, 0, WHOLE)[2:4] if len(node.args) > 2 else (0, WHOLE)
        return start in (0, None) and (stop is None or stop == WHOLE) and (len(node.args) < 5 or node.args[4] == 1)
    return False


def merge_equal(gm: GraphModule) -> int:
    """Compute equal calls once (rotary tables are made again for every layer)."""
    seen: dict[str, Node] = {}
    done = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        first = seen.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            done += 1
    return done


def value_of(gm: GraphModule, node: object) -> object:
    """The (fake) value of a node."""
    if isinstance(node, Node) and node.op == "get_attr":
        return graph_tools.get_tensor(gm, node)
    return node.meta.get("val") if isinstance(node, Node) else node


ROW_WISE = {
    aten.linear.default, aten.layer_norm.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.add.Tensor,
    aten.mul.Tensor, aten.tanh.default, aten.sigmoid.default, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default,
}  # fmt: skip


def keep_token_dimensions(gm: GraphModule) -> int:
    """Undo reshape([B, S, d] -> [B·S, d]) and back where all operators between work on the last dimension alone."""
    flat = [n for n in gm.graph.nodes if _reshapes(n, 3, 2)]
    region, pending, ends = set(), list(flat), []
    while pending:
        node = pending.pop()
        for user in node.users:
            if _reshapes(user, 2, 3):
                ends.append(user)
            elif not is_call(user, *ROW_WISE):
                return 0
            elif user not in region:
                region.add(user)
                pending.append(user)
    for node in {*flat, *ends}:
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node in region and ends:
            node.meta["val"] = node.meta["val"].unflatten(0, ends[0].meta["val"].shape[:2])
    return len(flat)


def _reshapes(node: Node, before: int, after: int) -> bool:
    if not is_call(node, aten.view.default, aten.reshape.default):
        return False
    old, new = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(old) == before and len(new) == after and old[-1] == new[-1]


def fold_constants(gm: GraphModule) -> int:
    """Replace arithmetic on one-dimensional weights alone by a new tensor."""
    done = 0
    for node in list(gm.graph.nodes):
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or any(n.op != "get_attr" for n in inputs):
            continue
        tensors = [graph_tools.get_tensor(gm, n) for n in inputs]
        if any(not isinstance(t, Tensor) or t.dim() > 1 for t in tensors) or is_call(node, aten.embedding.default):
            continue
        value = graph_tools.run_node(gm, node, dict(zip(inputs, tensors, strict=True)))
        folded = graph_tools.add_tensor(gm, f"{inputs[0].target}_{node.name}", value, Canonicalize.name)
        folded.meta["val"] = value
        node.replace_all_uses_with(folded)
        gm.graph.erase_node(node)
        done += 1
    return done


def fold_embedding_norms(gm: GraphModule) -> int:
    """norm(embedding(W, ids)) -> embedding(norm(W), ids): the norm of a row is the row of the norm."""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        norm, table = only_user(node), node.args[0]
        if (
            not is_call(norm, ops.rms_norm, aten.layer_norm.default)
            or table.op != "get_attr"
            or norm.args[0] is not node
        ):
            continue
        if not all(n is node or n.op == "get_attr" for n in norm.all_input_nodes):
            continue
        tensors = {n: graph_tools.get_tensor(gm, n) for n in norm.all_input_nodes if n is not node}
        value = graph_tools.run_node(gm, norm, {**tensors, node: graph_tools.get_tensor(gm, table)})
        name = f"{str(table.target).removesuffix('.weight')}.normed.weight"
        node.update_arg(0, graph_tools.add_tensor(gm, name, value, Canonicalize.name))
        node.args[0].meta["val"] = value
        norm.replace_all_uses_with(node)
        gm.graph.erase_node(norm)
        done += 1
    return done


def other_operand(node: Node, operand: Node) -> object:
    """The operand of a two-operand node that is not the given one."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def operand_called(node: Node, *targets: object) -> Node | None:
    """The operand of a two-operand node that calls one of the targets."""
    return next((a for a in node.args[:2] if is_call(a, *targets)), None)


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def match_rms_norm(gm: GraphModule, rsqrt: Node) -> int:
    """Root at rsqrt: it must see mean(x²) + eps and be multiplied with the same x."""
    shifted = rsqrt.args[0]
    if not is_call(shifted, aten.add.Tensor) or not isinstance(shifted.args[1], float):
        return 0
    mean, eps = shifted.args[0], shifted.args[1]
    if (
        not is_call(mean, aten.mean.dim)
        or list(mean.args[1]) != [-1]
        or not is_call(mean.args[0], aten.pow.Tensor_Scalar)
    ):
        return 0
    x, exponent = mean.args[0].args[:2]
    normed = only_user(rsqrt)
    if exponent != 2 or not is_call(normed, aten.mul.Tensor):
        return 0
    other, source = other_operand(normed, rsqrt), _centred(x)
    if other is not x and (source is None or _centred(other) is not source):
        return 0
    scaled, weight = only_user(normed), None
    if is_call(scaled, aten.mul.Tensor):
        candidate = other_operand(scaled, normed)
        if (
            isinstance(candidate, Node)
            and candidate.op == "get_attr"
            and graph_tools.get_tensor(gm, candidate).dim() == 1
        ):
            weight = candidate
    last = scaled if weight is not None else normed
    with gm.graph.inserting_after(last):
        if source is None:
            new = emit(gm.graph, ops.rms_norm, (x, weight, eps), normed, Canonicalize.name)
        else:
            shape = [source.meta["val"].shape[-1]]
            args = (source, shape, weight, None, eps)
            new = emit(gm.graph, aten.layer_norm.default, args, normed, Canonicalize.name)
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    return 1


def _centred(x: object) -> Node | None:
    """y where x is y - mean(y) over the last dimension."""
    if not is_call(x, aten.sub.Tensor) or not is_call(x.args[1], aten.mean.dim):
        return None
    y, mean = x.args[0], x.args[1]
    return y if mean.args[0] is y and list(mean.args[1]) == [-1] else None


def _last_dim_slice(node: object, x: object) -> tuple[int, int] | None:
    if not is_call(node, aten.slice.Tensor) or node.args[0] is not x:
        return None
    dim, start, stop = node.args[1:4]
    rank = len(node.args[0].meta["val"].shape)
    return (start, stop) if dim in (-1, rank - 1) else None


def match_rope(gm: GraphModule, node: Node) -> int:
    """Root at the add of x·cos and rotate_half(x)·sin, in either order."""
    for straight, turned in (node.args[:2], node.args[1::-1]):
        if not is_call(straight, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
            continue
        rotated = operand_called(turned, aten.cat.default)
        if rotated is None or len(rotated.args[0]) != 2 or not is_call(rotated.args[0][0], aten.neg.default):
            continue
        upper, lower = rotated.args[0][0].args[0], rotated.args[0][1]
        x = lower.args[0] if is_call(lower, aten.slice.Tensor) else None
        if x is None or x not in straight.args:
            continue
        half = x.meta["val"].shape[-1] // 2
        if _last_dim_slice(lower, x) != (0, half) or _last_dim_slice(upper, x) != (half, WHOLE):
            continue
        cos, sin = other_operand(straight, x), other_operand(turned, rotated)
        with gm.graph.inserting_after(node):
            new = emit(gm.graph, ops.rope, (x, cos, sin), node, Canonicalize.name)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        return 1
    return 0


def match_partial_rope(gm: GraphModule, node: Node) -> int:
    """Root at cat(rope(x[..., :r]), x[..., r:]); x[..., :r] is x itself where r is the whole width."""
    pieces = node.args[0]
    if len(pieces) != 2 or not is_call(pieces[0], ops.rope) or not is_call(pieces[1], aten.slice.Tensor):
        return 0
    head, tail = pieces[0].args[0], pieces[1]
    x, width = tail.args[0], head.meta["val"].shape[-1]
    if head is not x and _last_dim_slice(head, x) != (0, width):
        return 0
    if _last_dim_slice(tail, x) != (width, WHOLE):
        return 0
    with gm.graph.inserting_after(node):
        new = emit(gm.graph, ops.rope, (x, *pieces[0].args[1:]), node, Canonicalize.name)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    return 1


ROOTS = {match_rms_norm: aten.rsqrt.default, match_rope: aten.add.Tensor, match_partial_rope: aten.cat.default}
