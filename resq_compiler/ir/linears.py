"""The linears of a partitioned graph: each the sum of its parts, its bias, and what it is added to.

    add(add(add(part 0, part 1), bias), residual)

A part is a node with the fact `meta.LinearPart`: a linear on float weights, or on codes. Which
belong together is found here alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from resq_compiler.ir import meta, values
from resq_compiler.ir.args import argument, other_operand
from resq_compiler.ir.expert_views import ExpertBias
from resq_compiler.ir.graph_tools import aten, is_call, only_user
from resq_compiler.ir.views import CodedLinear, Columns, Linear

PARTS = (*Linear.targets, *CodedLinear.targets)


@dataclass(frozen=True)
class LinearSum:
    """A linear of the original model.

    parts: in column order, at least one.    root: the node that holds the result, bias included.
    residual: what the result is added to, if anything.    total: the node that holds that sum; `root` without a residual.
    apart: why parts of the linear are missing here; None where all are.
    """

    site: meta.LinearSite
    parts: tuple[Node, ...]
    bias: Node | None
    root: Node
    residual: Node | None = None
    total: Node | None = None
    apart: str | None = None

    @property
    def inputs(self) -> tuple[Node, ...]:
        """What each part reads: codes, their float image, or a float value."""
        return tuple(read_part(part).x for part in self.parts)

    @property
    def facts(self) -> tuple[meta.LinearPart, ...]:
        """Columns and bits of each part."""
        return tuple(meta.require(node, meta.LinearPart) for node in self.parts)

    @property
    def inner(self) -> tuple[Node, ...]:
        """The nodes of the sum but its root: parts and additions."""
        found: list[Node] = []
        for node in self.parts:
            while node is not self.root and node not in found:
                found.append(node)
                node = next(iter(node.users))
        return tuple(found)


def read_part(node: Node) -> Linear | CodedLinear:
    """A part of a linear, on float weights or on codes. Raises TopologyError: it is neither."""
    return Linear.of(node) or CodedLinear.require(node)


def linear_sums(gm: GraphModule) -> list[LinearSum]:
    """Every partitioned linear, in the order in which their first parts run.

    Parts that do not meet in a sum of their own are linears of their own, and say so (`apart`). Where two linears meet in one addition
    (attention and feed-forward in parallel), the residual of the first is the second, and the second has none.
    """
    by_site: dict[meta.LinearSite, list[Node]] = {}
    for node in gm.graph.nodes:
        fact = meta.get(node, meta.LinearPart)
        if fact is not None and is_call(node, *PARTS):
            by_site.setdefault(fact.site, []).append(node)
    found: list[LinearSum] = []
    totals: set[Node] = set()
    for nodes in by_site.values():
        for linear in _sums_of(sorted(nodes, key=lambda n: meta.require(n, meta.LinearPart).index)):
            linear = _with_residual(linear, totals)
            totals.add(linear.total or linear.root)
            found.append(linear)
    return found


def _sums_of(nodes: list[Node]) -> list[LinearSum]:
    """The sums that the parts of one linear make: one, if nothing is in the way."""
    sums: list[LinearSum] = []
    left, reason = list(nodes), None
    while left:
        parts, root, stopped = _follow_parts(left)
        reason = stopped or reason
        bias = _bias_after(root)
        apart = reason if len(parts) < len(nodes) else None
        end = root if bias is None else only_user(root)
        assert end is not None
        sums.append(LinearSum(meta.require(parts[0], meta.LinearPart).site, tuple(parts), bias, end, apart=apart))
        left = [n for n in left if n not in parts]
    return sums


def _follow_parts(nodes: list[Node]) -> tuple[list[Node], Node, str | None]:
    """From the first part along additions of others: those met, the node that holds their sum, and what ended it."""
    parts, root = [nodes[0]], nodes[0]
    while len(parts) < len(nodes):
        user = only_user(root)
        if user is None:
            return (
                parts,
                root,
                f"node {root.name}: read by {len(root.users)} nodes, expected only the addition of the other parts",
            )
        if not _is_addition(user):
            return parts, root, f"node {user.name}: expected the addition of another part, got {user.format_node()}"
        other = other_operand(user, root)
        if other not in nodes or other in parts or only_user(other) is not user:
            return parts, root, f"node {user.name}: adds {other}, expected another part of the same linear"
        parts.append(other)
        root = user
    return parts, root, None


def _bias_after(root: Node) -> Node | None:
    """A vector of the model that the only user adds to a sum; of experts, one for each."""
    user = only_user(root)
    of_experts = ExpertBias.of(user)
    if of_experts is not None:
        return of_experts.bias
    if user is None or not _is_addition(user):
        return None
    other = other_operand(user, root)
    is_vector = isinstance(other, Node) and other.op == "get_attr" and values.shape(other) == values.shape(root)[-1:]
    return other if is_vector else None


def _with_residual(linear: LinearSum, taken: set[Node]) -> LinearSum:
    user = only_user(linear.root)
    if user is None or user in taken or not _is_addition(user):
        return linear
    other = other_operand(user, linear.root)
    if not isinstance(other, Node) or other is linear.root or values.shape(other) != values.shape(linear.root):
        return linear
    return dataclasses.replace(linear, residual=other, total=user)


def _is_addition(node: Node) -> bool:
    return is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1


def whole_value(parts: list[Node]) -> list[Node]:
    """The value that all these are the columns of, one after the other, alone in a list; the parts themselves where there is none."""
    found, stop = set[Node](), 0
    for cut in map(Columns.of, parts):
        if cut is None or cut.start != stop:
            return parts
        found.add(cut.x)
        stop = cut.stop
    value = next(iter(found))
    return [value] if len(found) == 1 and values.width(value) == stop else parts
