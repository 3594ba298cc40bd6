"""What to emit together, found in the FX graph before lowering: the parts of a linear, linears of one input, splits of one value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import GraphModule, Node

from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten, is_call

STACK_RATIO = 2  # linears of one input are one product while their outputs are at most this many times its width


@dataclass
class Term:
    """One part of a linear: source codes (or float value), weight codes [N, K] int8 and scale [N]."""

    source: Node
    qdata: torch.Tensor
    scale: torch.Tensor
    weight_bits: int
    name: str

    @property
    def codes(self) -> np.ndarray:
        """Weight codes as ONNX products take them: [K, N] int8."""
        return np.ascontiguousarray(self.qdata.detach().cpu().numpy().T)

    @property
    def scales(self) -> np.ndarray:
        return self.scale.detach().cpu().float().numpy()


@dataclass
class LinearSum:
    """A whole linear: the sum of its parts and its bias; `root` is the FX node that holds the result."""

    root: Node
    terms: list[Term]
    bias: torch.Tensor | None = None

    @property
    def sources(self) -> tuple[Node, ...]:
        return tuple(t.source for t in self.terms)

    @property
    def out_features(self) -> int:
        return int(self.terms[0].qdata.shape[0])


@dataclass
class Plan:
    """groups: root node -> the linears computed in one product with it. inner: nodes that need no emission of their own."""

    groups: dict[Node, list[LinearSum]] = field(default_factory=dict)
    inner: set[Node] = field(default_factory=set)
    terms_of: dict[Node, list[Term]] = field(default_factory=dict)


def make_plan(gm: GraphModule, stack: bool) -> Plan:
    """Find the linears of a quantized graph. stack: put linears that share their inputs into one product."""
    sums = find_sums(gm)
    plan = Plan()
    by_source: dict[tuple[Node, ...], list[LinearSum]] = {}
    for linear in sums:
        by_source.setdefault(linear.sources, []).append(linear)
        for term in linear.terms:
            plan.terms_of.setdefault(term.source, []).append(term)
        plan.inner |= inner_nodes(linear)
    for group in by_source.values():
        width = sum(t.qdata.shape[1] for t in group[0].terms)
        whole = stack and len(group) > 1 and sum(s.out_features for s in group) <= STACK_RATIO * width
        for members in [group] if whole else [[s] for s in group]:
            plan.groups.update({s.root: members for s in members})
    return plan


def find_sums(gm: GraphModule) -> list[LinearSum]:
    """Every linear on codes, in order of execution."""
    found: dict[Node, LinearSum] = {}
    for node in gm.graph.nodes:
        if is_call(node, ops.quantized_linear, ops.weight_only_linear):
            found[node] = LinearSum(node, [term_of(gm, node)])
        elif is_call(node, aten.add.Tensor):
            absorb(gm, node, found)
    return list(found.values())


def term_of(gm: GraphModule, node: Node) -> Term:
    """The part that a quantized_linear or weight_only_linear node computes."""
    source, qdata, scale = node.args[:3]
    codes = graph_tools.get_tensor(gm, qdata)  # type: ignore[arg-type]
    fact = meta.get(node, meta.LinearPart)
    bits = fact.weight_bits if fact is not None and fact.weight_bits < 16 else code_bits(codes)
    return Term(source, codes, graph_tools.get_tensor(gm, scale), bits, str(qdata.target).removesuffix(".qdata"))  # type: ignore[arg-type,union-attr]


def code_bits(codes: torch.Tensor) -> int:
    """The fewest bits that hold the codes: 4 or 8."""
    return 4 if codes.numel() == 0 or (int(codes.min()) >= -8 and int(codes.max()) <= 7) else 8


def absorb(gm: GraphModule, node: Node, found: dict[Node, LinearSum]) -> None:
    """Make add(part, part) of one linear, or add(linear, bias), one LinearSum."""
    left, right = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or left not in found or len(left.users) != 1:  # type: ignore[union-attr]
        return
    total = found[left]  # type: ignore[index]
    if isinstance(right, Node) and right.op == "get_attr" and total.bias is None:
        bias = graph_tools.get_tensor(gm, right)
        if bias.dim() == 1 and bias.shape[0] == total.out_features:
            found[node] = LinearSum(node, total.terms, bias)
            del found[left]  # type: ignore[arg-type]
    elif right in found and len(right.users) == 1 and same_site(left, right, total, found[right]):  # type: ignore[union-attr,index,arg-type]
        found[node] = LinearSum(node, total.terms + found[right].terms)  # type: ignore[index]
        del found[left], found[right]  # type: ignore[arg-type]


def same_site(left: Node, right: Node, first: LinearSum, second: LinearSum) -> bool:
    """True when both sums are parts of one linear of the original model."""
    if first.bias is not None or second.bias is not None:
        return False
    return first.terms[0].name.rpartition(".part")[0] == second.terms[0].name.rpartition(".part")[0] != ""


def inner_nodes(linear: LinearSum) -> set[Node]:
    """The add and part nodes inside a sum, below its root."""
    seen: set[Node] = set()
    pending = [linear.root]
    while pending:
        node = pending.pop()
        if is_call(node, aten.add.Tensor):
            pending += [n for n in node.args[:2] if isinstance(n, Node) and n.op != "get_attr"]
        if node is not linear.root:
            seen.add(node)
    return seen


def tiling_columns(source: Node, width: int) -> list[Node] | None:
    """The columns() nodes that cut `source` into adjacent pieces from 0 to width, in order; None when they do not tile it."""
    pieces: dict[int, Node] = {}
    for user in source.users:
        if is_call(user, ops.columns):
            pieces.setdefault(int(user.args[1]), user)  # type: ignore[arg-type]
    order = [pieces[start] for start in sorted(pieces)]
    edges = [0] + [int(n.args[2]) for n in order]  # type: ignore[arg-type]
    starts = [int(n.args[1]) for n in order]  # type: ignore[arg-type]
    return order if order and starts == edges[:-1] and edges[-1] == width else None
