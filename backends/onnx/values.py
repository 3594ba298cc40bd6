"""What an FX value is in the ONNX graph: a tensor name and the order its memory is in."""

from __future__ import annotations

from dataclasses import dataclass

from resq_compiler.ir.views import QuantizeDequantize


@dataclass(frozen=True)
class Value:
    """One tensor. With heads > 0 its memory is token-major, [B, S, heads, D], whatever order FX gives it.

    split: FX means [B, heads, S, D] (after split_heads), else [B, S, heads * D]. by_head: the ONNX tensor has four dimensions,
    [B, S, heads, D], else three, [B, S, heads * D]. Token-major heads need no transposes between linears and attention.
    """

    name: str
    heads: int = 0
    split: bool = False
    by_head: bool = False

    @property
    def is_split(self) -> bool:
        """Token-major heads that FX means to be apart."""
        return self.heads > 0 and self.split


@dataclass(frozen=True)
class PendingCodes:
    """The image of the codes of a cache entry, not emitted yet: keys and values are quantized together."""

    view: QuantizeDequantize
    value: Value


@dataclass(frozen=True)
class Cache:
    """append_cache(past, new), not emitted yet: an attention operator that appends by itself may take it."""

    past: str
    new: Value | PendingCodes
    present: str
    heads: int
    width: int


@dataclass(frozen=True)
class Codes:
    """Quantized activations: codes [B, S, K] or [B, S, G, K/G], scale and zero point with last dimension 1 (G groups: one each).

    image: the float image, where a form makes it together with the codes. source: the float tensor, where only an image of it is
    ever needed; codes, scale and zero point are then "". zeros: columns of x = 0, so of codes equal to the zero point, that stand
    in front of the codes (positive) or behind them (negative). static: scale and zero point are numbers, for all tokens.
    """

    bits: int
    groups: int
    width: int
    codes: str = ""
    scale: str = ""
    zero_point: str = ""
    image: str = ""
    source: str = ""
    zeros: int = 0
    static: bool = False


@dataclass(frozen=True)
class PackedValue:
    """New tokens of a packed cache entry: bytes [B, S, G, n], scales [B, S, G, parts]."""

    data: str
    scale: str


@dataclass(frozen=True)
class PackedPast:
    """The two inputs of a packed cache entry."""

    data: str
    scale: str


@dataclass(frozen=True)
class Pieces:
    """What an operator with several results gives; getitem takes one."""

    names: tuple[str, ...]


Emitted = Value | PendingCodes | Cache | Codes | PackedValue | PackedPast | Pieces
