"""Linears of a mixture of experts in standard operators: rows sorted by expert, and a Loop over the experts that have any.

    for each expert e with rows:  y[rows of e] = Σ over parts of x[rows of e] W[e]ᵀ

A step reads the weights of one expert and the rows that go through it, so one token costs its k experts and a long text every expert
once. The results of the steps are a sequence, joined and put back into the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.integer_weights import stored_codes
from resq_compiler.backends.onnx.plan import ExpertProduct
from resq_compiler.backends.onnx.values import Codes, Value
from torch.fx import Node

from resq_compiler.ir import graph_tools, meta, values
from resq_compiler.ir.promises import Promise, promise_of
from resq_compiler.ir.views import CodedLinear, Linear, Quantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


@dataclass(frozen=True)
class ExpertRows:
    """Which rows (a token and one of its k choices) each expert computes, int64 tensors.

    order [M]: rows by expert. inverse [M]: where each row is in it. starts, stops [E]: the rows of an expert in `order`.
    active: experts that have rows. count: how many these are, a scalar. choices: k.
    """

    order: str
    inverse: str
    starts: str
    stops: str
    active: str
    count: str
    choices: int


def expert_rows(low: Lowering, indices: Node, experts: int) -> ExpertRows:
    """Rows by expert, of indices [..., k]; once for all linears with these indices."""
    return low.once(("expert rows", indices), lambda: _sorted_rows(low, indices, experts))


def _sorted_rows(low: Lowering, indices: Node, experts: int) -> ExpertRows:
    b, last = low.b, low.b.ints(0)
    flat = b.op("Reshape", low.exact(indices), b.ints(-1))
    rows = b.op("Shape", flat)
    order = _order(low, flat, rows)
    numbers = b.constant(np.arange(experts, dtype=np.int64).reshape(-1, 1))
    counts = b.op("ReduceSum", b.op("Cast", b.op("Equal", numbers, flat), to=TensorProto.INT64), b.ints(1), keepdims=0)
    stops = b.op("CumSum", counts, b.constant(np.int64(0)))
    active = b.op("Squeeze", b.op("NonZero", counts), last)
    count = b.op("Squeeze", b.op("Shape", active), last)
    return ExpertRows(
        order, _order(low, order, rows), b.op("Sub", stops, counts), stops, active, count, int(values.shape(indices)[-1])
    )  # fmt: skip


def _order(low: Lowering, keys: str, count: str) -> str:
    """The places of keys in rising order."""
    names = low.b.fresh("sorted"), low.b.fresh("order")
    return low.b.several("TopK", keys, count, outputs=names, axis=0, largest=0, sorted=1)[1]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights that read one input, of several linears side by side: codes int8 [E, N, K] of `bits`, those of each expert, and scales
    float32 [E, N of all], or [E, groups, N of all] of `group_size` columns each; of float weights these alone."""

    name: str
    linears: tuple[Promise, ...]
    bits: tuple[int, ...] = ()
    scales: np.ndarray | None = None
    group_size: int | None = None

    @property
    def dims(self) -> tuple[int, int, int]:
        """[E, K, N of all], as they are stored."""
        experts, _, width = self.linears[0].shape
        return experts, width, sum(linear.shape[1] for linear in self.linears)

    def expert(self, number: int) -> np.ndarray:
        """[K, N of all] of one expert."""
        each = [linear.between(number, number + 1)[0].numpy().T for linear in self.linears]
        return np.ascontiguousarray(np.concatenate(each, -1))

    @property
    def row_sums(self) -> np.ndarray:
        """Σ over K of the codes, int32 [E, N]."""
        return np.stack([self.expert(e).sum(0, dtype=np.int32) for e in range(self.dims[0])])

    def stored(self, low: Lowering) -> str:
        """All of the weights; codes of up to 4 bits are INT4 in the file, and int8 when the model is loaded. Made outside of a loop."""
        if self.scales is None:
            every = range(self.dims[0])
            return low.b.later(f"{self.name}.T", self.dims, np.float32, lambda: map(self.expert, every))
        narrow, wide = ([e for e, b in enumerate(self.bits) if (b <= 4) == small] for small in (True, False))
        if not narrow or not wide:
            return self._kept(low, narrow or wide, self.name, bool(narrow))
        pieces = (
            self._kept(low, which, f"{self.name}.{label}", label == "narrow")
            for label, which in (("narrow", narrow), ("wide", wide))
        )
        return low.b.op("Gather", low.b.op("Concat", *pieces, axis=0), low.b.constant(np.argsort([*narrow, *wide])))

    def _kept(self, low: Lowering, which: Sequence[int], name: str, narrow: bool) -> str:
        """Codes of some experts, one at a time where each ends with a whole byte."""
        bits, (_, width, rows) = 4 if narrow else 8, self.dims
        whole_bytes = not narrow or width * rows % 2 == 0
        pieces = lambda: map(self.expert, which) if whole_bytes else (np.stack([self.expert(e) for e in which]),)  # noqa: E731
        stored = stored_codes(low.b, pieces, (len(which), width, rows), bits, name)
        return low.b.op("Cast", stored, to=TensorProto.INT8) if narrow else stored

    def stored_scales(self, low: Lowering) -> str:
        """All scales."""
        return low.b.constant(self.scales, name=f"{self.name}.scales")

    def columns(self, low: Lowering, scales: str) -> str:
        """Scales of one expert, [N] or [groups, N], for its weights [K, N]."""
        if self.group_size is None:
            return scales
        assert self.scales is not None
        (_, width, _), (_, groups, rows) = self.dims, self.scales.shape
        each = low.b.op(
            "Expand", low.b.op("Unsqueeze", scales, low.b.ints(1)), low.b.ints(groups, self.group_size, rows)
        )
        columns = low.b.op("Reshape", each, low.b.ints(groups * self.group_size, rows))
        return low.b.op("Slice", columns, low.b.ints(0), low.b.ints(width), low.b.ints(0))


