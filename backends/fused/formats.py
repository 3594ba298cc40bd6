"""What the operands of fused operators are, and what a target has to say about the bytes that hold them.

Codes are signed (numerics/quantized.py). A linear's input has at most two parts in one operator, "low" and "high", low first. Low is what
is multiplied with weight codes of up to 4 bits, high what is multiplied with wider ones; targets that pack activations and weights
alike call the activations' bits those of the weights. Bytes differ from target to target, everything else is the same for all:

    activations low, high [..., row bytes] int8      scale, zero_point [..., groups of parts] float32, int32;  [low groups | high groups]
    weights     low, high: bytes of N output rows    scale [parts, N] float32    row_sum [groups of parts, N] int32, sums of codes
    cache       one int8 tensor for keys and one for values of a layer; what a token's row holds is described by `HeadParts`

A part that an operand does not have is a tensor whose last dimension is 0. Where a target's rows are centred, they hold codes less their
zero point, the zero point beside them is 0, and the weights of that part have no row_sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.numerics.quantized import QuantizedActivation

LOW_BITS = 4
"""Weight codes of up to so many bits lie in the low tensor, wider ones in the high tensor; activations where their weights do."""


@dataclass(frozen=True)
class InputPart:
    """One precision of a linear's input: `groups` runs of `width` columns of `bits`-bit codes, a scale and zero point for each run.

    weight_bits: what each of the weights' codes has room for; 0 stands for as many as the activations have.
    """

    bits: int
    width: int
    groups: int = 1
    weight_bits: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_bits", self.weight_bits or self.bits)

    @property
    def is_low(self) -> bool:
        return self.weight_bits <= LOW_BITS

    @property
    def columns(self) -> int:
        return self.width * self.groups


def input_parts(
    bits: Sequence[int], weight_bits: Sequence[int], widths: Sequence[int], groups: Sequence[int]
) -> tuple[InputPart, ...]:
    """The parts that an operator's flat lists describe; groups: of each, or a single number for all."""
    each = groups if len(groups) == len(bits) else [*groups] * len(bits)
    return tuple(InputPart(b, w, g, wb) for b, wb, w, g in zip(bits, weight_bits, widths, each, strict=True))


@dataclass(frozen=True)
class HeadParts:
    """A cached head: columns [0, low) of at most 4 bits, columns [low, low + high) of 5 to 8; a scale and zero point for each."""

    low: int
    high: int
    low_bits: int = 4
    high_bits: int = 8

    @property
    def head_dim(self) -> int:
        return self.low + self.high

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(bits, start, stop) of the parts there are."""
        both = ((self.low_bits, 0, self.low), (self.high_bits, self.low, self.head_dim))
        return tuple(span for span in both if span[2] > span[1])

    @property
    def attribute(self) -> list[int]:
        """As an operator's attribute; HeadParts(*attribute) is the same again."""
        return [self.low, self.high, self.low_bits, self.high_bits]


def head_parts(spans: Sequence[tuple[int, int, int]]) -> HeadParts:
    """The parts of a cache quantizer (bits, start, stop): at most one of up to 4 bits, then at most one of more.

    Raises: QuantError: other combinations, which no cache row holds.
    """
    is_low = [bits <= LOW_BITS for bits, _, _ in spans]
    if is_low not in ([True], [False], [True, False]):
        raise QuantError(
            f"cache parts {tuple(spans)} (bits, start, stop): expected one of <= 4 bits and/or one of > 4 bits"
        )
    widths = {low: (bits, stop - start) for low, (bits, start, stop) in zip(is_low, spans, strict=True)}
    low_bits, low = widths.get(True, (4, 0))
    high_bits, high = widths.get(False, (8, 0))
    return HeadParts(low, high, low_bits, high_bits)


class Codes(NamedTuple):
    """Quantized activations; fields as in the module docstring."""

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def of(self, part: InputPart) -> Tensor:
        """The bytes of a part."""
        return self.low if part.is_low else self.high


