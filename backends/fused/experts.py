"""What the operator `experts` takes besides codes: packed weights of all experts, who goes through which, and what lies in between.

    y[t] = sum over the choices j of t:  weights[t, j] * down(codes(transform(act(gate(x[t])) * up(x[t])))),  all of expert indices[t, j]

The weights of all experts are one tensor of bytes, an expert behind the other and its parts behind each other, each packed as the target
packs weights (formats.CodeFormat), at the bits of that expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from resq_compiler.backends.fused.formats import CodeFormat, InputPart
from torch import Tensor

from resq_compiler.ir.promises import Promise, Promised, filled, promise_of

TRANSFORMS = ("none", "hadamard", "transposed")


@dataclass(frozen=True)
class Routing:
    """The k experts of every token, int64 [..., k], and what each weighs in the sum, float32 of as many elements."""

    indices: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PackedExperts:
    """A linear of E experts.

    codes: int8 [bytes].    scale: float32 [E, parts, N].    row_sum: int32 [E, parts that are not centred, N], sums of codes.
    bits: int32 [E, parts], of an expert's weight codes.    bias: float32 [E, N], or None.    parts: of the input.
    """

    codes: Tensor
    scale: Tensor
    row_sum: Tensor
    bits: Tensor
    bias: Tensor | None
    parts: tuple[InputPart, ...]

    @property
    def out_features(self) -> int:
        return self.scale.shape[2]

    def unpacked(self, code_format: CodeFormat, index: int) -> Tensor:
        """Codes of one part, int8 [E, N, columns]."""
        place = ExpertCodesAt("", self.parts, self.bits.tolist(), self.out_features, index, 0, self.out_features)
        return place.unpack(code_format, self.codes)


@dataclass(frozen=True)
class Between:
    """What happens to gate and up, [..., 2 I] side by side where `gated`, else the gate alone [..., I], before down reads it as codes.

    activation: one of kernels.EXPERT_ACTIVATIONS.    transform: one of TRANSFORMS, of each part's columns.
    parts, clips: of the codes.
    """

    activation: str
    gated: bool
    limit: float
    slope: float
    transform: str
    parts: tuple[InputPart, ...]
    clips: tuple[float, ...]


@dataclass(frozen=True)
class ExpertCodesAt:
    """Where the codes of a linear of experts are: output rows start:stop of part `index` in the packed tensor `tensor`.

    parts: of the input.    bits: of every expert and part.    out_features: rows of each expert.
    """

    tensor: str
    parts: tuple[InputPart, ...]
    bits: list[list[int]]
    out_features: int
    index: int
    start: int
    stop: int

    def unpack(self, code_format: CodeFormat, packed: Tensor) -> Tensor:
        """[E, stop - start, columns] int8."""
        found, at = [], 0
        for of_expert in self.bits:
            for i, part in enumerate(of_bits(self.parts, of_expert)):
                shape = code_format.weight_shape(part, self.out_features)
                size = prod(shape)
                if i == self.index:
                    mine = packed[at : at + size].view(shape)
                    found.append(code_format.unpack_weight(mine, part, self.start, self.stop))
                at += size
        return torch.stack(found)


def of_bits(parts: Sequence[InputPart], bits: Sequence[int]) -> list[InputPart]:
    """The same input, for weights of these bits."""
    return [replace(part, weight_bits=b) for part, b in zip(parts, bits, strict=True)]


@dataclass(frozen=True)
class ExpertPart:
    """The codes int8 [E, N, columns] of a part, which may be promised, their scales [E, N], and the bits of every expert."""

    codes: Tensor
    scales: Tensor
    bits: tuple[int, ...]


class ExpertsBelow(Promise):
    """Codes of several linears below each other for each expert, [E, N of all, columns] int8."""

    def __init__(self, codes: Sequence[Promise]):
        experts, _, columns = codes[0].shape
        super().__init__((experts, sum(c.shape[1] for c in codes), columns), codes[0].dtype)
        self._codes = codes

    def pieces(self) -> Iterator[Tensor]:
        for expert in range(self.shape[0]):
            yield self.between(expert, expert + 1)

    def between(self, start: int, stop: int) -> Tensor:
        return torch.cat([codes.between(start, stop) for codes in self._codes], 1)

    def let_go(self) -> None:
        for codes in self._codes:
            codes.let_go()


class ExpertBytes(Promise):
    """Packed codes of all experts, int8 [bytes]; pieces: of one expert."""

    def __init__(
        self, code_format: CodeFormat, codes: Sequence[Promise], parts: tuple[InputPart, ...], bits: list[list[int]]
    ):
        n = codes[0].shape[1]
        self._each = [of_bits(parts, of_expert) for of_expert in bits]
        size = sum(prod(code_format.weight_shape(part, n)) for each in self._each for part in each)
        super().__init__((size,), torch.int8)
        self._format, self._codes = code_format, codes

    def pieces(self) -> Iterator[Tensor]:
        for expert, each in enumerate(self._each):
            packed = (
                self._format.pack_weight(codes.between(expert, expert + 1)[0], part)
                for codes, part in zip(self._codes, each, strict=True)
            )
            yield torch.cat([one.flatten() for one in packed])


class ExpertSums(Promise):
    """Sums of the codes of every row in the parts that need them, [E, these, N] int32."""

    def __init__(self, code_format: CodeFormat, codes: Sequence[Promise], parts: tuple[InputPart, ...]):
        self._codes = codes
        self._summed = [one for one, part in zip(codes, parts, strict=True) if not code_format.is_centred(part)]
        super().__init__((codes[0].shape[0], len(self._summed), codes[0].shape[1]), torch.int32)

    def pieces(self) -> Iterator[Tensor]:
        for expert in range(self.shape[0]):
            none = torch.empty(1, 0, self.shape[2], dtype=torch.int32)
            sums = [codes.between(expert, expert + 1).sum(-1, dtype=torch.int32) for codes in self._summed]
            yield torch.cat([none, *(one[:, None] for one in sums)], 1)

    def let_go(self) -> None:
        """Codes as well, which are packed before their sums are made."""
        for codes in self._codes:
            codes.let_go()


def experts_below(codes: Sequence[Tensor], later: bool) -> Tensor:
    """Codes [E, N, columns] of linears below each other; later: a promise of them."""
    if later:
        return Promised(ExpertsBelow([promise_of(c) for c in codes]))
    return torch.cat([c.make() if isinstance(c, Promised) else c for c in codes], 1)


def pack_experts(
    code_format: CodeFormat, given: Sequence[ExpertPart], parts: tuple[InputPart, ...], bias: Tensor | None
) -> PackedExperts:
    """Pack the parts of a linear of experts, one expert at a time. Codes that are promised become packed ones that are."""
    bits = [list(of_expert) for of_expert in zip(*(one.bits for one in given), strict=True)]
    codes = [promise_of(one.codes) for one in given]
    packed, sums = ExpertBytes(code_format, codes, parts, bits), ExpertSums(code_format, codes, parts)
    later = all(isinstance(one.codes, Promised) for one in given)
    made = [Promised(promise) if later else filled(promise, given[0].codes.device) for promise in (packed, sums)]
    scale = torch.stack([one.scales.float() for one in given], 1).contiguous()
    return PackedExperts(made[0], scale, made[1], torch.tensor(bits, dtype=torch.int32), bias, parts)
