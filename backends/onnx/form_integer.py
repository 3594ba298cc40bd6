"""Profile ort: integer matrix products that ONNX Runtime fuses, exact.

Codes are stored uint8 with the law's code q at q + 256 - 2^(b-1): the largest code is 255, so QuantizeLinear's own saturation is
the upper clamp, and MatMulInteger takes one constant zero point c = 256 - 2^b. The zero point of a token is not constant; with u the
stored codes and z the stored zero point of a row,

    Σ_k (u - z) w = Σ_k (u - c) w - (z - c) Σ_k w

and the second sum is done inside the same product: z is appended as extra columns of u, and -Σ_k w, cut into int8 pieces, as extra
rows of w. int32 throughout; then float32(acc) * scale_w * scale_x. ONNX Runtime makes MatMulInteger, Cast and the Mul by
scale_w one MatMulIntegerToFloat. INT4 weights are cast to int8 at load: 4 bits on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.forms import FLT_MIN, CacheParts, Form, low_and_scale, scale_of
from resq_compiler.backends.onnx.images import parts_image, parts_of_heads
from resq_compiler.backends.onnx.plan import Term
from resq_compiler.backends.onnx.values import Cache, Codes, PendingCodes, Value
from torch.fx import Node

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering
    from resq_compiler.backends.onnx.plan import LinearSum, Plan

PIECE = 127  # largest magnitude of one correction row
WIDEST = (
    2**14
)  # columns of products with scales of rows outside; wider ones, logits, wait for memory, and would take it twice


class IntegerForm(Form):
    """Integer products on uint8 codes; Attention and RotaryEmbedding of opset 23."""

    opset: ClassVar[int] = 23
    stacks_linears: ClassVar[bool] = True

    def start(self, low: Lowering) -> None:
        self.padded = integer_only(low.plan)

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """uint8 codes and zero point, float32 scale; only the float tensor where nothing but its image is needed."""
        if groups > 1 and clip == 1.0:
            return Codes(bits, groups, width, source=x)
        zeros = self._zeros(low, node)
        if zeros:
            x = with_zeros(low, node.args[0], zeros, bits)  # type: ignore[arg-type]
            width += abs(zeros)
            ends = [low.b.op(kind, x, low.b.ints(-1), keepdims=1) for kind in ("ReduceMin", "ReduceMax")]
            bottom, scale = scale_of(low, *ends, bits, clip)
        else:
            bottom, scale = low_and_scale(low, x, bits, clip)
        offset = self._offset(low, bits, groups)
        zero_point = low.b.op("QuantizeLinear", low.b.op("Neg", bottom), scale, offset, axis=-1, block_size=1)
        codes = low.b.op("QuantizeLinear", x, scale, zero_point, axis=-1, block_size=width)
        if clip != 1.0 and bits < 8:
            codes = low.b.op("Max", codes, low.b.constant(np.uint8(stored_zero(bits))))
        return Codes(bits, groups, width, codes, scale, zero_point, zeros=zeros)

    def _zeros(self, low: Lowering, node: Node) -> int:
        """Columns of zeros to put before (positive) or behind (negative) a piece that is the first or last of its source."""
        piece = node.args[0]
        if node not in self.padded or not is_call(piece, ops.columns):
            return 0
        source, start, stop = piece.args  # type: ignore[union-attr]
        rows = correction_count(low.plan.terms_of[node])
        if start == 0:
            return rows
        return -rows if stop == source.meta["val"].shape[-1] else 0  # type: ignore[union-attr]

    @staticmethod
    def _offset(low: Lowering, bits: int, groups: int) -> str:
        """stored_zero(bits) in the shape of a scale, [B, S, 1] or [B, S, groups, 1]: made once for the whole graph."""
        b = low.b

        def shape() -> str:
            tail = b.ints(1) if groups == 1 else b.ints(groups, 1)
            return b.op("Concat", low.size("input_ids", 0), low.size("input_ids", 1), tail, axis=0)

        def make() -> str:
            return b.op("Expand", b.constant(np.uint8(stored_zero(bits))), low.once(("scale shape", groups), shape))

        return low.once(("offset", bits, groups), make)

    def image(self, low: Lowering, codes: Codes) -> str:
        """(u - z) scale; Cast, Sub and Mul run in parallel and vectorized where DequantizeLinear with blocks does not."""

        def make() -> str:
            if codes.source:
                return parts_image(low, codes.source, ((codes.bits, 0, codes.width),))
            centred = (low.b.op("Cast", name, to=TensorProto.FLOAT) for name in (codes.codes, codes.zero_point))
            return low.b.op("Mul", low.b.op("Sub", *centred), codes.scale)

        return low.once(("image", codes.codes or codes.source), make)

    def linears(self, low: Lowering, members: list[LinearSum]) -> list[Value]:
        """One product for each part over all members; float products where the input has a scale for each head."""
        sources = [low.value(s) for s in members[0].sources]
        parts = list(zip(sources, *(m.terms for m in members), strict=True))
        if all(isinstance(s, Codes) and s.groups == 1 for s in sources):
            total = sum_of(low, [self._product(low, source, list(terms)) for source, *terms in parts])
        else:
            total = self._float_product(low, parts, members[0].sources)
        if any(m.bias is not None for m in members):
            total = low.b.op(
                "Sub", total, low.b.constant(-stacked_bias(members))
            )  # ONNX Runtime fuses Add, and scales the bias
        if len(members) == 1:
            return [Value(total)]
        sizes = low.b.ints(*(m.out_features for m in members))
        return [Value(name) for name in low.b.op("Split", total, sizes, outputs=len(members), axis=-1)]

    def _product(self, low: Lowering, source: Codes, terms: list[Term]) -> str:
        b = low.b
        rows = correction_count(low.plan.terms_of[terms[0].source])
        codes = np.concatenate([t.codes for t in terms], 1)
        weight = self._weight(low, codes, max(t.weight_bits for t in terms), rows, source.zeros > 0, terms[0].name)
        padded = low.once(("padded", source.codes), lambda: self._padded(low, source, rows))
        accumulator = b.op("MatMulInteger", padded, weight, b.constant(np.uint8(stored_zero(source.bits))))
        scales = b.constant(np.concatenate([t.scales for t in terms]), name=f"{terms[0].name}.scales")
        total = b.op("Cast", accumulator, to=TensorProto.FLOAT)
        if codes.shape[1] > WIDEST:
            return b.op("Mul", total, b.op("Mul", source.scale, scales))
        return b.op("Mul", b.op("Mul", total, b.op("Mul", runtime_one(low), scales)), source.scale)

    @staticmethod
    def _padded(low: Lowering, source: Codes, rows: int) -> str:
        if rows == 0 or source.zeros:
            return source.codes
        repeated = low.b.op("Expand", source.zero_point, low.b.ints(1, 1, rows))
        return low.b.op("Concat", source.codes, repeated, axis=-1)

    @staticmethod
    def _weight(low: Lowering, codes: np.ndarray, bits: int, rows: int, first: bool, name: str) -> str:
        """int8 [K + rows, N], correction rows first or last; 4-bit codes are stored INT4 and cast when the model is loaded."""
        extra = correction_rows(codes, rows)
        if bits > 4:
            return low.b.constant(
                np.concatenate([extra, codes] if first else [codes, extra]).astype(np.int8), name=f"{name}.codes"
            )
        wide = low.b.op("Cast", low.b.int4(codes, f"{name}.codes"), to=TensorProto.INT8)
        if rows == 0:
            return wide
        correction = low.b.constant(extra, name=f"{name}.correction")
        return low.b.op("Concat", *([correction, wide] if first else [wide, correction]), axis=0)

    def _float_product(self, low: Lowering, parts: list[tuple], sources: tuple[Node, ...]) -> str:
        """Images side by side times the float image of the codes, which is made when the model is loaded."""
        heads = parts_of_heads(low, sources)
        if heads is not None:
            return self._product_by_head(low, parts, *heads)
        images, weights = [], []
        for source, *terms in parts:
            images.append(low.tokens(flat_image(low, self, source)))
            weights.append(float_weight(low, terms))
        joined = images[0] if len(images) == 1 else low.b.op("Concat", *images, axis=-1)
        weight = weights[0] if len(weights) == 1 else low.b.op("Concat", *weights, axis=0)
        return low.b.op("MatMul", joined, weight)

    def _product_by_head(self, low: Lowering, parts: list[tuple], value: Node, bits: CacheParts) -> str:
        """The same with columns in the order of the heads, [parts of head 0 | parts of head 1 ..]: no data is moved."""
        b, heads = low.b, int(value.meta["val"].shape[1])
        image = low.once(("heads image", value), lambda: parts_image(low, low.by_head(low.token_major(value)), bits))
        weights = [b.op("Reshape", float_weight(low, terms), b.ints(heads, stop - start, -1))
                   for (_, *terms), (_, start, stop) in zip(parts, bits, strict=True)]  # fmt: skip
        joined = weights[0] if len(weights) == 1 else b.op("Concat", *weights, axis=1)
        width = heads * int(value.meta["val"].shape[-1])
        return b.op("MatMul", low.tokens(Value(image, heads, by_head=True)), b.op("Reshape", joined, b.ints(width, -1)))

    def cache_codes(self, low: Lowering, node: Node, value: Value, parts: CacheParts, clip: float) -> Any:
        """Put off until attention, which has the other entry too."""
        return PendingCodes(node, value, parts, clip)

    def settled(self, low: Lowering, value: Any) -> Any:
        if not isinstance(value, PendingCodes):
            return value
        make = lambda: self._entries(low, value, value.value)  # noqa: E731
        return low.once(("settled", value.node), make)

    def _entries(self, low: Lowering, pending: PendingCodes, value: Value) -> Value:
        """The image of cache codes; `value` may hold more heads than `pending` says."""
        if pending.clip != 1.0:
            return super().cache_codes(low, pending.node, value, pending.parts, pending.clip)
        return Value(parts_image(low, low.by_head(value), pending.parts), value.heads, split=True, by_head=True)

    def append(self, low: Lowering, past: Value, new: Node, present: str, heads: int, width: int) -> Any:
        value = low.value(new)
        pending = isinstance(value, PendingCodes)
        return (
            Cache(past.name, value, present, heads, width)
            if pending
            else super().append(low, past, new, present, heads, width)
        )

    def rms_norm(self, low: Lowering, x: str, gain: str, eps: float) -> str:
        return low.b.op("RMSNormalization", x, gain, axis=-1, epsilon=eps)

    def rope(self, low: Lowering, value: Value, cos: Node, sin: Node, width: int) -> Value:
        """RotaryEmbedding on [B, S, heads * D], with the half tables of the graph: no limit on positions."""
        from resq_compiler.backends.onnx.emit_ops import repeats_half

        turn = int(cos.meta["val"].shape[-1])
        if not (repeats_half(cos) and repeats_half(sin)):
            return super().rope(low, value, cos, sin, width)
        tables = [self._half_table(low, t, turn // 2) for t in (cos, sin)]
        partial = {"rotary_embedding_dim": turn} if turn < width else {}
        y = low.b.op("RotaryEmbedding", low.tokens(value), *tables, num_heads=value.heads, **partial)
        return Value(y, value.heads, split=True)

    @staticmethod
    def _half_table(low: Lowering, node: Node, half: int) -> str:
        """cos or sin [B, 1, S, 2 half] as [B, S, half]."""

        def make() -> str:
            first = low.b.op("Slice", low.exact(node), low.b.ints(0), low.b.ints(half), low.b.ints(-1))
            return low.b.op("Squeeze", first, low.b.ints(1))

        return low.once(("half table", node), make)

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
        """The Attention operator, which also appends to the cache, when nothing else reads the cache here."""
        keys, values = low.value(k), low.value(v)
        own = all(isinstance(c, Cache) and attention_readers(n) == 1 for c, n in ((keys, k), (values, v)))
        if not own or mask is None or softcap is not None:
            return super().attention(low, node, q, k, v, mask, scale, softcap)
        queries = low.token_major(q)
        key_tokens, value_tokens = (low.tokens(x) for x in self._new_entries(low, keys.new, values.new))
        y, new_keys, new_values = low.b.op(
            "Attention", low.tokens(queries), key_tokens, value_tokens, self.bias(low, mask), keys.past, values.past,
            outputs=[low.b.fresh("attention"), keys.present, values.present],
            q_num_heads=queries.heads, kv_num_heads=keys.heads, scale=scale,
        )  # fmt: skip
        low.memo["present", keys.present], low.memo["present", values.present] = new_keys, new_values
        return Value(y, queries.heads, split=True)

    def _new_entries(self, low: Lowering, keys: Value | PendingCodes, values: Value | PendingCodes) -> list[Value]:
        """Keys and values of the new tokens; quantized in one go, as heads side by side, where they are alike."""
        pending = isinstance(keys, PendingCodes) and isinstance(values, PendingCodes)
        if not pending or (keys.parts, keys.clip, keys.value.heads) != (values.parts, values.clip, values.value.heads):
            return [self.settled(low, keys), self.settled(low, values)]
        heads = keys.value.heads
        both = low.b.op("Concat", low.by_head(keys.value), low.by_head(values.value), axis=2)
        joined = Value(both, 2 * heads, split=True, by_head=True)
        image = self._entries(low, keys, joined)
        width = heads * int(keys.node.meta["val"].shape[-1])
        names = low.b.op("Split", low.tokens(image), low.b.ints(width, width), outputs=2, axis=-1)
        return [Value(name, heads, split=True) for name in names]


def integer_only(plan: Plan) -> set[Node]:
    """quantize nodes that are read by integer products alone."""
    mixed: set[Node] = set()
    found: set[Node] = set()
    for members in plan.groups.values():
        sources = members[0].sources
        one_group = all(is_call(s, ops.quantize) and (s.args[2] if len(s.args) > 2 else 1) == 1 for s in sources)
        (found if one_group else mixed).update(sources)
    other = {s for s in found if any(not is_call(user, ops.quantized_linear) for user in s.users)}
    return found - mixed - other


def with_zeros(low: Lowering, piece: Node, zeros: int, bits: int) -> str:
    """The columns of `piece` cut out of their source with zeros before or behind them, in one Pad with a negative end.

    The zeros stand in for clipping the range to 0, and their codes, equal to the zero point, are the correction columns. They are
    the least positive number that keeps the scale normal: a row of zeros has a scale of FLT_MIN as in the law.
    """
    b = low.b
    source, start, stop = piece.args
    width = int(source.meta["val"].shape[-1])  # type: ignore[union-attr]
    before, behind = -int(start) + max(zeros, 0), int(stop) - width + max(-zeros, 0)  # type: ignore[arg-type]
    name = low.exact(source)
    return b.op("Pad", name, b.ints(0, 0, before, 0, 0, behind), b.number((2**bits - 1) * FLT_MIN))


def attention_readers(node: Node) -> int:
    """How many attention operators read a cache entry."""
    return sum(is_call(user, ops.attention) for user in node.users)


def stored_zero(bits: int) -> int:
    """The stored form of the law's smallest code."""
    return 256 - 2**bits


