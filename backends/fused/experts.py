"""What the operator `experts` takes besides codes: packed weights of all experts, who goes through which, and what lies in between.

    y[t] = sum over the choices j of t:  weights[t, j] * down(codes(transform(act(gate(x[t])) * up(x[t])))),  all of expert indices[t, j]

The weights of all experts are one tensor of bytes, an expert behind the other and its parts behind each other, each packed as the target
packs weights (formats.CodeFormat), at the bits of that expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from resq_compiler.backends.fused.formats import CodeFormat, InputPart
from torch import Tensor

TRANSFORMS = ("none", "hadamard", "transposed")


@dataclass(frozen=True)
class Routing:
    """The k experts of every token, int64 [..., k], and what each weighs in the sum, float32 of as many elements."""

    indices: Tensor
    weights: Tensor


@dataclass(frozen=True)
class PackedExperts:
    """A linear of E experts.

    codes: int8 [bytes].    scale: float32 [E, parts, N].    row_sum: int32 [E, parts, N], sums of codes.
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
    """The codes int8 [E, N, columns] of a part, their scales [E, N], and the bits of every expert."""

    codes: Tensor
    scales: Tensor
    bits: tuple[int, ...]


def pack_experts(
    code_format: CodeFormat, given: Sequence[ExpertPart], parts: tuple[InputPart, ...], bias: Tensor | None
) -> PackedExperts:
    """Pack the parts of a linear of experts, one expert at a time."""
    bits = [list(of_expert) for of_expert in zip(*(one.bits for one in given), strict=True)]
    count, n = given[0].scales.shape
    sizes = [[prod(code_format.weight_shape(part, n)) for part in of_bits(parts, b)] for b in bits]
    packed = given[0].codes.new_empty(sum(map(sum, sizes)))
    at = 0
    for expert in range(count):
        for one, part, size in zip(given, of_bits(parts, bits[expert]), sizes[expert], strict=True):
            packed[at : at + size] = code_format.pack_weight(one.codes[expert], part).flatten()
            at += size
    scale = torch.stack([one.scales.float() for one in given], 1).contiguous()
    sums = torch.stack([one.codes.sum(-1, dtype=torch.int32) for one in given], 1).contiguous()
    return PackedExperts(packed, scale, sums, torch.tensor(bits, dtype=torch.int32), bias, parts)
