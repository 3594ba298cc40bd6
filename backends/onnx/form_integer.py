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

import logging
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.expert_products import ExpertWeights, Step, choices_of, flat_rows
from resq_compiler.backends.onnx.form_fused import FusedForm
from resq_compiler.backends.onnx.forms import Form, least_top, low_and_scale, scale_of
from resq_compiler.backends.onnx.group_products import cut_inputs, group_product, runtime_one, tell_cut
from resq_compiler.backends.onnx.images import parts_image, parts_of_heads
from resq_compiler.backends.onnx.integer_weights import (
    StackedCodes,
    column_scales,
    correction_count,
    correction_rows,
    stacked_bias,
    stacked_scales,
    stored_codes,
    stored_zero,
)
from resq_compiler.backends.onnx.plan import Plan, Product, Term
from resq_compiler.backends.onnx.values import Codes, Emitted, Value
from torch.fx import Node

from resq_compiler.ir import values
from resq_compiler.ir.graph_tools import placeholders
from resq_compiler.ir.views import CacheParts, CodedLinear, Columns, Quantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering

log = logging.getLogger("resq_compiler")

WIDEST = 2**14
"""Columns of products with scales of rows outside; wider ones, logits, wait for memory, and would take it twice."""

Part = tuple[Emitted, list[Term]]
"""What a part reads, and the weights of all linears that read it."""


