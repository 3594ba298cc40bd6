"""fuse-projections: multiply every transform that meets a linear, an embedding or a norm into its weight, in float64.

    T(linear(x, W, b))                       -> linear(x, Tᵀ W, b T)
    T(embedding(E))                          -> embedding(E T)
    T(norm(x, g, b))                         -> norm(x, g T, b T)                  channels scaled or permuted
    T(split_heads(linear(x, W)))             -> split_heads(linear(x, Tᵀ W))       a rotation of heads
    T(f(x) * linear(x, W))                   -> f(x) * linear(x, Tᵀ W)             channels scaled; through relu if by positive numbers
    linear(T⁻¹(x), W)                        -> linear(x, W T⁻ᵀ)
    linear(merge_heads(T⁻¹(x)), W)           -> linear(merge_heads(x), W T⁻ᵀ)

What meets none of these stays an operator of the graph (online): U_C, the Hadamard transform itself, U_A in post-norm models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import operands, set_argument, source
from resq_compiler.ir.graph_tools import aten, is_call, only_user, replace
from resq_compiler.ir.promises import Around
from resq_compiler.ir.transforms import TARGETS, Transforms
from resq_compiler.ir.views import Embedding, Linear, Norm, SplitHeads
from resq_compiler.numerics.float64 import by_column_chunks, each
from resq_compiler.numerics.transforms import HeadRotation, Scaling, Transform
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.util import devices, memory

_copies: WeakKeyDictionary[Transform, tuple[torch.device, Transform]] = WeakKeyDictionary()
"""Transforms on the device that computes, as long as a weight is to go through them."""


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Fuse transforms into weights. online "refused": one that meets no weight, though nothing says that it may stay, is an error."""

    name: ClassVar[str] = "fuse-projections"

    online: Literal["allowed", "refused"] = "allowed"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        known = ctx.facts.find(Transforms) or Transforms()
        found = [n for n in gm.graph.nodes if is_call(n, *TARGETS) and meta.get(n, meta.Projection) is not None]
        left, before = found, None
        while left != before:  # an inverse may meet a linear only once the one behind it is gone
            left, before = [n for n in left if not fuse(gm, n, known)], left
        if self.online == "refused" and (stuck := [n for n in left if may_fuse(n)]):
            raise PassError(
                f"node {stuck[0].name}: this recipe asks for transforms that cost nothing at run time, and this one meets no "
                f"weight: {stuck[0].format_node()}; say online=allowed, or leave the transform out",
                node=stuck[0].name,
            )
        gm.graph.eliminate_dead_code()
        graph_tools.delete_unused_tensors(gm)
        return len(found) - len(left)


def may_fuse(node: Node) -> bool:
    """Whether nothing says that a transform stays an operator."""
    fact = meta.require(node, meta.Projection)
    return fact.basis != "U_C" and not fact.online


def fuse(gm: GraphModule, node: Node, known: Transforms) -> bool:
    """Fuse one transform if it meets a weight on the side where it can."""
    if not may_fuse(node):
        return False
    transform, inverse = known.of(gm, node), meta.require(node, meta.Projection).inverse
    fused = fuse_inverse(gm, node, transform) if inverse else fuse_forward(gm, node, transform)
    if fused:
        known.exact.pop(node, None)
        replace(node, source(node))
        memory.trim()  # the weights before
    return fused


def fuse_forward(gm: GraphModule, node: Node, transform: Transform) -> bool:
    """Into the weight that makes the value, if nothing else reads it."""
    x = source(node)
    if isinstance(transform, HeadRotation):
        split = SplitHeads.of(x)
        if split is None or only_user(x) is None:
            return False
        x = split.x
    if isinstance(transform, Scaling) and only_user(x) is not None:
        x = scaled_factor(x, bool((transform.s > 0).all())) or x
    if only_user(x) is None:
        return False
    return write(gm, x, transform)


def scaled_factor(x: Node, positive: bool) -> Node | None:
    """The linear whose outputs a scale of channels may go into: one factor of a product, or what a relu follows if it is positive."""
    if is_call(x, aten.mul.Tensor):
        return next((factor for factor in reversed(operands(x)) if Linear.of(factor) is not None), None)
    return source(x) if positive and is_call(x, aten.relu.default) and Linear.of(source(x)) is not None else None


def write(gm: GraphModule, x: Node, transform: Transform) -> bool:
    """Let a linear, an embedding, or a norm whose channels are not mixed, write x T in place of x; False where x is none of these."""
    embedding, linear, norm = Embedding.of(x), Linear.of(x), Norm.of(x)
    if embedding is not None:
        embedding.change_rows(gm, there(transform, type(transform).forward))
    elif linear is not None:
        change_outputs(gm, linear, transform)
    elif norm is not None and norm.gain is not None and transform.elementwise:
        change_norm(gm, norm, transform)
    else:
        return False
    return True


def there(transform: Transform, apply: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What the transform makes of a weight or value, computed on the device that computes then; back where that lies."""

    def change(weight: Tensor) -> Tensor:
        device = devices.current()
        if device is None:
            return apply(transform, weight)
        if _copies.get(transform, (None,))[0] != device:
            _copies[transform] = device, transform.to(device)
        return apply(_copies[transform][1], devices.here(weight)).to(weight.device)

    return change


def fuse_inverse(gm: GraphModule, node: Node, transform: Transform) -> bool:
    """Into all linears that read the value."""
    merged = only_user(node)
    readers = list((merged if is_call(node, ops.project_heads) and is_call(merged, ops.merge_heads) else node).users)
    linears = [linear for reader in readers if (linear := Linear.of(reader)) is not None]
    if not linears or len(linears) < len(readers):
        return False
    for linear in linears:
        around = Around(before=there(transform, type(transform).inverse))
        linear.change_rows(gm, there(transform, type(transform).into_inputs), around)
    return True


def change_outputs(gm: GraphModule, linear: Linear, transform: Transform) -> None:
    """W <- Tᵀ W and b <- b T, of each expert where there are several."""

    into = there(transform, type(transform).into_outputs)

    def change(value: Tensor) -> Tensor:
        return into(value.double()).to(value.dtype)

    def change_columns(weight: Tensor) -> Tensor:
        return by_column_chunks(weight, change)

    bias = linear.bias_tensor(gm)
    if linear.of_experts:
        linear.change_experts(gm, lambda w, _: each(w, change_columns))
    else:
        linear.change_weight(gm, change_columns, Around(after=there(transform, type(transform).forward)))
    if bias is not None:
        linear.set_bias(gm, each(bias, change) if linear.of_experts else change(bias), FuseProjections.name)


def change_norm(gm: GraphModule, norm: Norm, transform: Transform) -> None:
    """g <- g T and b <- b T, under names of their own: other norms may share the tensors."""
    for name, tensor in (("weight", norm.gain), ("bias", norm.bias)):
        if tensor is not None:
            value = graph_tools.get_tensor(gm, tensor)
            changed = transform.forward(value.double()).to(value.dtype)
            target = f"resq.{norm.node.name}.fused_{name}"
            if str(tensor.target) == target:
                graph_tools.set_tensor(gm, target, changed)
            else:
                set_argument(norm.node, name, graph_tools.add_tensor(gm, target, changed, FuseProjections.name))
