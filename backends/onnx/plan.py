"""What to emit together, found in the FX graph before lowering: the parts of a linear, linears of one input, splits of one value."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import GraphModule, Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import graph_tools, meta
from resq_compiler.ir.args import source
from resq_compiler.ir.linears import LinearSum, linear_sums, read_part
from resq_compiler.ir.promises import Promised
from resq_compiler.ir.views import CodedLinear, Columns, Linear

log = logging.getLogger("resq_compiler")

STACK_RATIO = 2  # linears of one input are one product while their outputs are at most this many times its width


@dataclass(frozen=True)
class Term:
    """One part of a linear: source codes (or float value), weight codes [N, K] int8 (may be promised), and scale [N], or [N, groups]."""

    source: Node
    qdata: torch.Tensor
    scale: torch.Tensor
    weight_bits: int
    name: str
    group_size: int | None = None

    @property
    def codes(self) -> np.ndarray:
        """Weight codes as ONNX products take them: [K, N] int8."""
        qdata = self.qdata.make() if isinstance(self.qdata, Promised) else self.qdata
        return np.ascontiguousarray(qdata.detach().cpu().numpy().T)

    @property
    def scales(self) -> np.ndarray:
        """[N], or [groups, N]."""
        return np.ascontiguousarray(self.scale.detach().cpu().float().numpy().T)


@dataclass(frozen=True)
class Product:
    """A linear on weight codes: the sum of its parts and its bias; `root` is the FX node that holds the result."""

    root: Node
    terms: tuple[Term, ...]
    bias: torch.Tensor | None = None

    @property
    def sources(self) -> tuple[Node, ...]:
        return tuple(t.source for t in self.terms)

    @property
    def out_features(self) -> int:
        return int(self.terms[0].qdata.shape[0])

    @property
    def bias_array(self) -> np.ndarray | None:
        """[N] float32."""
        return None if self.bias is None else self.bias.detach().cpu().float().numpy()


@dataclass(frozen=True)
class ExpertProduct:
    """A linear of experts without its bias: the sum of its parts; `root` is the FX node that holds it."""

    root: Node
    parts: tuple[Linear | CodedLinear, ...]

    @property
    def indices(self) -> Node:
        """Which experts each token goes through, [..., k]."""
        found = self.parts[0].indices
        assert found is not None, "a product of experts has indices"
        return found

    @property
    def sources(self) -> tuple[Node, ...]:
        return tuple(part.x for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """groups: root node -> the linears computed in one product with it; experts: the same of linears of experts, in one loop.
    inner: nodes that need no emission of their own."""

    groups: dict[Node, list[Product]] = field(default_factory=dict)
    experts: dict[Node, list[ExpertProduct]] = field(default_factory=dict)
    inner: set[Node] = field(default_factory=set)
    terms_of: dict[Node, list[Term]] = field(default_factory=dict)


def make_plan(gm: GraphModule, stack: bool) -> Plan:
    """Find the linears of a quantized graph. stack: put linears that share their inputs into one product.

    Parts that do not meet in one sum are computed one by one, with a warning that says why.
    Raises BackendError: a linear on codes that is known to be a part of none.
    """
    plan = Plan()
    by_source: dict[tuple[Node, ...], list[Product]] = {}
    loops: dict[tuple[Node, ...], list[ExpertProduct]] = {}
    for linear in linear_sums(gm):
        if linear.apart is not None:
            log.warning("onnx: %s: its parts are products of their own: %s", linear.site.name, linear.apart)
        if read_part(linear.parts[0]).of_experts:
            mixed = of_experts(linear)
            loops.setdefault((mixed.indices, *mixed.sources), []).append(mixed)
            plan.inner.update(node for node in linear.inner if node is not mixed.root)
            continue
        for product, inner in products(gm, linear):
            by_source.setdefault(product.sources, []).append(product)
            for term in product.terms:
                plan.terms_of.setdefault(term.source, []).append(term)
            plan.inner.update(inner)
    for group in by_source.values():
        width = sum(t.qdata.shape[1] for t in group[0].terms)
        whole = stack and len(group) > 1 and sum(p.out_features for p in group) <= STACK_RATIO * width
        for members in [group] if whole else [[p] for p in group]:
            plan.groups.update({p.root: members for p in members})
    plan.experts.update({p.root: together for together in loops.values() for p in together})
    check_complete(gm, plan)
    return plan


def products(gm: GraphModule, linear: LinearSum) -> Iterator[tuple[Product, tuple[Node, ...]]]:
    """The products of a linear and the nodes inside each: one for all parts, or one for each where some have float weights."""
    coded = [view for view in map(CodedLinear.of, linear.parts) if view is not None]
    if len(coded) == len(linear.parts):
        bias = None if linear.bias is None else graph_tools.get_tensor(gm, linear.bias)
        yield Product(linear.root, tuple(term_of(gm, view) for view in coded), bias), linear.inner
    else:
        yield from ((Product(view.node, (term_of(gm, view),)), ()) for view in coded)


def of_experts(linear: LinearSum) -> ExpertProduct:
    """A linear of experts as one product; its bias, one for each expert, is added by a node of its own."""
    root = linear.root if linear.bias is None else source(linear.root)
    return ExpertProduct(root, tuple(read_part(part) for part in linear.parts))


def term_of(gm: GraphModule, part: CodedLinear) -> Term:
    """The part that a node computes."""
    return Term(
        part.x, graph_tools.held(gm, part.qdata), part.scales(gm), meta.require(part.node, meta.LinearPart).weight_bits, part.name,
        part.group_size,
    )  # fmt: skip


def check_complete(gm: GraphModule, plan: Plan) -> None:
    """Raise BackendError for a linear on codes that no group computes."""
    for node in gm.graph.nodes:
        if CodedLinear.of(node) is not None and node not in {*plan.inner, *plan.groups, *plan.experts}:
            raise BackendError(
                f"onnx: node {node.name}: a linear on codes without the fact of which linear it is a part; "
                "expected one for every part, as passes and saved models write them",
                node=node.name,
            )


def tiling_columns(source: Node, width: int) -> list[Columns] | None:
    """The columns() that cut `source` into adjacent pieces from 0 to width, in order; None when they do not tile it."""
    pieces: dict[int, Columns] = {}
    for user in source.users:
        piece = Columns.of(user)
        if piece is not None:
            pieces.setdefault(piece.start, piece)
    order = [pieces[start] for start in sorted(pieces)]
    edges = [0, *(piece.stop for piece in order)]
    return order if order and [p.start for p in order] == edges[:-1] and edges[-1] == width else None
