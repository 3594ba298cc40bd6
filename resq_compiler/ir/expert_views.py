"""Views of what a mixture of experts has beside its linears (views.Linear, views.CodedLinear)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import node_arg, tensor_arg
from resq_compiler.ir.views import CodedLinear, Linear, View
from resq_compiler.numerics.quantized import column_scales

IMAGE = 2**17  # numbers of a float image at a time: half a megabyte, which the heap and the caches of a CPU hold


def matrices(gm: GraphModule, linear: Linear | CodedLinear) -> Iterator[Tensor]:
    """The weight [N, K] of a linear, or those of experts, each made when it is asked for; the float image of codes."""
    if isinstance(linear, Linear):
        if linear.of_experts:
            yield from (matrix_of(gm, linear, expert) for expert in range(int(values.shape(linear.weight)[0])))
        else:
            yield linear.weight_tensor(gm)
        return
    codes, scales = linear.codes(gm), linear.scales(gm)
    for code, scale in zip(codes, scales, strict=True) if linear.of_experts else ((codes, scales),):
        yield code * column_scales(scale, code.shape[-1], linear.group_size)


def pieces(gm: GraphModule, linear: Linear | CodedLinear) -> Iterator[Tensor]:
    """`matrices` some rows at a time where there is only one: that of lm_head is large, and float images are four times their codes."""
    if linear.of_experts:
        yield from matrices(gm, linear)
    elif isinstance(linear, Linear):
        yield from graph_tools.pieces(gm, linear.weight)
    else:
        codes, scales = linear.codes(gm), linear.scales(gm)
        rows = max(1, IMAGE // codes.shape[1])
        for some, scale in zip(codes.split(rows), scales.split(rows), strict=True):
            yield some * column_scales(scale, some.shape[1], linear.group_size)


def matrix_of(gm: GraphModule, linear: Linear, expert: int) -> Tensor:
    """The weight [N, K] of one expert, without those of the others."""
    matrix: Tensor = graph_tools.rows_of(graph_tools.held(gm, linear.weight), torch.tensor([expert]))[0]
    return matrix


@dataclass(frozen=True)
class CombineExperts(View):
    """The sum of a token's choices, weighted by its router: y [B, S, k, N]."""

    targets = (ops.combine_experts,)
    y: Node
    weights: Node

    @classmethod
    def read(cls, node: Node) -> CombineExperts:
        return cls(node, node_arg(node, "y"), node_arg(node, "weights"))


@dataclass(frozen=True)
class ExpertBias(View):
    """x [B, S, k, N] plus the bias [E, N] of each choice's expert."""

    targets = (ops.add_expert_bias,)
    x: Node
    bias: Node
    indices: Node

    @classmethod
    def read(cls, node: Node) -> ExpertBias:
        return cls(node, node_arg(node, "x"), tensor_arg(node, "bias"), node_arg(node, "indices"))

    def bias_tensor(self, gm: GraphModule) -> Tensor:
        """[E, N]"""
        return graph_tools.get_tensor(gm, self.bias)