class IntegerForm(FusedForm):
    """Integer products on uint8 codes; Attention and RotaryEmbedding of opset 23."""

    opset: ClassVar[int] = 23
    stacks_linears: ClassVar[bool] = True

    def start(self, low: Lowering) -> None:
        super().start(low)
        self.padded = integer_only(low.plan)
        self.cut = cut_inputs(low.plan)
        tell_groups(low.plan)
        tell_cut(low.plan, self.cut)

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """uint8 codes and zero point, float32 scale; only the float tensor where nothing but its image is needed."""
        if groups > 1 and clip == 1.0 and node not in self.cut:
            return Codes(bits, groups, width, source=x)
        piece, zeros = self._zeros(low, node)
        if piece is not None and zeros:
            x = with_zeros(low, piece, zeros, least_top(bits, clip))
            width += abs(zeros)
            least, most = (low.b.op(kind, x, low.b.ints(-1), keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
            bottom, scale = scale_of(low, least, most, bits, clip)
        else:
            bottom, scale = low_and_scale(low, x, bits, clip)
        offset = self._offset(low, node, x, bits, groups)
        zero_point = low.b.op("QuantizeLinear", low.b.op("Neg", bottom), scale, offset, axis=-1, block_size=1)
        codes = low.b.op("QuantizeLinear", x, scale, zero_point, axis=-1, block_size=width)
        if clip != 1.0 and bits < 8:
            codes = low.b.op("Max", codes, low.b.constant(np.uint8(stored_zero(bits))))
        return Codes(bits, groups, width, codes, scale, zero_point, zeros=zeros)

    def _zeros(self, low: Lowering, node: Node) -> tuple[Columns | None, int]:
        """The piece that is quantized, and how many columns of zeros to put before (positive) or behind (negative) it.

        Zeros go to the first or the last piece of a source.
        """
        quantizer = Quantize.of(node)
        piece = Columns.of(quantizer.x) if quantizer is not None and node in self.padded else None
        if piece is None:
            return None, 0
        rows = correction_count(low.plan.terms_of[node])
        if piece.start == 0:
            return piece, rows
        return piece, -rows if piece.stop == values.width(piece.x) else 0

    @staticmethod
    def _offset(low: Lowering, node: Node, x: str, bits: int, groups: int) -> str:
        """stored_zero(bits) in the shape of a scale, [B, S, 1] or [B, S, groups, 1], made once for the whole graph; with S · choices rows
        where there are choices of experts, and those of x where it is read from a cache, of all tokens."""
        b, quantizer = low.b, Quantize.of(node)
        choices = choices_of(quantizer.x) if quantizer is not None else 0
        cached = (
            quantizer is not None and values.shape(quantizer.x)[1] != values.shape(placeholders(low.gm.graph)[0])[1]
        )
        of = x if cached else "input_ids"

        def shape() -> str:
            tail = b.ints(1) if groups == 1 else b.ints(groups, 1)
            tokens = low.size(of, 1)
            rows = b.op("Mul", tokens, b.ints(choices)) if choices else tokens
            return b.op("Concat", low.size("input_ids", 0), rows, tail, axis=0)

        def make() -> str:
            return b.op(
                "Expand", b.constant(np.uint8(stored_zero(bits))), low.once(("scale shape", of, groups, choices), shape)
            )

        return low.once(("offset", of, bits, groups, choices), make)

    def image(self, low: Lowering, codes: Codes) -> str:
        """(u - z) scale; Cast, Sub and Mul run in parallel and vectorized where DequantizeLinear with blocks does not."""

        def make() -> str:
            if codes.source:
                return parts_image(low, codes.source, ((codes.bits, 0, codes.width),))
            centred = (low.b.op("Cast", name, to=TensorProto.FLOAT) for name in (codes.codes, codes.zero_point))
            return low.b.op("Mul", low.b.op("Sub", *centred), codes.scale)

        return low.once(("image", codes.codes or codes.source), make)

    def linears(self, low: Lowering, members: list[Product]) -> list[Value]:
        """One product for each part, or group of its columns, over all members; float ones where inputs have a scale for each head, or
        weights for each group."""
        sources = [low.value(s) for s in members[0].sources]
        stacked: list[list[Term]] = [list(terms) for terms in zip(*(m.terms for m in members), strict=True)]
        coded = [
            s
            for s, node in zip(sources, members[0].sources, strict=True)
            if isinstance(s, Codes) and (s.groups == 1 or node in self.cut)
        ]
        if len(coded) == len(sources) and not has_groups(members[0]):
            total = sum_of(low, [self._product(low, *part) for part in zip(coded, stacked, strict=True)])
        else:
            total = self._float_product(low, list(zip(sources, stacked, strict=True)), members[0].sources)
        bias = stacked_bias(members)
        if bias is not None:  # ONNX Runtime fuses Add, and scales the bias
            total = low.b.op("Sub", total, low.b.constant(-bias))
        return [Value(name) for name in low.b.split(total, [m.out_features for m in members])]

    def expert_part(self, low: Lowering, source: Node, weights: ExpertWeights) -> Step:
        """Exact integer products where rows have one scale: Σ (u - c) w - (z - c) Σ w in int32, then both scales."""
        codes = low.value(source)
        if (
            not isinstance(codes, Codes)
            or codes.groups != 1
            or weights.scales is None
            or weights.group_size is not None
        ):
            return super().expert_part(low, source, weights)
        b, zero = low.b, stored_zero(codes.bits)
        u, z, scale = (
            flat_rows(low, n, w) for n, w in ((codes.codes, codes.width), (codes.zero_point, 1), (codes.scale, 1))
        )
        shift = low.once(
            ("shift", z), lambda: b.op("Sub", b.op("Cast", z, to=TensorProto.INT32), b.constant(np.int32(zero)))
        )
        stored, scales = weights.stored(low), weights.stored_scales(low)
        sums = b.constant(weights.row_sums, name=f"{weights.name}.row_sums")

        def product(rows: str, expert: str) -> str:
            row_codes, row_shift, row_scale = (b.op("Gather", name, rows) for name in (u, shift, scale))
            weight, row_sums, column_scale = (b.op("Gather", name, expert) for name in (stored, sums, scales))
            accumulator = b.op("MatMulInteger", row_codes, weight, b.constant(np.uint8(zero)))
            exact = b.op("Sub", accumulator, b.op("Mul", row_shift, row_sums))
            return b.op("Mul", b.op("Mul", b.op("Cast", exact, to=TensorProto.FLOAT), column_scale), row_scale)

        return product

    def _product(self, low: Lowering, source: Codes, terms: list[Term]) -> str:
        if source.groups > 1:
            return group_product(low, source, terms)
        b = low.b
        rows = correction_count(low.plan.terms_of[terms[0].source])
        weight = self._weight(low, terms, rows, first=source.zeros > 0)
        padded = low.once(("padded", source.codes), lambda: self._padded(low, source, rows))
        accumulator = b.op("MatMulInteger", padded, weight, b.constant(np.uint8(stored_zero(source.bits))))
        scales = stacked_scales(b, terms)
        total = b.op("Cast", accumulator, to=TensorProto.FLOAT)
        if sum(t.qdata.shape[0] for t in terms) > WIDEST:
            return b.op("Mul", total, b.op("Mul", source.scale, scales))
        return b.op("Mul", b.op("Mul", total, b.op("Mul", runtime_one(low), scales)), source.scale)

    @staticmethod
    def _padded(low: Lowering, source: Codes, rows: int) -> str:
        if rows == 0 or source.zeros:
            return source.codes
        repeated = low.b.op("Expand", source.zero_point, low.b.ints(1, 1, rows))
        return low.b.op("Concat", source.codes, repeated, axis=-1)

    @staticmethod
    def _weight(low: Lowering, terms: list[Term], rows: int, *, first: bool) -> str:
        """int8 [K + rows, N], correction rows first or last; 4-bit codes are stored INT4 and cast when the model is loaded."""
        b, name, codes = low.b, terms[0].name, StackedCodes(tuple(terms))
        extra, (width, outputs) = correction_rows(codes.make(), rows), codes.dims
        if codes.bits > 4:
            whole = lambda: (extra, codes.make()) if first else (codes.make(), extra)  # noqa: E731
            return stored_codes(b, whole, (width + rows, outputs), codes.bits, name)
        wide = b.op("Cast", stored_codes(b, codes.pieces, codes.dims, codes.bits, name), to=TensorProto.INT8)
        if rows == 0:
            return wide
        correction = b.constant(extra, name=f"{name}.correction")
        return b.join([correction, wide] if first else [wide, correction], axis=0)

    def _float_product(self, low: Lowering, parts: list[Part], sources: tuple[Node, ...]) -> str:
        """Images side by side times the float image of the codes, which is made when the model is loaded."""
        heads = parts_of_heads(low, sources)
        if heads is not None:
            return self._product_by_head(low, parts, *heads)
        images = [low.tokens(flat_image(low, self, source)) for source, _ in parts]
        weights = [float_weight(low, terms) for _, terms in parts]
        return low.b.op("MatMul", low.b.join(images), low.b.join(weights, axis=0))

    def _product_by_head(self, low: Lowering, parts: list[Part], value: Node, bits: CacheParts) -> str:
        """The same with columns in the order of the heads, [parts of head 0 | parts of head 1 ..]: no data is moved."""
        b, (_, heads, _, width) = low.b, values.shape(value)
        image = low.once(("heads image", value), lambda: parts_image(low, low.by_head(low.token_major(value)), bits))
        weights = [
            b.op("Reshape", float_weight(low, terms), b.ints(heads, stop - start, -1))
            for (_, terms), (_, start, stop) in zip(parts, bits, strict=True)
        ]
        joined = b.op("Reshape", b.join(weights, axis=1), b.ints(heads * width, -1))
        return b.op("MatMul", low.tokens(Value(image, heads, by_head=True)), joined)


def integer_only(plan: Plan) -> set[Node]:
    """quantize nodes that are read by integer products alone."""
    mixed: set[Node] = set()
    found: set[Node] = set()
    for members in plan.groups.values():
        sources = members[0].sources
        quantizers = [Quantize.of(source) for source in sources]
        one_group = all(quantizer is not None and quantizer.groups == 1 for quantizer in quantizers)
        (found if one_group and not has_groups(members[0]) else mixed).update(sources)
    other = {s for s in found if any((linear := CodedLinear.of(user)) is None or linear.of_experts for user in s.users)}
    return found - mixed - other


def tell_groups(plan: Plan) -> None:
    """Warn where codes of values meet weights whose scales are of groups of columns: these products are float."""
    quantized = [root for root, members in plan.groups.items() if any(map(Quantize.of, members[0].sources))]
    grouped = [root.name for root in quantized if has_groups(plan.groups[root][0])]
    if grouped:
        log.warning(
            "onnx: %d of %d linears (%s, ...) become float products: their weights have scales for groups of columns; "
            "for integer products compile with weight_group_size=none",
            len(grouped), len(quantized), grouped[0],
        )  # fmt: skip


def has_groups(product: Product) -> bool:
    """Whether the weights have scales for groups of columns."""
    return any(term.group_size is not None for term in product.terms)


def with_zeros(low: Lowering, piece: Columns, zeros: int, least: float) -> str:
    """The columns of `piece` cut out of their source with zeros before or behind them, in one Pad with a negative end.

    The zeros stand in for clipping the range to 0, and their codes, equal to the zero point, are the correction columns. They are
    `least`, the least number that keeps the scale normal: a row of zeros has a scale of FLT_MIN as in the law.
    """
    before, behind = max(zeros, 0) - piece.start, max(-zeros, 0) - (values.width(piece.x) - piece.stop)
    pads = low.b.ints(0, 0, before, 0, 0, behind)
    return low.b.op("Pad", low.exact(piece.x), pads, low.b.number(least))


def sum_of(low: Lowering, names: list[str]) -> str:
    """The sum of several tensors, left to right."""
    total = names[0]
    for name in names[1:]:
        total = low.b.op("Add", total, name)
    return total


def flat_image(low: Lowering, form: Form, source: Emitted) -> Value:
    """The float input of a linear: the image of codes, or a value that was never quantized."""
    if isinstance(source, Codes):
        return Value(form.image(low, source), source.groups, by_head=source.groups > 1)
    return Value(low.fx_layout(source))


def float_weight(low: Lowering, terms: list[Term]) -> str:
    """codes * scale as float32 [K, N], folded into a constant when the model is loaded."""
    codes = StackedCodes(tuple(terms))
    stored = stored_codes(low.b, codes.pieces, codes.dims, codes.bits, terms[0].name)
    return low.b.op("Mul", low.b.op("Cast", stored, to=TensorProto.FLOAT), column_scales(low.b, terms))
