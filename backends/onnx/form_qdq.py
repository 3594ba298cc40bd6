"""Profiles qdq and weight-only: standard operators of opset 21, both branches of every linear visible.

qdq: QuantizeLinear and DequantizeLinear with a scale and zero point computed at run time, INT4 and INT8, blocks of the whole
part (or of one head). weight-only: the same codes by Div, Round, Clip, for consumers that take INT4 and INT8 for weights only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.form_integer import flat_image, sum_of
from resq_compiler.backends.onnx.forms import Form, low_and_scale
from resq_compiler.backends.onnx.plan import Term
from resq_compiler.backends.onnx.values import Codes, Value
from torch.fx import Node

from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import is_call

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering
    from resq_compiler.backends.onnx.plan import LinearSum


class QdqForm(Form):
    """INT4 and INT8 QuantizeLinear/DequantizeLinear around activations, DequantizeLinear on weights."""

    opset: ClassVar[int] = 21

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        """Codes at their own width where ONNX has it (4 and 8 bits), else INT8 clipped to the range."""
        b = low.b
        element = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        bottom, scale = low_and_scale(low, x, bits, clip)
        if groups > 1 and is_call(
            node, ops.quantize
        ):  # codes of linears stay [B, S, K]: DequantizeLinear feeds MatMul directly
            bottom, scale = (b.op("Squeeze", t, b.ints(-1)) for t in (bottom, scale))
            x = b.op("Reshape", x, b.ints(0, 0, groups * width))
        zero_point = b.op("Cast", float_zero_point(low, bottom, scale, bits), to=element)
        codes = b.op("QuantizeLinear", x, scale, zero_point, axis=-1, block_size=width)
        if bits not in (4, 8):
            codes = b.op(
                "Clip", codes, b.constant(np.int8(-(2 ** (bits - 1)))), b.constant(np.int8(2 ** (bits - 1) - 1))
            )
        return Codes(bits, groups, width, codes, scale, zero_point)

    def image(self, low: Lowering, codes: Codes) -> str:
        def make() -> str:
            inputs = codes.codes, codes.scale, codes.zero_point
            return low.b.op("DequantizeLinear", *inputs, axis=-1, block_size=codes.width)

        return codes.image or low.once(("image", codes.codes), make)

    def linears(self, low: Lowering, members: list[LinearSum]) -> list[Value]:
        return [self._linear(low, m) for m in members]

    def _linear(self, low: Lowering, linear: LinearSum) -> Value:
        branches = []
        for term in linear.terms:
            x = self.linear_input(low, low.value(term.source))
            branches.append(low.b.op("MatMul", x, self.weight(low, term)))
        total = sum_of(low, branches)
        if linear.bias is not None:
            total = low.b.op("Add", total, low.b.constant(linear.bias.detach().cpu().float().numpy()))
        return Value(total)

    def linear_input(self, low: Lowering, source: Codes | Value) -> str:
        """The float input of a linear, [B, S, K]."""
        return self.image(low, source) if isinstance(source, Codes) else low.fx_layout(source)

    def weight(self, low: Lowering, term: Term) -> str:
        """DequantizeLinear of codes [N, K], turned: ONNX Runtime would make [K, N] a MatMulNBits that rounds activations again."""
        codes = stored_codes(low, term, np.ascontiguousarray(term.codes.T))
        image = low.b.op("DequantizeLinear", codes, low.b.constant(term.scales, name=f"{term.name}.scales"), axis=0)
        return low.b.op("Transpose", image, perm=[1, 0])


class WeightOnlyForm(QdqForm):
    """Arithmetic quantizers; weights [K, N] straight into MatMul, the pattern that consumers know as weight-only."""

    def weight(self, low: Lowering, term: Term) -> str:
        codes = stored_codes(low, term, term.codes)
        return low.b.op("DequantizeLinear", codes, low.b.constant(term.scales, name=f"{term.name}.scales"), axis=1)

    def quantize(self, low: Lowering, node: Node, x: str, bits: int, groups: int, width: int, clip: float) -> Codes:
        b = low.b
        bottom, scale = low_and_scale(low, x, bits, clip)
        zero_point = float_zero_point(low, bottom, scale, bits)
        shifted = b.op("Add", b.op("Round", b.op("Div", x, scale)), zero_point)
        codes = b.op("Clip", shifted, b.number(-(2.0 ** (bits - 1))), b.number(2.0 ** (bits - 1) - 1))
        return Codes(
            bits, groups, width, codes, scale, zero_point, image=b.op("Mul", b.op("Sub", codes, zero_point), scale)
        )

    def linear_input(self, low: Lowering, source: Codes | Value) -> str:
        return low.tokens(flat_image(low, self, source))


def float_zero_point(low: Lowering, bottom: str, scale: str, bits: int) -> str:
    """rint(-lo / scale) - 2^(b-1)."""
    b = low.b
    return b.op("Sub", b.op("Round", b.op("Div", b.op("Neg", bottom), scale)), b.number(2.0 ** (bits - 1)))


def stored_codes(low: Lowering, term: Term, codes: np.ndarray) -> str:
    """Weight codes at 4 or 8 bits."""
    name = f"{term.name}.codes"
    return low.b.int4(codes, name) if term.weight_bits <= 4 else low.b.constant(codes, name=name)
