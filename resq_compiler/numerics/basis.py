"""Second moments of activations and the bases taken from them (P, and U = P R).

The moment is the uncentred sum of xᵀx over tokens, so moments of batches, files and processes merge by adding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resq_compiler.errors import DataError, QuantError

_ROWS_PER_CHUNK = 4096
"""Rows multiplied in float32 before their product joins the float64 sum: bounds the rounding of long batches."""
_STRIPE = 288
"""Rows of a moment that are computed, and kept, as one part, from the diagonal on: the rest is their mirror image."""
_TOKENS_PENDING = 8192
"""Tokens whose float32 products are summed in float32 before the sum joins the float64 one, whose addition costs as much as a product."""
_LOUD = 8
"""A token of so many times the median size is multiplied in float32: rounding its products would drown the others'."""
_CENTRED = 0.5
"""A mean that holds more than this share of the energy of the first tokens is taken out of all before products are rounded."""


@dataclass
class _Centre:
    """A vector c that is subtracted from tokens, and what it leaves out: with their sum s, xᵀx = (x - c)ᵀ(x - c) + c sᵀ + s cᵀ - n c cᵀ.

    Rounded to bfloat16, products of tokens that are nearly their mean drown what differs: such a moment has eigenvalues far below zero.
    """

    c: Tensor
    sum: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, rows: Tensor) -> _Centre | None:
        """The mean of rows [T, d] where it holds most of their energy."""
        mean = rows.mean(0)
        if float(mean.square().sum()) * len(rows) <= _CENTRED * float(rows.square().sum()):
            return None
        return cls(mean, torch.zeros_like(mean, dtype=torch.float64))

    def subtract(self, rows: Tensor) -> Tensor:
        """x - c for rows [T, d]."""
        self.sum += rows.sum(0)
        self.tokens += len(rows)
        return rows - self.c

    def complete(self, stripes: list[Tensor]) -> None:
        """Add what is left out to stripes of the upper half, and begin anew."""
        c, s = self.c.double(), self.sum
        for i, part in enumerate(stripes):
            here, right = slice(i * _STRIPE, i * _STRIPE + len(part)), slice(i * _STRIPE, None)
            part += torch.outer(c[here], s[right]).addr_(s[here] - self.tokens * c[here], c[right])
        self.sum, self.tokens = torch.zeros_like(s), 0


