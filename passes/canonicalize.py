"""canonicalize: drop what torch.export leaves behind and name norms, rotary embeddings (frontend/composites.py) and mixtures of experts
(frontend/experts.py).

    reshape(index_select(W, 0, reshape(ids)))                            -> embedding(W, ids)
    norm(embedding(W, ids))                                              -> embedding(norm(W), ids)
    linear(x / number, W)                                                -> linear(x, W) / number
Values computed from one-dimensional weights alone, such as Gemma's 1 + w, become tensors of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from resq_compiler.errors import CaptureError, CheckpointError
from resq_compiler.frontend.composites import WHOLE, name_composites
from resq_compiler.frontend.experts import name_experts
from resq_compiler.ir import graph_tools, serialize, values
from resq_compiler.ir.args import argument, operands, set_argument, source
from resq_compiler.ir.graph_tools import VIEW_OPS, aten, emit, is_call, only_user, replace, rewrite
from resq_compiler.ir.views import Embedding, Norm
from resq_compiler.pipeline.passes import Pass, PassContext

IDENTITY = {
    aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default, aten.alias.default, aten.contiguous.default,
    aten.clone.default, aten.dropout.default,
}  # fmt: skip
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default}
OUT_OF_PLACE: dict[object, Callable] = {
    aten.add_.Tensor: aten.add.Tensor, aten.mul_.Tensor: aten.mul.Tensor, aten.div_.Tensor: aten.div.Tensor,
    aten.silu_.default: aten.silu.default, aten.relu_.default: aten.relu.default, aten.scatter_.value: aten.scatter.value,
}  # fmt: skip


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drop export noise; name rms_norm, rope and the linears of experts."""

    name: ClassVar[str] = "canonicalize"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        done = drop_noise(gm) + drop_mutation(gm) + name_products(gm)
        for node in list(gm.graph.find_nodes(op="call_function", target=aten.addmm.default)):
            done += match_addmm(gm, node)
        done += name_lookups(gm) + keep_token_dimensions(gm) + scale_behind_linears(gm)
        done += fold_constants(gm) + name_experts(gm, self.name)
        named, misses = name_composites(gm, self.name)
        ctx.lines += misses
        gm.graph.eliminate_dead_code()
        check_can_be_kept(gm)
        return done + named + fold_embedding_norms(gm) + merge_equal(gm)


def check_can_be_kept(gm: GraphModule) -> None:
    """Raise CaptureError for an operator that a saved model cannot have, such as one that writes into its arguments."""
    try:
        serialize.check_readable(gm.graph)
    except CheckpointError as error:
        (node,) = (n for n in gm.graph.nodes if n.name == error.node)
        raise CaptureError(
            f"node {node.name}: {graph_tools.target_text(node.target)} cannot be saved; expected operators that compute new values from "
            "values, not ones that write into an argument",
            node=node.name,
        ) from error


def drop_noise(gm: GraphModule) -> int:
    """Remove nodes that return their input unchanged, and assertions."""
    done = 0
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
            done += 1
        elif _returns_its_input(node):
            replace(node, source(node))
            done += 1
    return done


def drop_mutation(gm: GraphModule) -> int:
    """Make views that copy where they must, and in-place arithmetic on a value that nothing else reads out of place.

    Without `contiguous` a view may meet any strides; reshape takes them all.
    """
    done = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        if is_call(node, aten.view.default):
            node.target = aten.reshape.default
            done += 1
        elif is_call(node, *OUT_OF_PLACE) and is_last_reader(node, order) and not is_view(source(node)):
            node.target = OUT_OF_PLACE[node.target]
            done += 1
    return done


def is_last_reader(node: Node, order: Mapping[Node, int]) -> bool:
    """Nothing reads what a call works on after it."""
    return all(order[user] <= order[node] for user in source(node).users)


def is_view(node: Node) -> bool:
    """It shares memory with another value; one of several results of an operator that is no view shares none."""
    if is_call(node, operator.getitem):
        return is_view(source(node))
    return is_call(node, *VIEW_OPS)


def name_products(gm: GraphModule) -> int:
    """matmul(x, transpose(W)) -> linear(x, W)"""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.matmul.default)):
        x, turned = operands(node)
        if is_call(turned, aten.numpy_T.default, aten.t.default) and source(turned).op == "get_attr":
            rewrite(node, aten.linear.default, (x, source(turned)), Canonicalize.name)
            done += 1
    return done


def name_lookups(gm: GraphModule) -> int:
    """reshape(index_select(W, 0, reshape(ids, [-1])), [B, S, d]) -> embedding(W, ids)"""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.index_select.default)):
        table, flat, back = source(node), argument(node, "index"), only_user(node)
        if table.op != "get_attr" or argument(node, "dim") != 0 or not is_call(flat, aten.reshape.default):
            continue
        if back is None or not is_call(back, aten.reshape.default):
            continue
        ids = source(flat)
        if len(values.shape(ids)) == 2 and values.shape(back) == (*values.shape(ids), values.width(node)):
            rewrite(back, aten.embedding.default, (table, ids), Canonicalize.name)
            done += 1
    return done


