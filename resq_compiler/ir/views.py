"""Nodes read as calls of one kind of operator, with arguments that have names and types.

    quantizer = Quantize.of(node)         the view, or None where the node is something else
    quantizer = Quantize.require(node)    the view, or a TopologyError that says why the node is something else
    Quantize.why_not(node)                that sentence alone, None where the node is a quantizer

A view is a look at the graph of this moment: after the node has changed, take another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import (
    argument,
    bool_arg,
    float_arg,
    int_arg,
    node_arg,
    optional_float_arg,
    optional_int_arg,
    optional_node_arg,
    optional_tensor_arg,
    set_argument,
    tensor_arg,
)
from resq_compiler.ir.promises import Around
from resq_compiler.numerics.quantized import QuantizedActivation, column_scales

aten = torch.ops.aten


@dataclass(frozen=True)
class View(ABC):
    """A call of one of `targets`."""

    node: Node
    targets: ClassVar[tuple[Callable[..., Any], ...]]

    @classmethod
    @abstractmethod
    def read(cls, node: Node) -> Self:
        """The view of a call of one of the targets. Raises TopologyError: an argument is not of its kind."""

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The view, or None."""
        try:
            return cls.read(node) if graph_tools.is_call(node, *cls.targets) else None
        except TopologyError:
            return None

    @classmethod
    def require(cls, node: object) -> Self:
        """The view. Raises TopologyError naming the node."""
        if graph_tools.is_call(node, *cls.targets):
            return cls.read(node)
        names = " or ".join(graph_tools.target_text(target) for target in cls.targets)
        if not isinstance(node, Node):
            raise TopologyError(f"expected {names}, got {node!r}")
        raise TopologyError(f"node {node.name}: expected {names}, got {node.format_node()}", node=node.name)

    @classmethod
    def why_not(cls, node: object) -> str | None:
        """Why a node is not this; None where it is."""
        try:
            cls.require(node)
        except TopologyError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Linear(View):
    """x Wᵀ + b with a weight [N, K] and a bias [N] of the model.

    For each expert of a mixture where there are `indices`: weight [E, N, K], bias [E, N]. What is done to one is done to all.
    """

    targets = (aten.linear.default, ops.expert_linear)
    x: Node
    weight: Node
    bias: Node | None
    indices: Node | None = None

    @classmethod
    def read(cls, node: Node) -> Linear:
        weight, bias = tensor_arg(node, "weight"), optional_tensor_arg(node, "bias")
        if node.target is ops.expert_linear:
            return cls(node, node_arg(node, "x"), weight, bias, node_arg(node, "indices"))
        return cls(node, node_arg(node, "input"), weight, bias)

    @property
    def of_experts(self) -> bool:
        """One for each expert of a mixture."""
        return self.indices is not None

    def like(self, graph: Graph, x: Node, weight: Node, bias: Node | None, made_by: str) -> Node:
        """A new linear of the same kind at the graph's insertion point, of the same experts."""
        args: tuple[Node, ...] = (x, weight) if self.indices is None else (x, weight, self.indices)
        target = ops.expert_linear if self.of_experts else aten.linear.default
        return graph_tools.emit(graph, target, args if bias is None else (*args, bias), self.node, made_by)

    @property
    def name(self) -> str:
        """What the linear is called: its module in the model, with `.splitN` where it is some rows of a fused one."""
        return str(self.weight.target).removesuffix(".weight")

    def weight_tensor(self, gm: GraphModule) -> Tensor:
        """[N, K]"""
        return graph_tools.get_tensor(gm, self.weight)

    def weight_shape(self, gm: GraphModule) -> torch.Size:
        """[N, K]"""
        return graph_tools.held(gm, self.weight).shape

    def weight_dtype(self, gm: GraphModule) -> torch.dtype:
        """Type of the weight."""
        return graph_tools.held(gm, self.weight).dtype

    def change_weight(self, gm: GraphModule, change: Callable[[Tensor], Tensor], around: Around | None = None) -> None:
        """W <- change(W), of the same shape."""
        graph_tools.change_tensor(gm, self.weight, change, around=around)

    def change_rows(self, gm: GraphModule, change: Callable[[Tensor], Tensor], around: Around | None = None) -> None:
        """W <- change(W) in float64, for a function of rows, each for itself; rounded once."""
        graph_tools.change_rows(gm, self.weight, change, around)

    def change_experts(self, gm: GraphModule, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """W[i] <- change(W[i], i), for some experts i at a time."""
        graph_tools.change_experts(gm, self.weight, change)

    def bias_tensor(self, gm: GraphModule) -> Tensor | None:
        """[N], or None."""
        return None if self.bias is None else graph_tools.get_tensor(gm, self.bias)

    def set_bias(self, gm: GraphModule, value: Tensor, made_by: str) -> None:
        """Bind another bias under the same name, or give the linear one if it has none."""
        if self.bias is not None:
            graph_tools.set_tensor(gm, str(self.bias.target), value)
        else:
            set_argument(self.node, "bias", graph_tools.add_tensor(gm, f"{self.name}.bias", value, made_by))


@dataclass(frozen=True)
class Embedding(View):
    """Rows of a table [V, d] of the model."""

    targets = (aten.embedding.default,)
    table: Node
    ids: Node

    @classmethod
    def read(cls, node: Node) -> Embedding:
        return cls(node, tensor_arg(node, "weight"), node_arg(node, "indices"))

    def table_tensor(self, gm: GraphModule) -> Tensor:
        """[V, d]"""
        return graph_tools.get_tensor(gm, self.table)

    def change_rows(self, gm: GraphModule, change: Callable[[Tensor], Tensor]) -> None:
        """Table <- change(table) in float64, for a function of rows, each for itself; rounded once."""
        graph_tools.change_rows(gm, self.table, change)


@dataclass(frozen=True)
class Norm(View):
    """RMSNorm or LayerNorm over the last dimension, with or without gain and bias."""

    targets = (ops.rms_norm, aten.layer_norm.default)
    x: Node
    gain: Node | None
    bias: Node | None
    eps: float

    @classmethod
    def read(cls, node: Node) -> Norm:
        if node.target is ops.rms_norm:
            return cls(node, node_arg(node, "x"), optional_tensor_arg(node, "weight"), None, float_arg(node, "eps"))
        return cls(
            node, node_arg(node, "input"), optional_tensor_arg(node, "weight"), optional_tensor_arg(node, "bias"), float_arg(node, "eps")
        )  # fmt: skip

    @property
    def subtracts_mean(self) -> bool:
        """A LayerNorm."""
        return self.node.target is aten.layer_norm.default

    def drop_affine(self) -> None:
        """Leave the norm without gain and bias."""
        for name in ("weight", "bias") if self.subtracts_mean else ("weight",):
            set_argument(self.node, name, None)


@dataclass(frozen=True)
class Rope(View):
    """Rotary embedding of x [B, H, S, D]; cos and sin [B, 1, S, R]."""

    targets = (ops.rope,)
    x: Node
    cos: Node
    sin: Node

    @classmethod
    def read(cls, node: Node) -> Rope:
        return cls(node, node_arg(node, "x"), node_arg(node, "cos"), node_arg(node, "sin"))


@dataclass(frozen=True)
class SplitHeads(View):
    """[B, S, H·D] -> [B, H, S, D]."""

    targets = (ops.split_heads,)
    x: Node
    num_heads: int

    @classmethod
    def read(cls, node: Node) -> SplitHeads:
        return cls(node, node_arg(node, "x"), int_arg(node, "num_heads"))


@dataclass(frozen=True)
class MergeHeads(View):
    """[B, H, S, D] -> [B, S, H·D]."""

    targets = (ops.merge_heads,)
    x: Node

    @classmethod
    def read(cls, node: Node) -> MergeHeads:
        return cls(node, node_arg(node, "x"))


@dataclass(frozen=True)
class Columns(View):
    """x[..., start:stop]."""

    targets = (ops.columns,)
    x: Node
    start: int
    stop: int

    @classmethod
    def read(cls, node: Node) -> Columns:
        return cls(node, node_arg(node, "x"), int_arg(node, "start"), int_arg(node, "stop"))


@dataclass(frozen=True)
class AppendCache(View):
    """Keys or values of all tokens, [B, G, P + S, D]."""

    targets = (ops.append_cache,)
    past: Node
    new: Node

    @classmethod
    def read(cls, node: Node) -> AppendCache:
        return cls(node, node_arg(node, "past"), node_arg(node, "new"))


@dataclass(frozen=True)
class Attention(View):
    """softmax(scale · q kᵀ + mask) v."""

    targets = (ops.attention,)
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float
    softcap: float | None
    sinks: Node | None = None

    @classmethod
    def read(cls, node: Node) -> Attention:
        return cls(
            node, node_arg(node, "q"), node_arg(node, "k"), node_arg(node, "v"), optional_node_arg(node, "mask"),
            float_arg(node, "scale"), optional_float_arg(node, "softcap"), optional_tensor_arg(node, "sinks"),
        )  # fmt: skip


@dataclass(frozen=True)
class Project(View):
    """x U or x Uᵀ, with one basis [d, d] or one for each key/value head [G, D, D]."""

    targets = (ops.project, ops.project_heads)
    x: Node
    u: Node
    inverse: bool

    @classmethod
    def read(cls, node: Node) -> Project:
        return cls(node, node_arg(node, "x"), tensor_arg(node, "u"), bool_arg(node, "inverse"))

    @property
    def by_head(self) -> bool:
        """A basis for each head."""
        return self.node.target is ops.project_heads


@dataclass(frozen=True)
class ProjectBlocks(View):
    """x blockdiag(U) with its columns in another order, or the transposed map."""

    targets = (ops.project_blocks,)
    x: Node
    u: Node
    order: Node
    inverse: bool

    @classmethod
    def read(cls, node: Node) -> ProjectBlocks:
        return cls(
            node, node_arg(node, "x"), tensor_arg(node, "u"), tensor_arg(node, "order"), bool_arg(node, "inverse")
        )


@dataclass(frozen=True)
class ProjectKronecker(View):
    """x (A ⊗ B), or x times its inverse."""

    targets = (ops.project_kronecker,)
    x: Node
    a: Node
    b: Node
    inverse: bool

    @classmethod
    def read(cls, node: Node) -> ProjectKronecker:
        return cls(node, node_arg(node, "x"), tensor_arg(node, "a"), tensor_arg(node, "b"), bool_arg(node, "inverse"))


@dataclass(frozen=True)
class ScaleChannels(View):
    """x · s, or x / s."""

    targets = (ops.scale_channels,)
    x: Node
    s: Node
    inverse: bool

    @classmethod
    def read(cls, node: Node) -> ScaleChannels:
        return cls(node, node_arg(node, "x"), tensor_arg(node, "s"), bool_arg(node, "inverse"))


@dataclass(frozen=True)
class PermuteChannels(View):
    """x[..., order], or back."""

    targets = (ops.permute_channels,)
    x: Node
    order: Node
    inverse: bool

    @classmethod
    def read(cls, node: Node) -> PermuteChannels:
        return cls(node, node_arg(node, "x"), tensor_arg(node, "order"), bool_arg(node, "inverse"))


@dataclass(frozen=True)
class Hadamard(View):
    """A Hadamard transform over the last dimension, or one for each stretch of `sizes` columns."""

    targets = (ops.hadamard,)
    x: Node
    transpose: bool
    sizes: tuple[int, ...] | None

    @classmethod
    def read(cls, node: Node) -> Hadamard:
        sizes = argument(node, "sizes")
        return cls(node, node_arg(node, "x"), bool_arg(node, "transpose"), None if sizes is None else tuple(sizes))


@dataclass(frozen=True)
class Quantize(View):
    """Codes of activations, per token and group of columns; with a scale and zero point [groups] of the model, static ones."""

    targets = (ops.quantize,)
    x: Node
    bits: int
    groups: int
    clip: float
    scale: Node | None = None
    zero_point: Node | None = None

    @classmethod
    def read(cls, node: Node) -> Quantize:
        return cls(
            node, node_arg(node, "x"), int_arg(node, "bits"), int_arg(node, "groups"), float_arg(node, "clip"),
            optional_tensor_arg(node, "scale"), optional_tensor_arg(node, "zero_point"),
        )  # fmt: skip

    def codes_of(self, gm: GraphModule, x: Tensor) -> QuantizedActivation:
        """What it makes of a value."""
        static = (None if n is None else graph_tools.get_tensor(gm, n) for n in (self.scale, self.zero_point))
        return ops.quantize(x, self.bits, self.groups, self.clip, *static)

    @property
    def columns(self) -> int:
        """Columns of x."""
        return values.width(self.x)


@dataclass(frozen=True)
class Dequantize(View):
    """The float image of codes."""

    targets = (ops.dequantize,)
    codes: Node

    @classmethod
    def read(cls, node: Node) -> Dequantize:
        return cls(node, node_arg(node, "x"))


CacheParts = tuple[tuple[int, int, int], ...]
"""(bits, start, stop) of every part of a cache entry."""


@dataclass(frozen=True)
class QuantizeDequantize(View):
    """The float image of the codes of a cache entry [B, G, S, D]."""

    targets = (ops.quantize_dequantize,)
    x: Node
    parts: CacheParts
    clip: float

    @classmethod
    def read(cls, node: Node) -> QuantizeDequantize:
        parts = tuple((int(bits), int(start), int(stop)) for bits, start, stop in argument(node, "parts"))
        return cls(node, node_arg(node, "x"), parts, float_arg(node, "clip"))


@dataclass(frozen=True)
class CodedLinear(View):
    """A linear on weight codes [N, K] and their scales [N], or [N, groups] of `group_size` columns each.

    x: a value where activations are float, and their codes where not. For each expert of a mixture where there are `indices`: codes
    [E, N, K], scales [E, N] or [E, N, groups].
    """

    targets = (ops.quantized_linear, ops.weight_only_linear, ops.quantized_expert_linear, ops.weight_only_expert_linear)
    x: Node
    qdata: Node
    scale: Node
    group_size: int | None = None
    indices: Node | None = None

    @classmethod
    def read(cls, node: Node) -> CodedLinear:
        return cls(
            node, node_arg(node, "x"), tensor_arg(node, "qdata"), tensor_arg(node, "scale"), optional_int_arg(node, "group_size"),
            node_arg(node, "indices") if node.target in cls.targets[2:] else None,
        )  # fmt: skip

    @property
    def of_experts(self) -> bool:
        """One for each expert of a mixture."""
        return self.indices is not None

    @property
    def on_codes(self) -> bool:
        """Its activations are codes too."""
        return self.node.target in (ops.quantized_linear, ops.quantized_expert_linear)

    @property
    def name(self) -> str:
        """Of the part of a linear: `MODULE.partN`."""
        return str(self.qdata.target).removesuffix(".qdata")

    @property
    def quantizer(self) -> Quantize | None:
        """What makes its activation codes; None where its activations are float."""
        return Quantize.require(self.x) if self.on_codes else None

    def codes(self, gm: GraphModule) -> Tensor:
        """[N, K] int8."""
        return graph_tools.get_tensor(gm, self.qdata)

    def scales(self, gm: GraphModule) -> Tensor:
        """[N] float32, or [N, groups]."""
        return graph_tools.get_tensor(gm, self.scale)

    def image(self, gm: GraphModule) -> Tensor:
        """The float image of the codes, of their shape."""
        codes = self.codes(gm)
        return codes * column_scales(self.scales(gm), codes.shape[-1], self.group_size)
