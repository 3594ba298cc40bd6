"""Transforms as nodes of a graph: how each kind is called, put in, and read back.

A transform stands in a graph as a call that carries the fact `meta.Projection`. The graph holds its tensors in the type of the weights;
passes that put one in keep it exactly, in float64, in the fact `Transforms`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, meta, ops, values
from resq_compiler.ir.graph_tools import emit
from resq_compiler.ir.views import Hadamard, PermuteChannels, Project, ProjectBlocks, ProjectKronecker, ScaleChannels
from resq_compiler.numerics.transforms import (
    BlockRotation,
    HadamardRotation,
    HeadRotation,
    Kronecker,
    Permutation,
    Product,
    Rotation,
    Scaling,
    Transform,
)

OPERATORS: dict[type[Transform], Callable[..., Any]] = {
    Rotation: ops.project, HeadRotation: ops.project_heads, BlockRotation: ops.project_blocks, HadamardRotation: ops.hadamard,
    Kronecker: ops.project_kronecker, Scaling: ops.scale_channels, Permutation: ops.permute_channels,
}  # fmt: skip
"""The operator of each kind; a product is one call for each of its factors."""

TARGETS = tuple(OPERATORS.values())


@dataclass
class Transforms:
    """A fact: the transforms of nodes, in float64."""

    exact: dict[Node, Transform] = field(default_factory=dict)

    def of(self, gm: GraphModule, node: Node) -> Transform:
        """The transform of a node; as precise as the graph holds it where no pass kept it."""
        return self.exact.get(node) or read(gm, node)


@dataclass
class Placing:
    """One transform in a graph: its tensors are made once, whatever number of calls it gets.

    name: of its tensors, behind `resq.`. like: a tensor of the type and device that it is to have.
    """

    gm: GraphModule
    transform: Transform
    name: str
    like: Tensor
    made_by: str
    known: Transforms
    _tensors: dict[int, tuple[Node, ...]] = field(default_factory=dict)

    def forward(self, value: Node, users: Iterable[Node], fact: meta.Projection) -> Node:
        """Let users read value T in place of the value; returns the last node of T."""
        return self._insert(value, list(users), fact, inverse=False)

    def inverse(self, value: Node, users: Iterable[Node], fact: meta.Projection) -> Node:
        """Let users read value T⁻¹ in place of the value; returns the last node of T⁻¹."""
        return self._insert(value, list(users), fact, inverse=True)

    def _insert(self, value: Node, users: list[Node], fact: meta.Projection, inverse: bool) -> Node:
        factors = list(enumerate(factors_of(self.transform)))
        several = sum(bool(factor.tensors) for _, factor in factors) > 1
        last = value
        for i, factor in reversed(factors) if inverse else factors:
            tensors = self._made(i, factor, f"{self.name}.{i}" if several else self.name)
            with self.gm.graph.inserting_after(last):
                target, arguments = OPERATORS[type(factor)], call_arguments(factor, tensors, inverse)
                last = emit(self.gm.graph, target, (last, *arguments), last, self.made_by)
            self.known.exact[meta.put(last, fact)] = factor
        for user in users:
            user.replace_input_with(value, last)
        return last

    def _made(self, index: int, factor: Transform, name: str) -> tuple[Node, ...]:
        if index not in self._tensors:
            self._tensors[index] = tuple(
                graph_tools.add_tensor(self.gm, f"resq.{name}{ending}", self._stored(value), self.made_by)
                for ending, value in factor.tensors.items()
            )
        return self._tensors[index]

    def _stored(self, value: Tensor) -> Tensor:
        return value.to(self.like.device, self.like.dtype if value.is_floating_point() else value.dtype)


def factors_of(transform: Transform) -> tuple[Transform, ...]:
    """The factors of a product, those of products inside it too; the transform itself where it is none."""
    if not isinstance(transform, Product):
        return (transform,)
    return tuple(inner for factor in transform.factors for inner in factors_of(factor))


def call_arguments(transform: Transform, tensors: tuple[Node, ...], inverse: bool) -> tuple[Any, ...]:
    """What the operator of a transform takes behind the value."""
    if isinstance(transform, HadamardRotation):
        return inverse, transform.sizes if len(transform.sizes) > 1 else None
    if isinstance(transform, BlockRotation):
        return (*tensors, inverse)
    return (*tensors, True) if inverse else tensors


def read(gm: GraphModule, node: Node) -> Transform:
    """The transform of a call, as the graph holds it. Raises TopologyError: it calls none."""

    def tensor(of: Node) -> Tensor:
        return graph_tools.get_tensor(gm, of).double()

    def whole(of: Node) -> Tensor:
        return graph_tools.get_tensor(gm, of)

    if (project := Project.of(node)) is not None:
        return HeadRotation(tensor(project.u)) if project.by_head else Rotation(tensor(project.u))
    if (blocks := ProjectBlocks.of(node)) is not None:
        return BlockRotation(tensor(blocks.u), whole(blocks.order))
    if (hadamard := Hadamard.of(node)) is not None:
        return HadamardRotation(hadamard.sizes or (values.width(node),))
    if (kronecker := ProjectKronecker.of(node)) is not None:
        return Kronecker(tensor(kronecker.a), tensor(kronecker.b))
    if (scaling := ScaleChannels.of(node)) is not None:
        return Scaling(tensor(scaling.s))
    if (permutation := PermuteChannels.of(node)) is not None:
        return Permutation(whole(permutation.order))
    raise TopologyError(f"node {node.name}: expected a transform, got {node.format_node()}", node=node.name)
