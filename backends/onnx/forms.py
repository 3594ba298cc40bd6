"""What the profiles share: ranges and scales of the integer law, norms, rotary embedding and attention in standard operators.

A form says how the quantized operators of a graph look in ONNX. `IntegerForm` (profile ort), `QdqForm` (qdq) and
`WeightOnlyForm` (weight-only) differ in quantizers and linears; everything here is plain opset 21.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.values import Cache, Codes, Value
from torch.fx import Node

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering
    from resq_compiler.backends.onnx.plan import LinearSum

FLT_MIN = float(np.finfo(np.float32).tiny)
MASKED = -1e9  # added to scores of masked keys: exp() of it is 0, and a row of padding stays finite

CacheParts = tuple[tuple[int, int, int], ...]


class Form(ABC):
    """How one profile writes a graph."""

    opset: ClassVar[int] = 21
    stacks_linears: ClassVar[bool] = False

    def start(self, low: Lowering) -> None:  # noqa: B027  (a hook that most forms leave empty)
        """Called once, before any node."""

    @abstractmethod
    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """Codes of x [B, S, width], or [B, S, groups, width] when groups > 1."""

    @abstractmethod
    def image(self, low: Lowering, codes: Codes) -> str:
        """The float image of codes, in the shape that was quantized."""

    @abstractmethod
    def linears(self, low: Lowering, members: list[LinearSum]) -> list[Value]:
        """Linears that share their inputs, one value for each."""

    def cache_codes(self, low: Lowering, node: Node, value: Value, parts: CacheParts, clip: float) -> Any:
        """The float image of cache codes, every part of every head on its own."""
        name = low.by_head(value)
        sizes = [stop - start for _, start, stop in parts]
        pieces = [name] if len(parts) == 1 else low.b.op("Split", name, low.b.ints(*sizes), outputs=len(parts), axis=-1)
        images = []
        for piece, (bits, start, stop) in zip(pieces, parts, strict=True):
            codes = self.quantize(low, node, piece, bits, value.heads, stop - start, clip)
            images.append(self.image(low, codes))
        joined = images[0] if len(images) == 1 else low.b.op("Concat", *images, axis=-1)
        return Value(joined, value.heads, split=True, by_head=True)

    def settled(self, low: Lowering, value: Any) -> Any:
        """A value whose emission was put off, emitted on its own."""
        return value

    def cache_input(self, low: Lowering, name: str, heads: int, width: int) -> Any:
        """Declare the past of one cache entry; returns its value."""
        return Value(low.b.input(name, TensorProto.FLOAT, ("batch", heads, "past", width)))

    def cache_output(self, low: Lowering, node: Node, name: str, heads: int, width: int) -> None:
        """Declare the present of one cache entry."""
        low.exact(node)
        low.b.output(name, TensorProto.FLOAT, ("batch", heads, "total", width))

    def append(self, low: Lowering, past: Value, new: Node, present: str, heads: int, width: int) -> Any:
        """New tokens behind the past."""
        return Cache(past.name, low.token_major(new), present, heads, width)

    def rms_norm(self, low: Lowering, x: str, gain: str, eps: float) -> str:
        """The chain that ONNX Runtime knows as SimplifiedLayerNormalization."""
        b = low.b
        mean = b.op("ReduceMean", b.op("Pow", x, b.number(2.0)), b.ints(-1), keepdims=1)
        return b.op("Mul", b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.number(eps)))), gain)

    def rope(self, low: Lowering, value: Value, cos: Node, sin: Node, width: int) -> Value:
        """x cos + rotate_half(x) sin on token-major heads; columns past the table's width pass through."""
        b, x = low.b, low.by_head(value)
        turn = int(cos.meta["val"].shape[-1])
        rest: list[str] = []
        if turn < width:
            x, tail = b.op("Split", x, b.ints(turn, width - turn), outputs=2, axis=-1)
            rest = [tail]
        first, second = b.op("Split", x, b.ints(turn // 2, turn - turn // 2), outputs=2, axis=-1)
        rotated = b.op("Concat", b.op("Neg", second), first, axis=-1)
        cos_name, sin_name = (self._token_table(low, t) for t in (cos, sin))
        y = b.op("Add", b.op("Mul", x, cos_name), b.op("Mul", rotated, sin_name))
        return Value(b.op("Concat", y, *rest, axis=-1) if rest else y, value.heads, split=True, by_head=True)

    @staticmethod
    def _token_table(low: Lowering, node: Node) -> str:
        """cos or sin [B, 1, S, R] as [B, S, 1, R]."""
        return low.once(("token table", node), lambda: low.b.op("Transpose", low.exact(node), perm=[0, 2, 1, 3]))

    def attention(
        self,
        low: Lowering,
        node: Node,
        q: Node,
        k: Node,
        v: Node,
        mask: Node | None,
        scale: float,
        softcap: float | None,
    ) -> Value:
        """Grouped heads by folding the queries of a group into rows: no repeated keys."""
        b = low.b
        heads, groups = int(q.meta["val"].shape[1]), int(k.meta["val"].shape[1])
        keys, values = low.exact(k), low.exact(v)
        turned = low.once(("keys turned", k), lambda: b.op("Transpose", keys, perm=[0, 1, 3, 2]))
        queries = low.exact(q)
        if heads != groups:
            queries = b.op("Reshape", queries, b.ints(0, groups, -1, int(q.meta["val"].shape[-1])))
        scores = b.op("Mul", b.op("MatMul", queries, turned), b.number(scale))
        scores = b.op("Reshape", scores, self._score_shape(low, heads, 1)) if heads != groups else scores
        if softcap is not None:
            scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, b.number(softcap))), b.number(softcap))
        if mask is not None:
            scores = b.op("Add", scores, self.bias(low, mask))
        weights = b.op("Softmax", scores, axis=-1)
        weights = (
            b.op("Reshape", weights, self._score_shape(low, groups, heads // groups)) if heads != groups else weights
        )
        y = b.op("MatMul", weights, values)
        if heads != groups:
            y = b.op("Reshape", y, b.ints(0, heads, -1, int(v.meta["val"].shape[-1])))
        return Value(b.op("Transpose", y, perm=[0, 2, 1, 3]), heads, split=True, by_head=True)

    @staticmethod
    def _score_shape(low: Lowering, heads: int, repeat: int) -> str:
        """[0, heads, repeat * S, -1]: scores of all heads, or of the queries that share a key head."""

        def make() -> str:
            rows = (
                low.b.op("Mul", low.size("input_ids", 1), low.b.ints(repeat))
                if repeat > 1
                else low.size("input_ids", 1)
            )
            return low.b.op("Concat", low.b.ints(0, heads), rows, low.b.ints(-1), axis=0)

        return low.once(("score shape", heads, repeat), make)

    @staticmethod
    def bias(low: Lowering, mask: Node) -> str:
        """A mask as something to add to scores."""

        def make() -> str:
            name = low.exact(mask)
            boolean = mask.meta["val"].dtype.is_floating_point is False
            return low.b.op("Where", name, low.b.number(0.0), low.b.number(MASKED)) if boolean else name

        return low.once(("bias", mask), make)


def low_and_scale(low: Lowering, x: str, bits: int, clip: float) -> tuple[str, str]:
    """lo = min(x, 0) clip and scale = max((hi - lo) / (2^b - 1), FLT_MIN) of the law, last dimension 1.

    The floor of the scale is put under hi: the quotient of its multiple is FLT_MIN exactly, and one node is saved.
    """
    b, levels = low.b, (2**bits - 1) / clip
    least, most = b.op("ReduceMin", x, b.ints(-1), keepdims=1), b.op("ReduceMax", x, b.ints(-1), keepdims=1)
    bottom, top = at_most(low, least, 0.0), at_least(low, most, levels * FLT_MIN)
    return scale_of(low, bottom, top, bits, clip)


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
