"""Weights as a target's kernels read them, packed now or when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from resq_compiler.backends.fused.formats import CodeFormat, InputPart, PackedWeight
from torch import Tensor

from resq_compiler.errors import QuantError
from resq_compiler.ir.promises import Promise, Promised, promise_of

AT_A_TIME = 2**22  # codes; packing takes some six times their bytes


class Below(Promise):
    """Codes of several linears below each other, [N, columns] int8."""

    def __init__(self, codes: Sequence[Promise]):
        super().__init__((sum(c.shape[0] for c in codes), *codes[0].shape[1:]), codes[0].dtype)
        self._codes = codes

    def pieces(self) -> Iterator[Tensor]:
        for codes in self._codes:
            yield from codes.pieces()

    def between(self, start: int, stop: int) -> Tensor:
        found, first = [], 0
        for codes in self._codes:
            last = first + codes.shape[0]
            if max(start, first) < min(stop, last):
                found.append(codes.between(max(start, first) - first, min(stop, last) - first))
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)

    def let_go(self) -> None:
        for codes in self._codes:
            codes.let_go()


class PackedLater(Promise):
    """Weight codes [N, columns] packed when somebody asks, some tiles at a time."""

    def __init__(self, code_format: CodeFormat, codes: Promise, part: InputPart):
        super().__init__(code_format.weight_shape(part, codes.shape[0]), torch.int8)
        self._format, self._codes, self._part = code_format, codes, part

    def pieces(self) -> Iterator[Tensor]:
        yield from map(
            lambda codes: self._format.pack_weight(codes, self._part), _cut(self._codes, self._format.tile_rows)
        )


class SumsLater(Promise):
    """Sums of the codes of every run of the parts that need them, [groups of these, N] int32."""

    def __init__(self, code_format: CodeFormat, parts: Sequence[tuple[Promise, InputPart]]):
        self._parts = parts
        self._summed = [(codes, part) for codes, part in parts if not code_format.is_centred(part)]
        super().__init__((sum(part.groups for _, part in self._summed), parts[0][0].shape[0]), torch.int32)

    def pieces(self) -> Iterator[Tensor]:
        if not self._summed:
            yield torch.empty(self.shape, dtype=torch.int32)
        for codes, part in self._summed:
            yield torch.cat([_sums(rows, part) for rows in _cut(codes, 1)], 1)

    def let_go(self) -> None:
        """Codes as well, which are packed before their sums are made."""
        for codes, _ in self._parts:
            codes.let_go()


def _cut(codes: Promise, multiple: int) -> Iterator[Tensor]:
    """Rows of codes, so many at a time as work on them takes little memory: a multiple of a number, but for the last."""
    count, width = codes.shape
    step = max(1, AT_A_TIME // width // multiple) * multiple
    for start in range(0, count, step):
        yield codes.between(start, min(start + step, count))


def below(codes: Sequence[Tensor], later: bool) -> Tensor:
    """Codes of linears below each other; later: a promise of them."""
    if later:
        return Promised(Below([promise_of(c) for c in codes]))
    return torch.cat([c.make() if isinstance(c, Promised) else c for c in codes])


def pack_weight(code_format: CodeFormat, parts: Sequence[tuple[Tensor, Tensor, InputPart]]) -> PackedWeight:
    """Pack the parts of a linear: at most one low and one high part, low first. Codes that are promised become packed ones that are.

    Args:    parts: (qdata [N, columns] int8, scale [N] float, part) of each part.
    Raises:  QuantError: two parts need the same tensor, or a part is not as wide as its codes.
    """
    is_low = [part.is_low for _, _, part in parts]
    if is_low not in ([True], [False], [True, False]):
        bits = [part.weight_bits for _, _, part in parts]
        raise QuantError(f"pack_weight: parts of {bits} bits; expected one of <= 4 and/or one of > 4")
    packed = {p.is_low: _packed(code_format, q, p) for q, _, p in parts}
    scale = torch.stack([s.to(torch.float32) for _, s, _ in parts]).contiguous()
    nothing = scale.new_empty(scale.shape[1], 0, dtype=torch.int8)
    low, high = packed.get(True, nothing), packed.get(False, nothing)
    sums = _row_sums(code_format, [(q, p) for q, _, p in parts])
    return PackedWeight(low, high, scale, sums, tuple(p for _, _, p in parts))


def _packed(code_format: CodeFormat, codes: Tensor, part: InputPart) -> Tensor:
    if isinstance(codes, Promised):
        return Promised(PackedLater(code_format, codes.promise, part))
    return code_format.pack_weight(codes, part)


def _row_sums(code_format: CodeFormat, parts: Sequence[tuple[Tensor, InputPart]]) -> Tensor:
    """Of all parts that need them, [groups of these, N] int32."""
    promised = [(codes.promise, part) for codes, part in parts if isinstance(codes, Promised)]
    if len(promised) == len(parts):
        return Promised(SumsLater(code_format, promised))
    none = parts[0][0].new_empty(0, parts[0][0].shape[0], dtype=torch.int32)
    sums = [_sums(codes, part) for codes, part in parts if not code_format.is_centred(part)]
    return torch.cat([none, *sums]).contiguous()


def _sums(codes: Tensor, part: InputPart) -> Tensor:
    """Of every run, [groups, N] int32."""
    return codes.unflatten(-1, (part.groups, part.width)).sum(-1, dtype=torch.int32).T