def scale_behind_linears(gm: GraphModule) -> int:
    """linear(x / number, W) -> linear(x, W) / number: logits are scaled, and lm_head reads the norm."""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.linear.default)):
        scaled = source(node)
        if not is_call(scaled, aten.div.Tensor, aten.mul.Tensor) or len(scaled.users) > 1:
            continue
        x, factor = operands(scaled)
        if not isinstance(x, Node) or not isinstance(factor, (int, float)) or argument(node, "bias") is not None:
            continue
        with gm.graph.inserting_before(node):
            linear = emit(gm.graph, aten.linear.default, (x, argument(node, "weight")), node, Canonicalize.name)
        target = aten.div.Tensor if is_call(scaled, aten.div.Tensor) else aten.mul.Tensor
        rewrite(node, target, (linear, factor), Canonicalize.name)
        done += 1
    return done


def match_addmm(gm: GraphModule, node: Node) -> int:
    """addmm(bias, x, W) -> linear(x, Wᵀ, bias), as the Conv1D layers of GPT-2 want it."""
    bias, x, weight = (argument(node, name) for name in ("self", "mat1", "mat2"))
    if node.kwargs or any(not isinstance(t, Node) or t.op != "get_attr" for t in (bias, weight)):
        return 0
    nodes = [n for n in gm.graph.find_nodes(op="get_attr") if n.target == weight.target]
    if nodes != [weight] or len(weight.users) != 1:
        return 0
    shape = graph_tools.held(gm, weight).shape[::-1]
    graph_tools.change_tensor(gm, weight, lambda w: w.t().contiguous(), shape)
    values.forget(weight)
    rewrite(node, aten.linear.default, (x, weight, bias), Canonicalize.name)
    return 1


def _returns_its_input(node: Node) -> bool:
    if is_call(node, *IDENTITY):
        return True
    if is_call(node, aten.mul.Tensor):
        factor = operands(node)[1]
        return isinstance(factor, float) and factor == 1.0
    if is_call(node, *CASTS):
        before, after = values.value(source(node)), values.value(node)
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    if is_call(node, aten.slice.Tensor):
        start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
        return start in (0, None) and stop in (WHOLE, None) and step == 1
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
            replace(node, first)
            done += 1
    return done


ROW_WISE = {
    aten.linear.default, aten.layer_norm.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.add.Tensor,
    aten.mul.Tensor, aten.tanh.default, aten.sigmoid.default, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default,
}  # fmt: skip


def keep_token_dimensions(gm: GraphModule) -> int:
    """Undo reshape([B, S, d] -> [B·S, d]) and back where all operators between work on the last dimension alone."""
    flat = [n for n in gm.graph.nodes if _reshapes(n, 3, 2)]
    region, pending, ends = dict[Node, None](), list(flat), set[Node]()
    while pending:
        node = pending.pop()
        for user in node.users:
            if _reshapes(user, 2, 3):
                ends.add(user)
            elif not is_call(user, *ROW_WISE):
                return 0
            elif user not in region:
                region[user] = None
                pending.append(user)
    for node in {*flat, *ends}:
        replace(node, source(node))
    values.forget(*region)
    return len(flat)


def _reshapes(node: Node, before: int, after: int) -> bool:
    if not is_call(node, aten.view.default, aten.reshape.default):
        return False
    old, new = values.shape(source(node)), values.shape(node)
    return len(old) == before and len(new) == after and old[-1] == new[-1]


def fold_constants(gm: GraphModule) -> int:
    """Replace arithmetic on one-dimensional weights alone by a new tensor."""
    done = 0
    for node in list(gm.graph.nodes):
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or any(n.op != "get_attr" for n in inputs):
            continue
        tensors = [graph_tools.held(gm, n) for n in inputs]
        if any(not isinstance(t, Tensor) or t.dim() > 1 for t in tensors) or is_call(node, aten.embedding.default):
            continue
        value = graph_tools.run_node(gm, node, dict(zip(inputs, tensors, strict=True)))
        replace(node, graph_tools.add_tensor(gm, f"{inputs[0].target}_{node.name}", value, Canonicalize.name))
        done += 1
    return done


def fold_embedding_norms(gm: GraphModule) -> int:
    """norm(embedding(W, ids)) -> embedding(norm(W), ids): the norm of a row is the row of the norm."""
    done = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        embedding, norm = Embedding.of(node), Norm.of(only_user(node))
        if embedding is None or norm is None or norm.x is not node:
            continue
        gains = {n: graph_tools.get_tensor(gm, n) for n in norm.node.all_input_nodes if n is not node}
        name = f"{str(embedding.table.target).removesuffix('.weight')}.normed.weight"
        change, shape = norm_of(norm.node, node, gains), graph_tools.held(gm, embedding.table).shape
        table = graph_tools.derive_tensor(gm, embedding.table, name, change, shape, Canonicalize.name)
        set_argument(node, "weight", table)
        replace(norm.node, node)
        done += 1
    return done


def norm_of(norm: Node, x: Node, gains: Mapping[Node, Tensor]) -> Callable[[Tensor], Tensor]:
    """A norm as a function of what it reads at x; it does not need the node to stay in the graph."""
    target, args, kwargs = norm.target, norm.args, norm.kwargs
    assert callable(target)

    def change(rows: Tensor) -> Tensor:
        env = {**gains, x: rows}
        value: Tensor = target(*map_arg(args, env.__getitem__), **map_arg(kwargs, env.__getitem__))
        return value

    return change