class SecondMoment:
    """Running sum of xᵀx at one site, over tokens: products, and sums of up to 8192 tokens, in x's precision
    (float32 at least), the whole sum in float64; of rounded products the whole sum in float32, which is finer by far.

    site: name used in messages. dim: d. groups: G when every token has G vectors with a moment each (heads), else None.
    total: float64 [d, d], or [G, d, d]. tokens: how many tokens were added. dtype: bfloat16 rounds float32 tokens and the
    product of each chunk to it (not with groups, and not the loudest tokens); the sums inside a product are float32.
    Sums are on the device of the tokens. Beside the total there is half a matrix in float32.
    """

    def __init__(
        self,
        site: str,
        dim: int,
        groups: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.site, self.dim, self.groups, self.tokens = site, dim, groups, 0
        self._rounded = dtype == torch.bfloat16 and groups is None
        self._room = math.inf if self._rounded else _TOKENS_PENDING
        self._total: Tensor | None = None
        self._pending: list[Tensor] = []
        self._tokens_pending = 0
        self._centre: _Centre | None = None

    @property
    def total(self) -> Tensor:
        """The sum over all tokens, float64."""
        self._flush()
        if self._total is None:
            shape = (self.dim, self.dim) if self.groups is None else (self.groups, self.dim, self.dim)
            self._total = torch.zeros(shape, dtype=torch.float64)
        return self._total

    @total.setter
    def total(self, value: Tensor | None) -> None:
        self._total, self._pending, self._tokens_pending, self._centre = value, [], 0, None

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the tokens of x: [..., d], or [..., G, d] with groups.

        Raises: DataError: a NaN or infinity in x (the sum is left as it was). QuantError: x has another shape.
        """
        tail = (self.dim,) if self.groups is None else (self.groups, self.dim)
        if tuple(x.shape[-len(tail) :]) != tail or not x.is_floating_point():
            raise QuantError(
                f"second moment of {self.site}: expected floating-point activations ending in {tail}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        rows = x.detach().reshape(-1, *tail)
        chunks = rows.split(_ROWS_PER_CHUNK)
        for chunk in chunks:  # all of them before the sums, which a rejected batch must not touch
            self._require_finite(chunk, rows)
        for chunk in chunks:
            self._add(chunk)
        self.tokens += len(rows)

    def _add(self, rows: Tensor) -> None:
        exact = rows.dtype == torch.float64
        if exact or self._tokens_pending + len(rows) > self._room:
            self._flush()
        if self._rounded and rows.dtype == torch.float32:
            if not self._tokens_pending and len(rows):
                self._centre = _Centre.of(rows)
            rows = rows if self._centre is None else self._centre.subtract(rows)
        for i, part in enumerate(_rounded_parts(rows) if self._rounded else _parts(rows)):
            if i == len(self._pending):
                self._pending.append(part if exact else part.float())
            else:
                self._pending[i].add_(part)
        self._tokens_pending += len(rows)
        if exact:
            self._flush()

    def _flush(self) -> None:
        parts = self._completed()
        self._pending, self._tokens_pending = [], 0
        if self.groups is not None and parts:
            self._total = parts[0].double() if self._total is None else self._total.add_(parts[0])
        elif parts:
            self._total = _add_stripes(self._total, parts)

    def _completed(self) -> list[Tensor]:
        """The pending sums, with all that belongs to them."""
        if self._centre is not None and self._pending:
            self._centre.complete(self._pending)
        return self._pending

    def mean(self) -> Tensor:
        """total / tokens, float64. Raises: DataError: no token was added."""
        self._require_tokens()
        return self.total / self.tokens

    def take_mean(self) -> Tensor:
        """`mean` of a moment without groups in float32; the sum is gone. Raises: DataError: no token was added."""
        self._require_tokens()
        if self._rounded and self._total is None:
            total = _add_stripes(None, self._completed(), torch.float32)
        else:
            total = _narrowed(self.total)
        tokens, self.total, self.tokens = self.tokens, None, 0
        return total.div_(tokens)

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes."""
        return {"total": self.total, "tokens": torch.tensor(self.tokens)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` returned. Raises QuantError: the total is that of another site."""
        if state["total"].shape != self.total.shape:
            raise QuantError(
                f"second moment of {self.site}: expected a saved total {tuple(self.total.shape)}, "
                f"got {tuple(state['total'].shape)}; the file belongs to another model or is damaged"
            )
        self.total, self.tokens = state["total"], int(state["tokens"])

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the sum over other tokens, as its `state` says. Raises QuantError: it is that of another site."""
        total, tokens = self.total, self.tokens
        self.restore(state)
        self.total, self.tokens = total + self.total, tokens + self.tokens

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise DataError(f"second moment of {self.site}: no tokens were seen; give calibration data that reaches it")

    def _require_finite(self, chunk: Tensor, rows: Tensor) -> None:
        if _squares_fit(_wide(chunk)):
            return
        # a NaN or infinity anywhere in a column reaches the size of that column, as squares do that overflow
        size = torch.linalg.vector_norm(_wide(chunk), dim=0)
        if torch.isfinite(size).all():
            return
        bad = ~torch.isfinite(rows)
        if bad.any():
            first = int(bad.flatten(1).any(1).int().argmax())
            cause = f"{int(bad.sum())} NaN or infinite activations, first in token {first} of the batch"
        else:
            cause = f"activations up to {float(rows.abs().max()):.3g}, whose squares overflow {_wide(rows).dtype}"
        raise DataError(f"second moment of {self.site}: {cause}; run in float32 and check the calibration data")


@torch.no_grad()
def principal_basis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a second moment, as columns by ASCENDING eigenvalue: the last columns carry the most energy.

    Each column's sign makes its entry of largest magnitude positive (the first of equals).

    Args:    moment: [..., d, d], symmetric up to rounding; computed in float64 on its own device.
    Returns: (P [..., d, d] float64, eigenvalues [..., d] float64).
    Raises:  DataError: NaN or infinity in the moment. QuantError: not square.
    """
    if moment.dim() < 2 or moment.shape[-1] != moment.shape[-2]:
        raise QuantError(f"principal_basis: expected a moment [..., d, d], got {tuple(moment.shape)}")
    if not torch.isfinite(moment).all():
        raise DataError("principal_basis: the second moment holds NaN or infinity; check the calibration activations")
    wide = moment.double()
    eigenvalues, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    return vectors * _canonical_signs(vectors), eigenvalues


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """xᵀx of rows [T, d], stripe by stripe of its upper half; of rows [T, G, d] -> [G, d, d]."""
    wide = _wide(rows)
    if wide.dim() == 3:
        wide = wide.transpose(0, 1)
        yield wide.mT @ wide
        return
    for i in range(0, wide.shape[1], _STRIPE):
        yield wide[:, i : i + _STRIPE].mT @ wide[:, i:]


def _rounded_parts(rows: Tensor) -> Iterator[Tensor]:
    """Stripes with products in bfloat16, in bfloat16; in float32 where a few loud rows are added in float32."""
    if rows.dtype != torch.float32:
        yield from _parts(rows)
        return
    size = torch.linalg.vector_norm(rows, dim=1)
    loud = size > _LOUD * size.median()
    rounded = rows.bfloat16()
    if bool(loud.any()):
        rounded = rounded.masked_fill_(loud[:, None], 0)
    stripes = (rounded[:, i : i + _STRIPE].mT @ rounded[:, i:] for i in range(0, rows.shape[1], _STRIPE))
    if bool(loud.any()):
        yield from (quiet.float() + part for quiet, part in zip(stripes, _parts(rows[loud]), strict=True))
    else:
        yield from stripes


def _add_stripes(total: Tensor | None, stripes: list[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """The sum in the memory of a matrix, or in a new one; stripes of the upper half are let go one by one."""
    first = stripes[0]
    into = first.new_empty(first.shape[1], first.shape[1], dtype=dtype) if total is None else total
    for i in range(0, len(into), _STRIPE):
        here, part = slice(i, i + _STRIPE), stripes.pop(0)
        if total is None:
            into[here, i:] = part
        else:
            into[here, i:] += part
        into[here, :i] = into[:i, here].mT
    return into


def _narrowed(matrix: Tensor, step: int = 256) -> Tensor:
    """A float64 matrix [K, K] in float32, in the first half of its own memory: what is read is never behind what is written."""
    narrow = matrix.view(torch.float32).flatten()[: matrix.numel()].view(matrix.shape)
    for start in range(0, len(matrix), step):
        narrow[start : start + step] = matrix[start : start + step].float()
    return narrow


def _squares_fit(rows: Tensor) -> bool:
    """Whether squares of rows, added up, are far from overflow, by their largest number alone, which is found in a tenth of the time of
    their sums. False for a NaN."""
    if not rows.numel():
        return True
    low, high = torch.aminmax(rows)
    return float(torch.maximum(-low, high)) ** 2 * len(rows) < torch.finfo(rows.dtype).max / 2


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _canonical_signs(vectors: Tensor) -> Tensor:
    """±1 per column [..., 1, d]; argmax alone may return any of several equal maxima."""
    magnitude = vectors.abs()
    d = vectors.shape[-2]
    row = torch.arange(d, device=vectors.device)[:, None]
    is_largest = magnitude == magnitude.amax(-2, keepdim=True)
    first = torch.where(is_largest, row, d).amin(-2, keepdim=True)
    return torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)
