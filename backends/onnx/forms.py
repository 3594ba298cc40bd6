"""What the profiles share: ranges and scales of the integer law, norms, rotary embedding and attention in standard operators.

A form says how the quantized operators of a graph look in ONNX. `IntegerForm` (profile ort), `QdqForm` (qdq) and
`WeightOnlyForm` (weight-only) differ in quantizers and linears; everything here is plain opset 21.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.expert_products import ExpertWeights, Step, input_image
from resq_compiler.backends.onnx.values import Cache, Codes, Emitted, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import values
from resq_compiler.ir.args import nodes_arg, operands, source
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Attention, Quantize, QuantizeDequantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering
    from resq_compiler.backends.onnx.plan import Product

FLT_MIN = float(np.finfo(np.float32).tiny)
MASKED = -1e9  # added to scores of masked keys: exp() of it is 0, and a row of padding stays finite


class Form(ABC):
    """How one profile writes a graph."""

    opset: ClassVar[int] = 21
    stacks_linears: ClassVar[bool] = False

    def start(self, low: Lowering) -> None:  # noqa: B027  (a hook that most forms leave empty)
        """Called once, before any node."""

    @abstractmethod
    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """Codes of x [B, S, width], or [B, S, groups, width] when groups > 1."""

    def quantize_static(self, low: Lowering, view: Quantize, x: str) -> Codes:
        """Codes of x [B, S, K] with a scale and zero point for all tokens. Raises BackendError: this profile makes them for each."""
        raise BackendError(
            f"onnx: node {view.node.name}: static scales of activations are for profile qdq; compile with "
            "activation_scales=dynamic for this one",
            node=view.node.name,
        )

    @abstractmethod
    def image(self, low: Lowering, codes: Codes) -> str:
        """The float image of codes, in the shape that was quantized."""

    @abstractmethod
    def linears(self, low: Lowering, members: list[Product]) -> list[Value]:
        """Linears that share their inputs, one value for each."""

    def expert_part(self, low: Lowering, source: Node, weights: ExpertWeights) -> Step:
        """The product of one part of a linear of experts, for the inside of a loop over experts: of float images, as this form has them."""
        b, image, stored = low.b, input_image(low, source), weights.stored(low)
        scales = None if weights.scales is None else weights.stored_scales(low)

        def product(rows: str, expert: str) -> str:
            weight = b.op("Gather", stored, expert)
            if scales is not None:
                weight = self.expert_image(low, weights, weight, b.op("Gather", scales, expert))
            return b.op("MatMul", b.op("Gather", image, rows), weight)

        return product

    def expert_image(self, low: Lowering, weights: ExpertWeights, codes: str, scales: str) -> str:
        """The float weights [K, N] of one expert, from its codes and scales."""
        return low.b.op("Mul", low.b.op("Cast", codes, to=TensorProto.FLOAT), weights.columns(low, scales))

    def cache_codes(self, low: Lowering, view: QuantizeDequantize, value: Value) -> Emitted:
        """The float image of cache codes of token-major heads, every part of every head on its own."""
        grouped = value.heads > 1  # what quantize takes for one group has three dimensions
        source = low.by_head(value) if grouped else low.tokens(value)
        pieces = low.b.split(source, [stop - start for _, start, stop in view.parts])
        images = []
        for piece, (bits, start, stop) in zip(pieces, view.parts, strict=True):
            codes = self.quantize(low, view.node, piece, bits, value.heads, stop - start, view.clip)
            images.append(self.image(low, codes))
        return Value(low.b.join(images), value.heads, split=True, by_head=grouped)

    def settled(self, low: Lowering, value: Emitted) -> Emitted:
        """A value whose emission was put off, emitted on its own."""
        return value

    def cache_input(self, low: Lowering, name: str, heads: int, width: int) -> Emitted:
        """Declare the past of one cache entry; returns its value."""
        return Value(low.b.input(name, TensorProto.FLOAT, ("batch", heads, "past", width)))

    def cache_output(self, low: Lowering, node: Node, name: str, heads: int, width: int) -> None:
        """Declare the present of one cache entry."""
        low.exact(node)
        low.b.output(name, TensorProto.FLOAT, ("batch", heads, "total", width))

    def append(self, low: Lowering, past: Emitted, new: Node, present: str, heads: int, width: int) -> Emitted:
        """New tokens behind the past."""
        if not isinstance(past, Value):
            raise BackendError(f"onnx: {present}: expected a past that is one tensor, got {past}")
        return Cache(past.name, low.token_major(new), present, heads, width)

    def rms_norm(self, low: Lowering, x: str, gain: str, eps: float) -> str:
        """The chain that ONNX Runtime knows as SimplifiedLayerNormalization."""
        b = low.b
        mean = b.op("ReduceMean", b.op("Pow", x, b.number(2.0)), b.ints(-1), keepdims=1)
        return b.op("Mul", b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.number(eps)))), gain)

    def rope(self, low: Lowering, value: Value, cos: Node, sin: Node, width: int) -> Value:
        """x cos + rotate_half(x) sin on token-major heads; columns past the table's width pass through."""
        b, x = low.b, low.by_head(value)
        turn = values.width(cos)
        x, *rest = b.split(x, [turn, width - turn] if turn < width else [turn])
        first, second = b.split(x, [turn // 2, turn - turn // 2])
        rotated = b.op("Concat", b.op("Neg", second), first, axis=-1)
        cos_name, sin_name = (self._token_table(low, t) for t in (cos, sin))
        y = b.op("Add", b.op("Mul", x, cos_name), b.op("Mul", rotated, sin_name))
        return Value(b.join([y, *rest]), value.heads, split=True, by_head=True)

    @staticmethod
    def _token_table(low: Lowering, node: Node) -> str:
        """cos or sin [B, 1, S, R] as [B, S, 1, R]."""
        return low.once(("token table", node), lambda: low.b.op("Transpose", low.exact(node), perm=[0, 2, 1, 3]))

    def attention(self, low: Lowering, view: Attention) -> Value:
        """Grouped heads by folding the queries of a group into rows: no repeated keys."""
        b, q, k, v = low.b, view.q, view.k, view.v
        heads, groups = int(values.shape(q)[1]), int(values.shape(k)[1])
        keys, entries, queries = low.exact(k), low.exact(v), low.exact(q)
        turned = low.once(("keys turned", k), lambda: b.op("Transpose", keys, perm=[0, 1, 3, 2]))
        if heads != groups:
            queries = b.op("Reshape", queries, b.ints(0, groups, -1, values.width(q)))
        scores = b.op("Mul", b.op("MatMul", queries, turned), b.number(view.scale))
        if heads != groups:
            scores = b.op("Reshape", scores, self._score_shape(low, heads, 1))
        weights = self._weights(low, self._seen(low, scores, view), view, heads)
        if heads != groups:
            weights = b.op("Reshape", weights, self._score_shape(low, groups, heads // groups))
        y = b.op("MatMul", weights, entries)
        if heads != groups:
            y = b.op("Reshape", y, b.ints(0, heads, -1, values.width(v)))
        return Value(b.op("Transpose", y, perm=[0, 2, 1, 3]), heads, split=True, by_head=True)

    def _weights(self, low: Lowering, scores: str, view: Attention, heads: int) -> str:
        """Softmax over the keys, and over a sink of each head that has no value."""
        b = low.b
        if view.sinks is None:
            return b.op("Softmax", scores, axis=-1)
        sinks = b.op("Reshape", low.exact(view.sinks), b.ints(1, heads, 1, 1))
        shape = b.op("Concat", low.size("input_ids", 0), b.ints(heads), low.size("input_ids", 1), b.ints(1), axis=0)
        joined = b.op("Concat", scores, b.op("Expand", sinks, shape), axis=-1)
        weights = b.op("Softmax", joined, axis=-1)
        return b.op("Slice", weights, b.ints(0), b.ints(-1), b.ints(-1))

    def _seen(self, low: Lowering, scores: str, view: Attention) -> str:
        """Scores with their soft-cap and mask."""
        b = low.b
        if view.softcap is not None:
            bounded = b.op("Tanh", b.op("Div", scores, b.number(view.softcap)))
            scores = b.op("Mul", bounded, b.number(view.softcap))
        return scores if view.mask is None else b.op("Add", scores, self.bias(low, view.mask))

    @staticmethod
    def _score_shape(low: Lowering, heads: int, repeat: int) -> str:
        """[0, heads, repeat * S, -1]: scores of all heads, or of the queries that share a key head."""

        def make() -> str:
            rows = low.size("input_ids", 1)
            rows = low.b.op("Mul", rows, low.b.ints(repeat)) if repeat > 1 else rows
            return low.b.op("Concat", low.b.ints(0, heads), rows, low.b.ints(-1), axis=0)

        return low.once(("score shape", heads, repeat), make)

    @staticmethod
    def bias(low: Lowering, mask: Node) -> str:
        """A mask as something to add to scores."""

        def make() -> str:
            name = low.exact(mask)
            additive = values.dtype(mask).is_floating_point
            return name if additive else low.b.op("Where", name, low.b.number(0.0), low.b.number(MASKED))

        return low.once(("bias", mask), make)


def low_and_scale(low: Lowering, x: str, bits: int, clip: float) -> tuple[str, str]:
    """lo = min(x, 0) clip and scale = max((hi - lo) / (2^b - 1), FLT_MIN) of the law, last dimension 1.

    The floor of the scale is put under hi, which saves a node.
    """
    b = low.b
    least, most = b.op("ReduceMin", x, b.ints(-1), keepdims=1), b.op("ReduceMax", x, b.ints(-1), keepdims=1)
    bottom, top = at_most(low, least, 0.0), at_least(low, most, least_top(bits, clip))
    return scale_of(low, bottom, top, bits, clip)


def least_top(bits: int, clip: float) -> float:
    """The least hi that gives a scale of at least FLT_MIN in float32: one below would be flushed to zero."""
    levels, ratio = np.float32(2**bits - 1), np.float32(clip)
    top = np.float32(levels / ratio * np.float32(FLT_MIN))
    while top * ratio / levels < np.float32(FLT_MIN):
        top = np.nextafter(top, np.float32(np.inf))
    return float(top)


def scale_of(low: Lowering, bottom: str, top: str, bits: int, clip: float) -> tuple[str, str]:
    """(clip lo, scale) of a range that holds 0."""
    b = low.b
    if clip != 1.0:
        bottom, top = b.op("Mul", bottom, b.number(clip)), b.op("Mul", top, b.number(clip))
    return bottom, b.op("Div", b.op("Sub", top, bottom), b.number(2.0**bits - 1))


def at_most(low: Lowering, x: str, bound: float) -> str:
    """min(x, bound) by Clip: on small tensors it takes a quarter of the time of Min with a scalar."""
    return low.b.op("Clip", x, "", low.b.number(bound))


def at_least(low: Lowering, x: str, bound: float) -> str:
    """max(x, bound)."""
    return low.b.op("Clip", x, low.b.number(bound))


def repeats_half(cos: Node) -> bool:
    """True when the table is cat(a, a) behind operators that keep that: its second half equals its first."""
    node: object = cos
    while is_call(node, aten.unsqueeze.default, aten.cos.default, aten.sin.default, aten.to.dtype, aten.mul.Tensor):
        if is_call(node, aten.mul.Tensor) and isinstance(operands(node)[1], Node):
            return False
        node = source(node)
    if not is_call(node, aten.cat.default):
        return False
    pieces = nodes_arg(node, "tensors")
    return len(pieces) == 2 and pieces[0] is pieces[1]