def correction_count(terms: list[Term]) -> int:
    """How many rows of at most PIECE hold the column sums of every weight that reads one input."""
    return max(-(-int(np.abs(t.codes.astype(np.int64).sum(0)).max(initial=0)) // PIECE) for t in terms)


def correction_rows(codes: np.ndarray, rows: int) -> np.ndarray:
    """int8 [rows, N] that sum to minus the column sums of codes [K, N]."""
    rest = -codes.astype(np.int64).sum(0)
    result = np.empty((rows, codes.shape[1]), np.int8)
    for row in result:
        row[:] = np.clip(rest, -PIECE, PIECE)
        rest = rest - row
    if rest.any():
        raise AssertionError("too few correction rows")
    return result


def stacked_bias(members: list[LinearSum]) -> np.ndarray:
    """The biases of all members, zeros where there is none."""
    return np.concatenate(
        [
            np.zeros(m.out_features, np.float32) if m.bias is None else m.bias.detach().cpu().float().numpy()
            for m in members
        ]
    )


def runtime_one(low: Lowering) -> str:
    """1.0, [1], known only at run time, in the place of the scale of the rows: ONNX Runtime fuses products whose scale is a product of
    two. Scales of rows inside the fused operator are multiplied by one thread, after the product; a Mul runs in all threads."""

    def make() -> str:
        size = low.size("input_ids", 1)
        return low.b.op("Cast", low.b.op("Equal", size, size), to=TensorProto.FLOAT)

    return low.once("one", make)


def sum_of(low: Lowering, names: list[str]) -> str:
    """The sum of several tensors, left to right."""
    total = names[0]
    for name in names[1:]:
        total = low.b.op("Add", total, name)
    return total


def flat_image(low: Lowering, form: Form, source: Codes | Value) -> Value:
    """The float input of a linear: the image of codes, or a value that was never quantized."""
    if isinstance(source, Codes):
        return Value(form.image(low, source), source.groups, by_head=source.groups > 1)
    return Value(low.fx_layout(source))


def float_weight(low: Lowering, terms: list[Term]) -> str:
    """codes * scale as float32 [K, N], folded into a constant when the model is loaded."""
    codes, name = np.concatenate([t.codes for t in terms], 1), terms[0].name
    wide_codes = max(t.weight_bits for t in terms) > 4
    stored = low.b.constant(codes, name=f"{name}.codes") if wide_codes else low.b.int4(codes, f"{name}.codes")
    scales = low.b.constant(np.concatenate([t.scales for t in terms]), name=f"{name}.scales")
    return low.b.op("Mul", low.b.op("Cast", stored, to=TensorProto.FLOAT), scales)
