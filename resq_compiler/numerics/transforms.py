"""Invertible linear maps of the channels of a value: y = x T, undone in whatever reads y.

    writer    x = z Wᵀ + b     ->  y = z (Tᵀ W)ᵀ + b T          `into_outputs`
    reader    x Wᵀ             ->  y (W T⁻ᵀ)ᵀ                   `into_inputs`

U_A to U_D of ResQ, the scales of SmoothQuant, the blocks and permutations of DuQuant and the Kronecker products of FlatQuant are of these
kinds. Every kind says what it costs where it stays an operator (`products`), and what of it can be learned (`learnable`). All methods
are differentiable, and compute in the dtype of what they are given.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from resq_compiler.errors import QuantError
from resq_compiler.numerics.hadamard import hadamard_plan, hadamard_transform


class Transform(ABC):
    """A map of `width` channels, the last dimension of x [..., width]."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels that it maps."""

    @property
    @abstractmethod
    def products(self) -> int:
        """Multiplications for each token where it stays an operator."""

    @property
    def orthogonal(self) -> bool:
        """T⁻¹ = Tᵀ: lengths stay."""
        return True

    @property
    def elementwise(self) -> bool:
        """Channels are not mixed: gains of norms and products of channels let it pass."""
        return False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the ending that names it in a graph."""
        return {}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x T."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """x T⁻¹."""

    def into_inputs(self, w: Tensor) -> Tensor:
        """W T⁻ᵀ, the weight [N, width] that reads x T."""
        return self.forward(w)

    def into_outputs(self, w: Tensor) -> Tensor:
        """Tᵀ W, the weight [width, K], or the bias [width], that writes x T."""
        return self.forward(w.movedim(0, -1)).movedim(-1, 0)

    def to(self, device: torch.device) -> Transform:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        kind: Any = self
        return dataclasses.replace(kind, **moved)

    def learnable(self, sizes: Sequence[int] | None = None) -> Learnable:
        """What of it can be learned, starting from itself; sizes: parts of the channels that must not mix. Raises QuantError: nothing."""
        raise QuantError(f"a transform of the kind {type(self).__name__} has nothing to learn")


class Learnable(nn.Module, ABC):
    """Parameters without constraints, and the transform that they stand for."""

    @abstractmethod
    def transform(self) -> Transform:
        """The transform of the parameters as they are now, differentiable by them."""


@dataclass(frozen=True, eq=False)
class Rotation(Transform):
    """x U, U [d, d] orthogonal."""

    u: Tensor

    @property
    def width(self) -> int:
        return len(self.u)

    @property
    def products(self) -> int:
        return self.u.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.u}

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.u.to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return x @ self.u.to(x.dtype).mT

    def into_outputs(self, w: Tensor) -> Tensor:
        return self.u.to(w.dtype).mT @ w

    def learnable(self, sizes: Sequence[int] | None = None) -> Learnable:
        return LearnableRotation(self.u, sizes or (self.width,))


@dataclass(frozen=True, eq=False)
class HeadRotation(Transform):
    """x blockdiag(U_1, ..., U_H), one orthogonal U [G, D, D] for each key/value head; head h of H uses U[h // (H / G)]."""

    u: Tensor

    @property
    def width(self) -> int:
        """Channels of the key/value heads; as many times more are taken too, for query heads."""
        return len(self.u) * self.u.shape[-1]

    @property
    def products(self) -> int:
        return self.u.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.u}

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...hd,hde->...he", *self._by_head(x)).flatten(-2)

    def inverse(self, x: Tensor) -> Tensor:
        return torch.einsum("...he,hde->...hd", *self._by_head(x)).flatten(-2)

    def into_outputs(self, w: Tensor) -> Tensor:
        u = self.u.to(w.dtype).repeat_interleave(len(w) // self.u.shape[-1] // len(self.u), 0)
        return torch.einsum("gde,gd...->ge...", u, w.unflatten(0, u.shape[:2])).flatten(0, 1)

    def _by_head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H, D], for as many heads as it has, and U [H, D, D]."""
        count = x.shape[-1] // self.u.shape[-1]
        u = self.u.to(x.dtype).repeat_interleave(count // len(self.u), 0)
        return x.unflatten(-1, (count, -1)), u

    def learnable(self, sizes: Sequence[int] | None = None) -> Learnable:
        return LearnableHeads(self.u, sizes or (self.u.shape[-1],))


@dataclass(frozen=True, eq=False)
class BlockRotation(Transform):
    """x blockdiag(U_1, ..., U_G) with its columns in another order: U [G, D, D] orthogonal, order [G·D]."""

    u: Tensor
    order: Tensor

    @property
    def width(self) -> int:
        return len(self.order)

    @property
    def products(self) -> int:
        return self.u.numel()

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.u, "_order": self.order}

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.einsum("...gd,gde->...ge", x.unflatten(-1, self.u.shape[:2]), self.u.to(x.dtype)).flatten(-2)
        return turned.index_select(-1, self.order)

    def inverse(self, x: Tensor) -> Tensor:
        sorted_back = x.index_select(-1, self.order.argsort()).unflatten(-1, self.u.shape[:2])
        return torch.einsum("...gd,ged->...ge", sorted_back, self.u.to(x.dtype)).flatten(-2)


@dataclass(frozen=True, eq=False)
class HadamardRotation(Transform):
    """x H / sqrt(n) as a fast transform, one H for each stretch of `sizes` channels. It is what it is: nothing to learn."""

    sizes: tuple[int, ...]

    @property
    def width(self) -> int:
        return sum(self.sizes)

    @property
    def products(self) -> int:
        return sum(n * sum(hadamard_plan(n).orders) for n in self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self._turned(x, False)

    def inverse(self, x: Tensor) -> Tensor:
        return self._turned(x, True)

    def _turned(self, x: Tensor, transpose: bool) -> Tensor:
        pieces = [hadamard_transform(p, hadamard_plan(p.shape[-1]), transpose) for p in x.split(list(self.sizes), -1)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


@dataclass(frozen=True, eq=False)
class Scaling(Transform):
    """x · s, s [d] of any sign but zero."""

    s: Tensor

    @property
    def width(self) -> int:
        return len(self.s)

    @property
    def products(self) -> int:
        return len(self.s)

    @property
    def orthogonal(self) -> bool:
        return False

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.s}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s.to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        return x / self.s.to(x.dtype)

    def into_inputs(self, w: Tensor) -> Tensor:
        return w / self.s.to(w.dtype)

    def learnable(self, sizes: Sequence[int] | None = None) -> Learnable:
        return LearnableScaling(self.s)


@dataclass(frozen=True, eq=False)
class Permutation(Transform):
    """x[order]: channel j of the result is channel order[j]."""

    order: Tensor

    @property
    def width(self) -> int:
        return len(self.order)

    @property
    def products(self) -> int:
        return 0

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"": self.order}

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def inverse(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order.argsort())


@dataclass(frozen=True, eq=False)
class Kronecker(Transform):
    """x (A ⊗ B): rows of x as matrices [a, b] become Aᵀ X B; A [a, a] and B [b, b] invertible."""

    a: Tensor
    b: Tensor

    @property
    def width(self) -> int:
        return len(self.a) * len(self.b)

    @property
    def products(self) -> int:
        return self.width * (len(self.a) + len(self.b))

    @property
    def orthogonal(self) -> bool:
        return all(is_orthogonal(m) for m in (self.a, self.b))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"_a": self.a, "_b": self.b}

    def forward(self, x: Tensor) -> Tensor:
        return times_kronecker(x, self.a.to(x.dtype), self.b.to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        a, b = (torch.linalg.inv(m.double()).to(x.dtype) for m in (self.a, self.b))
        return times_kronecker(x, a, b)

    def into_inputs(self, w: Tensor) -> Tensor:
        a, b = (torch.linalg.inv(m.double()).to(w.dtype).mT for m in (self.a, self.b))
        return times_kronecker(w, a, b)


@dataclass(frozen=True, eq=False)
class Product(Transform):
    """x T_1 T_2 ...: one transform after the other, all of one width."""

    factors: tuple[Transform, ...]

    @property
    def width(self) -> int:
        return self.factors[0].width

    def to(self, device: torch.device) -> Product:
        return Product(tuple(t.to(device) for t in self.factors))

    @property
    def products(self) -> int:
        return sum(t.products for t in self.factors)

    @property
    def orthogonal(self) -> bool:
        return all(t.orthogonal for t in self.factors)

    @property
    def elementwise(self) -> bool:
        return all(t.elementwise for t in self.factors)

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.factors:
            x = transform.forward(x)
        return x

    def inverse(self, x: Tensor) -> Tensor:
        for transform in reversed(self.factors):
            x = transform.inverse(x)
        return x

    def into_inputs(self, w: Tensor) -> Tensor:
        for transform in self.factors:
            w = transform.into_inputs(w)
        return w

    def into_outputs(self, w: Tensor) -> Tensor:
        for transform in self.factors:
            w = transform.into_outputs(w)
        return w


class _Orthogonal(nn.Module):
    """A matrix [n, n] that stays orthogonal while its parameters move: base · Cayley(A - Aᵀ), the base kept as it is."""

    def __init__(self, base: Tensor):
        super().__init__()
        self.matrix: Tensor
        self.register_parameter("matrix", nn.Parameter(base.detach().float().clone()))
        parametrizations.orthogonal(self, "matrix", orthogonal_map="cayley", use_trivialization=True)


class LearnableRotation(Learnable):
    """U · blockdiag(R_1, R_2, ...), the R orthogonal, each of one part of the columns of U, and the identity at first."""

    def __init__(self, u: Tensor, sizes: Sequence[int]):
        super().__init__()
        if sum(sizes) != len(u):
            raise QuantError(f"learnable rotation: expected parts of {len(u)} columns together, got {list(sizes)}")
        self.register_buffer("base", u.detach().clone())
        self.turns = nn.ModuleList(_Orthogonal(torch.eye(n)) for n in sizes)

    def transform(self) -> Rotation:
        base = self.get_buffer("base")
        turn = torch.block_diag(*(one.matrix.to(base.dtype) for one in self.turns))
        return Rotation(base @ turn)


class LearnableHeads(Learnable):
    """A LearnableRotation for each key/value head."""

    def __init__(self, u: Tensor, sizes: Sequence[int]):
        super().__init__()
        self.each = nn.ModuleList(LearnableRotation(one, sizes) for one in u)

    def transform(self) -> HeadRotation:
        found = [one.transform().u for one in self.each if isinstance(one, LearnableRotation)]
        return HeadRotation(torch.stack(found))


class LearnableScaling(Learnable):
    """s · exp(p): no sign changes, and equal steps are equal factors."""

    def __init__(self, s: Tensor):
        super().__init__()
        self.register_buffer("base", s.detach().clone())
        self.logarithm = nn.Parameter(torch.zeros_like(s, dtype=torch.float32))

    def transform(self) -> Scaling:
        base = self.get_buffer("base")
        return Scaling(base * self.logarithm.to(base.dtype).exp())


def times_kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x (A ⊗ B) over the last dimension."""
    return (a.mT @ x.unflatten(-1, (len(a), len(b))) @ b).flatten(-2)


def is_orthogonal(matrix: Tensor) -> bool:
    """Whether M Mᵀ is the identity, up to rounding in the matrix's dtype."""
    gap = (matrix @ matrix.mT).double() - torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return float(gap.abs().max()) < 100 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5


def balanced_factors(width: int) -> tuple[int, int]:
    """a · b = width with a and b as near as they can be, a <= b: the sizes of a Kronecker product that costs least."""
    a = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
    return a, width // a
