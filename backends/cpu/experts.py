"""The kernels of mixtures of experts on torch tensors: rows sorted by expert, their linears, and the sums of every token's choices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from resq_compiler.backends.cpu import formats
from resq_compiler.backends.cpu.kernels import RowParts, address, check_operand
from resq_compiler.backends.cpu.library import (
    MAX_PARTS,
    CombinedLinearArgs,
    GroupedLinearArgs,
    Library,
    LinearPart,
    MixedLinearArgs,
    Part,
)
from torch import Tensor

from resq_compiler.errors import BackendError


@dataclass(frozen=True)
class ExpertWeight:
    """Weights of a linear of E experts.

    codes: uint8 [bytes], the tiles of an expert behind those of another, and of its parts behind each other (formats.pack_weight).
    scale: float32 [E, parts, N].    row_sum: int32 [E, parts whose rows are not centred, N].
    bits: int32 [E, parts], of the weight codes.
    bias: float32 [E, N].
    """

    codes: Tensor
    scale: Tensor
    row_sum: Tensor
    bits: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, parts and channels."""
        experts, parts, channels = self.scale.shape
        return experts, parts, channels

    def places(self, widths: tuple[int, ...]) -> Tensor:
        """Where each expert's codes begin, and where the last one's end: int64 [E + 1]."""
        sizes = []
        for bits in self.bits.tolist():
            shapes = (formats.tile_shape(self.shape[2], width, b) for width, b in zip(widths, bits, strict=True))
            sizes.append(sum(tiles * tile for tiles, tile in shapes))
        return torch.tensor([0, *sizes]).cumsum(0)


@dataclass(frozen=True)
class RowGroups:
    """Rows by expert. expert: int32 [G], those that have rows.    first_row: int32 [G + 1], where their rows begin, and the end."""

    expert: Tensor
    first_row: Tensor


def sort_rows(indices: Tensor, experts: int) -> tuple[RowGroups, Tensor]:
    """indices int64 [T, k] -> groups, and the place of each sorted row in indices.flatten(): int64 [T * k], rising inside a group.

    Raises: BackendError: an index is no expert.
    """
    flat = indices.flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < experts:
        raise BackendError(f"experts: indices from {int(flat.min())} to {int(flat.max())}; expected 0 to {experts - 1}")
    counts = torch.bincount(flat, minlength=experts)
    reached = counts.nonzero().flatten()
    first_row = torch.nn.functional.pad(counts[reached].cumsum(0), (1, 0))
    return RowGroups(reached.to(torch.int32), first_row.to(torch.int32)), flat.argsort(stable=True)


def grouped_linear(library: Library, x: RowParts, weight: ExpertWeight, groups: RowGroups, threads: int = 1) -> Tensor:
    """Every row times the weights of its expert (formula in resq_kernels.h).

    Args:    x: M rows, sorted as `groups` says; a run for each part.
    Returns: float32 [M, N].
    Raises:  BackendError: operands that do not fit each other.
    """
    y = torch.empty(x.scale.shape[0], weight.shape[2], dtype=torch.float32)
    places = weight.places(x.widths)
    arguments = _arguments("grouped_linear", library, x, weight, groups, places, y)
    library.run("grouped_linear", arguments, threads)
    return y


def combined_linear(
    library: Library, x: RowParts, weight: ExpertWeight, groups: RowGroups, token: Tensor, share: Tensor, tokens: int,
    residual: Tensor | None = None, threads: int = 1,
) -> Tensor:  # fmt: skip
    """The same, times the share of every row, and summed by token.

    Args:    token: int32 [M], below tokens.    share: float32 [M].    residual: float32 [tokens, N].
    Returns: float32 [tokens, N].
    Raises:  BackendError: operands that do not fit each other.
    """
    rows, n = x.scale.shape[0], weight.shape[2]
    check_operand("combined_linear", "token", token, torch.int32, (rows,))
    check_operand("combined_linear", "share", share, torch.float32, (rows,))
    check_operand("combined_linear", "residual", residual, torch.float32, (tokens, n))
    if rows and not 0 <= int(token.min()) <= int(token.max()) < tokens:
        raise BackendError(f"combined_linear: token has values outside of 0 to {tokens - 1}")
    y, places = torch.empty(tokens, n, dtype=torch.float32), weight.places(x.widths)
    grouped = _arguments("combined_linear", library, x, weight, groups, places, y, residual)
    library.run("combined_linear", CombinedLinearArgs(grouped, tokens, address(token), address(share)), threads)
    return y


def _arguments(
    kernel: str, library: Library, x: RowParts, weight: ExpertWeight, groups: RowGroups, places: Tensor, y: Tensor,
    residual: Tensor | None = None,
) -> GroupedLinearArgs:  # fmt: skip
    (rows, parts), (experts, _, n) = x.scale.shape, weight.shape
    check_operand(kernel, "zero_point", x.zero_point, torch.int32, (rows, len(x.rows)))
    check_operand(kernel, "scale", x.scale, torch.float32, (rows, len(x.rows)))
    check_operand(kernel, "weight scale", weight.scale, torch.float32, (experts, len(x.rows), n))
    summed = sum(bits > formats.CENTRED_BITS for bits in x.bits)
    check_operand(kernel, "weight row_sum", weight.row_sum, torch.int32, (experts, summed, n))
    check_operand(kernel, "weight bits", weight.bits, torch.int32, (experts, parts))
    check_operand(kernel, "weight codes", weight.codes, torch.uint8, (int(places[-1]),))
    check_operand(kernel, "bias", weight.bias, torch.float32, (experts, n))
    _check_groups(kernel, groups, rows, experts)
    described = (LinearPart * MAX_PARTS)()
    for i, (codes, width, bits) in enumerate(zip(x.rows, x.widths, x.bits, strict=True)):
        check_operand(kernel, f"rows of part {i}", codes, torch.int8, (rows, library.row_bytes(width, 1)))
        described[i] = LinearPart(Part(width, 1, bits, 1.0), 0, address(codes), address(weight.codes))
    linear = MixedLinearArgs(
        rows, n, len(x.rows), described, address(x.scale), address(x.zero_point), address(weight.scale),
        address(weight.row_sum), address(weight.bias), address(residual), n, address(y), n,
    )  # fmt: skip
    numbers = (address(groups.expert), address(groups.first_row), address(places), address(weight.bits))
    return GroupedLinearArgs(linear, groups.expert.shape[0], *numbers)


def _check_groups(kernel: str, groups: RowGroups, rows: int, experts: int) -> None:
    count = groups.expert.shape[0]
    check_operand(kernel, "expert", groups.expert, torch.int32, (count,))
    check_operand(kernel, "first_row", groups.first_row, torch.int32, (count + 1,))
    edges, known = groups.first_row.tolist(), all(0 <= e < experts for e in groups.expert.tolist())
    if edges[0] != 0 or edges[-1] != rows or edges != sorted(edges) or not known:
        raise BackendError(f"{kernel}: groups do not cover {rows} rows with experts 0 to {experts - 1}, in order")
