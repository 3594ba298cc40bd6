"""Profiles qdq and weight-only: standard operators of opset 21, both branches of every linear visible.

qdq: QuantizeLinear and DequantizeLinear with a scale and zero point computed at run time, INT4 and INT8, blocks of the whole
part (or of one head). weight-only: the same codes by Div, Round, Clip, for consumers that take INT4 and INT8 for weights only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.expert_products import ExpertWeights
from resq_compiler.backends.onnx.form_integer import flat_image, sum_of
from resq_compiler.backends.onnx.forms import Form, low_and_scale
from resq_compiler.backends.onnx.integer_weights import stacked_scales, stored_codes
from resq_compiler.backends.onnx.plan import Product, Term
from resq_compiler.backends.onnx.values import Codes, Emitted, Value
from torch.fx import Node

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call
from resq_compiler.ir.views import Quantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


class QdqForm(Form):
    """INT4 and INT8 QuantizeLinear/DequantizeLinear around activations, DequantizeLinear on weights."""

    opset: ClassVar[int] = 21

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """Codes at their own width where ONNX has it (4 and 8 bits), else INT8 clipped to the range."""
        b = low.b
        element = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        bottom, scale = low_and_scale(low, x, bits, clip)
        if groups > 1 and is_call(node, ops.quantize):  # codes stay [B, S, K]: DequantizeLinear feeds MatMul directly
            bottom, scale = (b.op("Squeeze", t, b.ints(-1)) for t in (bottom, scale))
            x = b.op("Reshape", x, b.ints(0, 0, groups * width))
        zero_point = b.op("Cast", float_zero_point(low, bottom, scale, bits), to=element)
        codes = b.op("QuantizeLinear", x, scale, zero_point, axis=-1, block_size=width)
        if bits not in (4, 8):
            ends = b.constant(np.int8(-(2 ** (bits - 1)))), b.constant(np.int8(2 ** (bits - 1) - 1))
            codes = b.op("Clip", codes, *ends)
        return Codes(bits, groups, width, codes, scale, zero_point)

    def quantize_static(self, low: Lowering, view: Quantize, x: str) -> Codes:
        """QuantizeLinear with one scale and zero point for the whole tensor, as chips without dynamic ranges take it."""
        if view.groups > 1 or view.bits not in (4, 8):
            return super().quantize_static(low, view, x)
        assert view.scale is not None and view.zero_point is not None
        element, b, name = (TensorProto.INT4 if view.bits == 4 else TensorProto.INT8), low.b, str(view.scale.target)
        scale = b.constant(low.tensor(view.scale).reshape(()), name=name)
        zero = b.constant(low.tensor(view.zero_point).astype(np.int8).reshape(()), name=f"{name}.zero_point")
        zero_point = zero if view.bits == 8 else b.op("Cast", zero, to=element)
        codes = b.op("QuantizeLinear", x, scale, zero_point)
        return Codes(view.bits, 1, view.columns, codes, scale, zero_point, static=True)

    def image(self, low: Lowering, codes: Codes) -> str:
        def make() -> str:
            inputs = codes.codes, codes.scale, codes.zero_point
            if codes.static:
                return low.b.op("DequantizeLinear", *inputs)
            return low.b.op("DequantizeLinear", *inputs, axis=-1, block_size=codes.width)

        return codes.image or low.once(("image", codes.codes), make)

    def linears(self, low: Lowering, members: list[Product]) -> list[Value]:
        return [self._linear(low, m) for m in members]

    def _linear(self, low: Lowering, linear: Product) -> Value:
        branches = []
        for term in linear.terms:
            source = low.value(term.source)
            x = self.linear_input(low, source)
            is_dequantized = isinstance(source, Codes) and not source.image
            branches.append(low.b.op("MatMul", x, self.weight(low, term, apart=not is_dequantized)))
        total = sum_of(low, branches)
        bias = linear.bias_array
        return Value(total if bias is None else low.b.op("Add", total, low.b.constant(bias)))

    def linear_input(self, low: Lowering, source: Emitted) -> str:
        """The float input of a linear, [B, S, K]."""
        return self.image(low, source) if isinstance(source, Codes) else low.fx_layout(source)

    def expert_image(self, low: Lowering, weights: ExpertWeights, codes: str, scales: str) -> str:
        if weights.group_size is None:
            return low.b.op("DequantizeLinear", codes, scales, axis=1)
        return low.b.op("DequantizeLinear", codes, scales, axis=0, block_size=weights.group_size)

    @staticmethod
    def weight(low: Lowering, term: Term, *, apart: bool) -> str:
        """DequantizeLinear of codes [N, K], by blocks of columns where they have groups, turned.

        ONNX Runtime makes a DequantizeLinear that a MatMul reads a MatMulNBits, which rounds activations to int8 again. It does not
        where they come out of a DequantizeLinear too; where they do not, the weight is kept `apart`: a transposition is moved in front
        of a DequantizeLinear of 8 bits, but not through a Reshape.
        """
        b, (out, width) = low.b, term.qdata.shape
        codes = stored_codes(b, lambda: (term.codes.T,), (out, width), term.weight_bits, term.name)
        if term.group_size is None:
            image = b.op("DequantizeLinear", codes, stacked_scales(b, [term]), axis=0)
        else:
            scales = b.constant(np.ascontiguousarray(term.scales.T), name=f"{term.name}.scales")
            image = b.op("DequantizeLinear", codes, scales, axis=1, block_size=term.group_size)
        if not apart:
            return b.op("Transpose", image, perm=[1, 0])
        turned = b.op("Transpose", b.op("Reshape", image, b.ints(1, out, width)), perm=[0, 2, 1])
        return b.op("Reshape", turned, b.ints(width, out))


class WeightOnlyForm(QdqForm):
    """Arithmetic quantizers; weights as in QdqForm, for the same reason."""

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        b = low.b
        bottom, scale = low_and_scale(low, x, bits, clip)
        zero_point = float_zero_point(low, bottom, scale, bits)
        shifted = b.op("Add", b.op("Round", b.op("Div", x, scale)), zero_point)
        codes = b.op("Clip", shifted, b.number(-(2.0 ** (bits - 1))), b.number(2.0 ** (bits - 1) - 1))
        image = b.op("Mul", b.op("Sub", codes, zero_point), scale)
        return Codes(bits, groups, width, codes, scale, zero_point, image)

    def linear_input(self, low: Lowering, source: Emitted) -> str:
        return low.tokens(flat_image(low, self, source))


def float_zero_point(low: Lowering, bottom: str, scale: str, bits: int) -> str:
    """rint(-lo / scale) - 2^(b-1)."""
    b = low.b
    return b.op("Sub", b.op("Round", b.op("Div", b.op("Neg", bottom), scale)), b.number(2.0 ** (bits - 1)))