@dataclass(frozen=True)
class PackedWeight:
    """Weight of one linear, or of several stacked along their outputs; fields as in the module docstring."""

    low: Tensor
    high: Tensor
    scale: Tensor
    row_sum: Tensor
    parts: tuple[InputPart, ...]

    @property
    def out_features(self) -> int:
        return self.scale.shape[1]

    def of(self, part: InputPart) -> Tensor:
        """The bytes of a part."""
        return self.low if part.is_low else self.high


def centred(x: QuantizedActivation) -> QuantizedActivation:
    """The same values in codes less their zero point, which have one bit more; at most 7 bits, so that they fit into a byte."""
    runs = x.qdata.unflatten(-1, (x.groups, -1)) - x.zero_point[..., None]
    return replace(x, qdata=runs.flatten(-2).to(torch.int8), zero_point=torch.zeros_like(x.zero_point))


class CodeFormat(ABC):
    """How a target packs the codes of activations and weights."""

    tile_rows: ClassVar[int] = 1
    """Output rows that a row of a packed weight holds; it holds nothing of others."""

    def is_centred(self, part: InputPart) -> bool:
        """Whether rows of a part are centred."""
        return False

    @abstractmethod
    def row_bytes(self, part: InputPart) -> int:
        """Bytes of one row of activations."""

    @abstractmethod
    def pack_rows(self, codes: Tensor, part: InputPart) -> Tensor:
        """Activation codes [..., part.columns] int8 -> [..., row_bytes] int8."""

    @abstractmethod
    def unpack_rows(self, rows: Tensor, part: InputPart) -> Tensor:
        """Inverse of `pack_rows`; padding may hold anything."""

    @abstractmethod
    def pack_weight(self, codes: Tensor, part: InputPart) -> Tensor:
        """Weight codes [N, part.columns] int8 -> an int8 tensor of any shape."""

    @abstractmethod
    def weight_shape(self, part: InputPart, out_features: int) -> tuple[int, ...]:
        """Of what `pack_weight` makes of so many rows."""

    @abstractmethod
    def unpack_weight(self, packed: Tensor, part: InputPart, start: int, stop: int) -> Tensor:
        """Inverse of `pack_weight` for the output rows start:stop: [stop - start, part.columns] int8."""


class CacheFormat(ABC):
    """How a target keeps the codes of keys or values: allocation and growth, and reading and writing for the torch forms.

    B sequences, G heads of D columns. What is quantized, and when, is the operators' business.
    """

    table_input: ClassVar[bool]
    """Whether tokens lie in blocks that a table finds; the lowered graph then has the input `cache_table`."""

    @abstractmethod
    def allocate(self, batch: int, heads: int, parts: HeadParts, tokens: int, device: torch.device) -> Tensor:
        """An empty cache with room for at least `tokens` tokens of each sequence."""

    @abstractmethod
    def capacity(self, cache: Tensor, batch: int) -> int:
        """Tokens that each sequence has room for."""

    @abstractmethod
    def grown(self, cache: Tensor, batch: int, tokens: int) -> Tensor:
        """A copy with room for at least `tokens` tokens of each sequence."""

    @abstractmethod
    def selected(self, cache: Tensor, batch: int, index: Tensor) -> Tensor:
        """A copy that holds the sequences `index`, in this order."""

    @abstractmethod
    def table(self, batch: int, capacity: int, device: torch.device) -> Tensor | None:
        """Where the blocks of a cache of `capacity` tokens are; None without `table_input`."""

    @abstractmethod
    def write(
        self, cache: Tensor, table: Tensor | None, start: Tensor, x: Tensor, parts: HeadParts, clip: float
    ) -> None:
        """Quantize x [B, S, G, D] by token, head and part, and write it behind the first `start` [B] tokens of each sequence."""

    @abstractmethod
    def read(self, cache: Tensor, table: Tensor | None, parts: HeadParts, total: int) -> Tensor:
        """The first `total` tokens of each sequence, dequantized: [B, G, total, D] float32."""