def expert_weights(low: Lowering, parts: Sequence[Linear | CodedLinear]) -> ExpertWeights:
    """The weights of parts that read one input."""
    name = parts[0].name
    floats = [part for part in parts if isinstance(part, Linear)]
    if floats:
        return ExpertWeights(name, tuple(promise_of(graph_tools.held(low.gm, part.weight)) for part in floats))
    coded = [part for part in parts if isinstance(part, CodedLinear)]
    scales = [low.tensor(part.scale) for part in coded]
    facts = [meta.require(part.node, meta.LinearPart) for part in coded]
    bits = tuple(max(fact.bits_of(e) for fact in facts) for e in range(len(scales[0])))
    stacked = turned(scales) if scales[0].ndim == 3 else np.concatenate(scales, -1)
    codes = tuple(promise_of(graph_tools.held(low.gm, part.qdata)) for part in coded)
    return ExpertWeights(name, codes, bits, stacked, coded[0].group_size)


def turned(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[E, N, K] each as [E, K, all N]."""
    return np.ascontiguousarray(np.concatenate([array.swapaxes(1, 2) for array in arrays], -1))


def flat_rows(low: Lowering, name: str, width: int) -> str:
    """Rows [B, S, width] as [M, width]; once for all who read them."""
    return low.once(("flat rows", name), lambda: low.b.op("Reshape", name, low.b.ints(-1, width)))


def input_image(low: Lowering, source: Node) -> str:
    """What a part reads as float32 [M, K]: the image of codes, or a value that was never quantized."""
    found = low.value(source)
    if isinstance(found, Codes):
        return flat_rows(low, low.form.image(low, found), found.groups * found.width)
    return flat_rows(low, low.exact(source), values.width(source))


Step = Callable[[str, str], str]
"""(rows of an expert, its number) -> their products with its weights, [rows, N]; inside a loop."""


def expert_products(low: Lowering, members: list[ExpertProduct]) -> list[Value]:
    """[B, S, k, N] of each of several linears that read the same values and go through the same experts."""
    b, parts = low.b, list(zip(*(m.parts for m in members), strict=True))
    weights = [expert_weights(low, group) for group in parts]
    rows = expert_rows(low, members[0].indices, weights[0].dims[0])
    own = [choices_in(group[0].x) for group in parts]
    places = rows.order if all(own) else b.op("Div", rows.order, b.constant(np.int64(rows.choices)))
    steps = [low.form.expert_part(low, group[0].x, weight) for group, weight in zip(parts, weights, strict=True)]

    def step(number: str, done: str) -> str:
        expert = b.op("Gather", rows.active, number)
        ends = (b.op("Gather", name, b.op("Unsqueeze", expert, b.ints(0))) for name in (rows.starts, rows.stops))
        mine = b.op("Slice", places, *ends)
        y = reduce(lambda total, part: b.op("Add", total, part), (part(mine, expert) for part in steps))
        return b.op("SequenceInsert", done, y)

    results = b.loop(rows.count, b.op("SequenceEmpty", dtype=TensorProto.FLOAT), step)
    y = b.op("Gather", b.op("ConcatFromSequence", results, axis=0), rows.inverse)
    whole = b.op("Reshape", y, low.choice_shape(rows.choices))
    widths = [values.width(m.root) for m in members]
    return [Value(name) for name in b.split(whole, widths)]


def choices_of(node: Node) -> int:
    """k of a value [B, S, k, K] that each token has for each of its experts; 0 of others."""
    shape = values.shape(node)
    return int(shape[2]) if len(shape) == 4 else 0


def choices_in(source: Node) -> bool:
    """Whether each choice of a token has a value of its own, [B, S, k, K], or codes of such."""
    quantizer = Quantize.of(source)
    return choices_of(source if quantizer is None else quantizer.x) > 0
