"""Mixtures of experts as transformers computes them, on rows sorted by expert, named.

    ids, order = sort(reshape(indices, [-1]))
    rows = x[order // k];    ends = cumsum(histc(ids))
    h = f(grouped_mm(rows, W, ends) + b[ids]),    f made of operators that work on every row alone
    sum(reshape((weights[order] · (grouped_mm(h, W', ends) + b'[ids]))[inverse of order], [-1, k, d]), 1)

        -> combine_experts(expert_linear(f(expert_linear(x, W, indices, b)), W', indices, b'), weights)

Found from the sort by dataflow: what its order is used for says what every value is. What is not understood is an error naming the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from resq_compiler.errors import TopologyError
from resq_compiler.ir import graph_tools, ops, values
from resq_compiler.ir.args import argument, operands, set_argument, source
from resq_compiler.ir.graph_tools import aten, emit, is_call, replace

GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
"""The product of every expert's rows; the first is transformers' own, the second torch's, for bfloat16."""

ROW_WISE = {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.silu.default, aten.gelu.default, aten.relu.default,
    aten.sigmoid.default, aten.tanh.default, aten.clamp.default, aten.pow.Tensor_Scalar, aten.square.default, aten.neg.default,
    aten.exp.default, aten.chunk.default, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.mish.default, aten.hardtanh.default, aten.leaky_relu.default, aten.softplus.default, aten.relu6.default,
}  # fmt: skip
LAST_DIMENSION = {
    aten.chunk.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
}


def name_experts(gm: GraphModule, made_by: str) -> int:
    """Name every mixture of experts; how many there are. Raises TopologyError naming the node that is not understood."""
    done = 0
    sorts = [n for n in gm.graph.find_nodes(op="call_function", target=aten.sort.default) if Sort.of(n) is not None]
    if sorts:
        sink_flattening(gm, made_by)  # what experts read may be a norm of flattened rows
    for node in sorts:
        sort = Sort.of(node)
        if sort is not None:
            _Experts(gm, sort, made_by).name()
            done += 1
    gm.graph.eliminate_dead_code()
    left = [node for node in gm.graph.nodes if is_grouped(node)]
    if left:
        raise TopologyError(
            f"node {left[0].name} ({graph_tools.module_of(left[0])}): a product of experts' rows; expected rows that are sorted by the "
            f"experts that a router chose, got {left[0].format_node()}",
            node=left[0].name,
        )
    if done:
        sink_flattening(gm, made_by)
    return done


def is_grouped(node: Node) -> bool:
    """A product of rows with the weights of their experts."""
    return node.op == "call_function" and str(node.target) in GROUPED


@dataclass(frozen=True)
class Sort:
    """The sort of the chosen experts: indices [T, k], how many are chosen, the sorted experts and the order, which may be unused."""

    node: Node
    indices: Node
    choices: int
    ids: Node | None
    order: Node

    @classmethod
    def of(cls, node: Node) -> Sort | None:
        """None where no product of experts depends on the order."""
        flat = source(node)
        picked = {argument(user, "b"): user for user in node.users if _is_getitem(user)}
        if not is_call(flat, aten.reshape.default) or 1 not in picked or not any(map(is_grouped, _descendants(node))):
            return None
        indices = source(flat)
        return cls(node, indices, int(values.width(indices)), picked.get(0), picked[1])


def _is_getitem(node: Node) -> bool:
    return graph_tools.target_text(node.target) == "getitem"


