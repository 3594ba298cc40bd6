"""The packed KV cache: its tensors are the codes themselves, 4 and 8 bits, about a fifth of float32.

Of each cache entry, key or value, with parts (bits, start, stop) of D columns:

    past_key_values.i.key        uint8 [B, G, P, bytes]    codes of all parts side by side, then one zero point for each part
    past_key_values.i.key_scale  float32 [B, G, P, parts]

Codes are stored as the law's q + 2^(b-1), so 0 .. 2^b - 1; so are zero points. Codes of 4 bits or fewer: column j of the part's first
half in the low nibble of byte j, column j of its second half in the high one (halves, not neighbours: packing and unpacking
are slices and a shift). Wider codes, and a middle column of an odd width, take a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto
from resq_compiler.backends.onnx.forms import Form, low_and_scale
from resq_compiler.backends.onnx.values import Emitted, PackedPast, PackedValue, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import ops
from resq_compiler.ir.views import AppendCache, CacheParts, QuantizeDequantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


def with_packed_cache(form: Form) -> Form:
    """The same form with packed cache tensors."""
    base = type(form)
    return type(f"Packed{base.__name__}", (PackedCache, base), {})()


class PackedCache(Form):
    """Overrides what a form does with cache entries."""

    def start(self, low: Lowering) -> None:
        """Find the parts of every entry."""
        super().start(low)
        self.parts: dict[str, CacheParts] = {}
        for node in low.gm.graph.find_nodes(op="call_function", target=ops.append_cache):
            entry = AppendCache.require(node)
            codes = QuantizeDequantize.of(entry.new)
            if codes is None:
                raise BackendError(
                    f"onnx: kv_cache='packed' needs a quantized cache; {entry.past} is float: compile with kv_bits below 16"
                )
            self.parts[str(entry.past)] = codes.parts

    def cache_input(self, low: Lowering, name: str, heads: int, width: int) -> PackedPast:
        parts = self._parts_of_input(name)
        data = low.b.input(name, TensorProto.UINT8, ("batch", heads, "past", packed_bytes(parts)))
        return PackedPast(data, low.b.input(f"{name}_scale", TensorProto.FLOAT, ("batch", heads, "past", len(parts))))

    def _parts_of_input(self, name: str) -> CacheParts:
        _, index, kind = name.split(".")
        return self.parts[f"past_{kind}_{index}"]

    def cache_codes(self, low: Lowering, view: QuantizeDequantize, value: Value) -> Emitted:
        """Codes of the new tokens, packed."""
        b = low.b
        pieces = b.split(low.by_head(value), [stop - start for _, start, stop in view.parts])
        data, zero_points, scales = [], [], []
        for piece, (bits, start, stop) in zip(pieces, view.parts, strict=True):
            bottom, scale = low_and_scale(low, piece, bits, view.clip)
            zero_point = b.op("Round", b.op("Div", b.op("Neg", bottom), scale))
            shifted = b.op("Add", b.op("Round", b.op("Div", piece, scale)), zero_point)
            codes = b.op("Clip", shifted, b.number(0.0), b.number(2.0**bits - 1))
            data += pack(low, b.op("Cast", codes, to=TensorProto.UINT8), bits, stop - start)
            zero_points.append(b.op("Cast", zero_point, to=TensorProto.UINT8))
            scales.append(scale)
        return PackedValue(b.join([*data, *zero_points]), b.op("Concat", *scales, axis=-1))

    def append(self, low: Lowering, past: Emitted, new: Node, present: str, heads: int, width: int) -> Emitted:
        """The float image of the whole entry, [B, G, T, D]; the packed one goes to the outputs."""
        value = low.value(new)
        assert isinstance(value, PackedValue) and isinstance(past, PackedPast)  # start() looked at every entry
        turned = [low.b.op("Transpose", name, perm=[0, 2, 1, 3]) for name in (value.data, value.scale)]
        data = low.b.op("Concat", past.data, turned[0], output=present, axis=2)
        scale = low.b.op("Concat", past.scale, turned[1], output=f"{present}_scale", axis=2)
        _, index, kind = present.split(".")
        return Value(unpacked(low, data, scale, self.parts[f"past_{kind}_{index}"]))

    def cache_output(self, low: Lowering, node: Node, name: str, heads: int, width: int) -> None:
        _, index, kind = name.split(".")
        parts = self.parts[f"past_{kind}_{index}"]
        low.b.output(name, TensorProto.UINT8, ("batch", heads, "total", packed_bytes(parts)))
        low.b.output(f"{name}_scale", TensorProto.FLOAT, ("batch", heads, "total", len(parts)))


def code_bytes(bits: int, width: int) -> int:
    """Bytes of one part of one token."""
    return (width + 1) // 2 if bits <= 4 else width


def packed_bytes(parts: CacheParts) -> int:
    """Bytes of one token and head: codes, then zero points."""
    return sum(code_bytes(bits, stop - start) for bits, start, stop in parts) + len(parts)


def pack(low: Lowering, codes: str, bits: int, width: int) -> list[str]:
    """uint8 codes [..., width] as packed pieces."""
    b, half = low.b, width // 2
    if bits > 4 or width == 1:
        return [codes]
    first, second, *rest = b.split(codes, [half, half, 1] if width % 2 else [half, half])
    high = b.op("BitShift", second, b.constant(np.uint8(4)), direction="LEFT")
    return [b.op("BitwiseOr", first, high), *rest]


def unpacked(low: Lowering, data: str, scale: str, parts: CacheParts) -> str:
    """The float image (u - z) scale of packed entries [..., bytes] with scales [..., parts]."""
    b = low.b
    sizes = [code_bytes(bits, stop - start) for bits, start, stop in parts] + [1] * len(parts)
    pieces, scales = b.split(data, sizes), b.split(scale, [1] * len(parts))
    images = []
    for i, (bits, start, stop) in enumerate(parts):
        codes = unpack(low, pieces[i], bits, stop - start)
        centred = b.op("Sub", *(b.op("Cast", t, to=TensorProto.FLOAT) for t in (codes, pieces[len(parts) + i])))
        images.append(b.op("Mul", centred, scales[i]))
    return b.join(images)


def unpack(low: Lowering, data: str, bits: int, width: int) -> str:
    """uint8 codes [..., width] of one packed part."""
    b, half = low.b, width // 2
    if bits > 4 or width == 1:
        return data
    data, *rest = b.split(data, [half, 1] if width % 2 else [half])
    first = b.op("BitwiseAnd", data, b.constant(np.uint8(15)))
    second = b.op("BitShift", data, b.constant(np.uint8(4)), direction="RIGHT")
    return b.op("Concat", first, second, *rest, axis=-1)