def _descendants(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


class _Experts:
    """One mixture while it is named. new: what stands for a value on sorted rows, [B, S, k, ...]."""

    def __init__(self, gm: GraphModule, sort: Sort, made_by: str):
        self.gm, self.sort, self.made_by = gm, sort, made_by
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.new: dict[Node, Node] = {}
        self.rows: dict[Node, Node] = {}  # gathered rows -> tokens [B, S, K]
        self.weights: dict[Node, Node] = {}  # gathered weights -> weights [T, k]

    def name(self) -> None:
        """Walk from the sort to the sum over the choices."""
        region = sorted(_descendants(self.sort.node), key=self.order.__getitem__)
        for i, node in enumerate(region):
            if self._gathers(node) or self._plumbing(node):
                continue
            if is_call(node, aten.sum.dim_IntList) and self._combine(node):
                self._erase(region[:i])
                return
            self._row_wise(node)
        last = region[-1]
        raise self._not(last, "the sum over the choices of every token")

    def _erase(self, region: list[Node]) -> None:
        """Drop what was only there to sort and sort back: it has writes into tensors, which are not dead code of their own accord."""
        for node in reversed(region):
            if not node.users:
                self.gm.graph.erase_node(node)

    def _not(self, node: Node, expected: str) -> TopologyError:
        where = graph_tools.module_of(node)
        return TopologyError(
            f"node {node.name} ({where}): in a mixture of experts; expected {expected}, got {node.format_node()}",
            node=node.name,
        )

    def _gathers(self, node: Node) -> bool:
        """x[order // k] and weights[order]."""
        if not is_call(node, aten.index.Tensor):
            return False
        (by,) = argument(node, "indices")
        if by is self.sort.order and is_call(source(node), aten.reshape.default):
            self.weights[node] = source(source(node))
            return True
        if is_call(by, aten.floor_divide.default) and operands(by) == (self.sort.order, self.sort.choices):
            self.rows[node] = self._tokens(source(node))
            return True
        return False

    def _tokens(self, flat: Node) -> Node:
        """[B, S, K] of a value [B·S, K] that was flattened."""
        tokens = flat
        while is_call(tokens, aten.reshape.default) and len(values.shape(tokens)) == 2:
            tokens = source(tokens)
        if len(values.shape(tokens)) != 3 or values.width(tokens) != values.width(flat):
            raise self._not(flat, "tokens [batch, tokens, features], flattened")
        return tokens

    def _plumbing(self, node: Node) -> bool:
        """What is computed from the order alone, or gathers biases: read where it is used."""
        inputs = set(node.all_input_nodes)
        if node in self.sort.node.users or inputs <= {self.sort.order, self.sort.ids}:
            return True
        return not inputs & (self.new.keys() | self.rows.keys() | self.weights.keys()) and not is_grouped(node)

    def _row_wise(self, node: Node) -> None:
        if is_grouped(node):
            self.new[node] = self._linear(node)
        elif is_call(node, aten.add.Tensor) and self._adds_bias(node) or self._weighs(node) or self._reorders(node):
            return
        elif is_call(node, *ROW_WISE) or _is_getitem(node):
            self.new[node] = self._copy(node)
        else:
            raise self._not(node, "an operator that works on every row alone")

    def _emit(self, like: Node, target: Callable, *args: Any) -> Node:
        """A new node where the old one stands: by then indices, tokens and weights are there."""
        with self.gm.graph.inserting_before(like):
            return emit(self.gm.graph, target, args, like, self.made_by)

    def _linear(self, node: Node) -> Node:
        x, weight, ends = node.all_input_nodes[:3]
        if self.sort.node not in graph_tools.ancestors([ends]):
            raise self._not(node, "offsets that come from the same sort")
        given = self.rows.get(x) or self.new.get(x)
        if given is None:
            raise self._not(node, "rows of tokens sorted by expert")
        return self._emit(node, ops.expert_linear, given, self._weight(weight, node), self.sort.indices)

    def _weight(self, weight: Node, node: Node) -> Node:
        """[E, N, K]: grouped products take it transposed."""
        turned = is_call(weight, aten.transpose.int)
        if turned and {argument(weight, "dim0"), argument(weight, "dim1")} <= {-2, -1, 1, 2}:
            weight = source(weight)
        if weight.op != "get_attr" or len(values.shape(weight)) != 3:
            raise self._not(node, "weights of the model [experts, out, in], the same shape for all experts")
        if not turned:
            experts, width, rows = values.shape(weight)
            graph_tools.change_tensor(self.gm, weight, lambda w: w.mT.contiguous(), (experts, rows, width))
            values.forget(weight)
        if not str(weight.target).endswith(".weight"):
            graph_tools.rename_tensor(self.gm, weight, f"{weight.target}.weight")
        return weight

    def _adds_bias(self, node: Node) -> bool:
        """linear + bias[ids]"""
        for linear, bias in (operands(node), operands(node)[::-1]):
            new = self.new.get(linear) if isinstance(linear, Node) else None
            if is_call(new, ops.expert_linear) and is_call(bias, aten.index.Tensor):
                table = source(bias)
                if table.op == "get_attr" and list(argument(bias, "indices")) == [self.sort.ids]:
                    set_argument(new, "bias", table)
                    self.new[node] = new
                    return True
        return False

    def _weighs(self, node: Node) -> bool:
        """y · unsqueeze(weights[order], -1): remembered for the sum."""
        if is_call(node, aten.unsqueeze.default) and source(node) in self.weights:
            self.weights[node] = self.weights[source(node)]
            return True
        if not is_call(node, aten.mul.Tensor):
            return False
        for y, by in (operands(node), operands(node)[::-1]):
            if isinstance(by, Node) and by in self.weights and y in self.new:
                self.new[node], self.weights[node] = self.new[y], self.weights[by]
                return True
        return False

    def _reorders(self, node: Node) -> bool:
        """[inverse of the order], reshape to [T, k, d]"""
        before = next(iter(node.all_input_nodes), None)
        if before not in self.new or before not in self.weights:
            return False
        shape = values.shape(node)
        inverse = is_call(node, aten.index.Tensor) and self._inverts(argument(node, "indices"))
        if inverse or (is_call(node, aten.reshape.default) and shape[-2:] == (self.sort.choices, values.width(before))):
            self.new[node], self.weights[node] = self.new[before], self.weights[before]
            return True
        return False

    def _inverts(self, indices: Any) -> bool:
        """The inverse permutation: run on an order that is not its own inverse."""
        if len(indices) != 1 or not isinstance(indices[0], Node):
            return False
        size = int(values.shape(self.sort.order)[0])
        order = torch.arange(size).roll(1)
        env: dict[Node, Any] = {self.sort.order: order}
        for n in graph_tools.placeholders(self.gm.graph):
            env[n] = torch.zeros(values.shape(n), dtype=values.dtype(n))
        return torch.equal(graph_tools.evaluate(self.gm, indices[0], env), order.argsort())

    def _combine(self, node: Node) -> bool:
        """sum(…, 1), which is read as [T, d] or reshaped to [B, S, d]."""
        y = source(node)
        if y not in self.new or y not in self.weights or list(argument(node, "dim")) != [1]:
            return False
        total = self._emit(node, ops.combine_experts, self.new[y], self.weights[y])
        flat = self._emit(node, aten.reshape.default, total, [-1, values.width(node)])
        replace(node, flat)
        return True

    def _copy(self, node: Node) -> Node:
        """The same operator on [B, S, k, ...]."""
        for given in node.all_input_nodes:
            if given not in self.new:
                raise self._not(node, "an operator on rows of experts alone")
        args = torch.fx.node.map_arg(node.args, self.new.__getitem__)
        new = self._emit(node, _function(node), *args)
        new.kwargs = node.kwargs
        if node.target in LAST_DIMENSION:
            if argument(node, "dim") not in (-1, 1):
                raise self._not(node, "a part of the features")
            set_argument(new, "dim", -1)
        return new


def _function(node: Node) -> Callable:
    assert callable(node.target)
    return node.target


FLATTENED = {
    aten.linear.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.add.Tensor, aten.mul.Tensor, aten.sigmoid.default,
    aten.tanh.default, aten.pow.Tensor_Scalar, aten.div.Tensor, aten.mean.dim, aten.rsqrt.default,
}  # fmt: skip
"""Operators on the last dimension alone, that may as well run before their input is flattened."""


def sink_flattening(gm: GraphModule, made_by: str) -> None:
    """op(reshape(x, [-1, d])) -> reshape(op(x), [-1, d']), for shared experts and routers; and back to [B, S, d] is nothing."""
    for node in list(gm.graph.nodes):
        if is_call(node, aten.reshape.default) and is_flattened(source(node)):
            shape = values.shape(source(source(node)))
            if values.shape(node) == shape:
                replace(node, source(source(node)))
            elif values.shape(node) == values.shape(source(node)):
                replace(node, source(node))
        elif _is_row_wise(node) and (inputs := _flat_inputs(node)):
            _sink(gm, node, inputs, made_by)
    gm.graph.eliminate_dead_code()


def is_flattened(node: object) -> bool:
    """reshape([B, S, d] -> [B·S, d])"""
    if not is_call(node, aten.reshape.default):
        return False
    before, after = values.shape(source(node)), values.shape(node)
    return len(before) == 3 and len(after) == 2 and before[-1] == after[-1]


def _is_row_wise(node: Node) -> bool:
    return is_call(node, *FLATTENED) and (not is_call(node, aten.mean.dim) or argument(node, "dim") == [-1])


def _flat_inputs(node: Node) -> list[Node]:
    """The flattened operands of an operator whose other operands are tensors of the model; none where some are something else."""
    flat = [n for n in node.all_input_nodes if is_flattened(n)]
    others = [n for n in node.all_input_nodes if n not in flat and n.op != "get_attr"]
    return [] if others else flat


def _sink(gm: GraphModule, node: Node, inputs: list[Node], made_by: str) -> None:
    width = values.width(node)
    with gm.graph.inserting_before(node):
        args = torch.fx.node.map_arg(node.args, lambda n: source(n) if n in inputs else n)
        new = emit(gm.graph, _function(node), args, node, made_by)
        new.kwargs = node.kwargs
        flat = emit(gm.graph, aten.reshape.default, (new, [-1, width]), node, made_by)
    replace(node, flat)
