"""Fast Hadamard transforms of any width that has a known matrix, as a few small matrix products.

Index convention, for whoever re-implements it from a plan: with factors f0, f1, ..., f_last (square, ±1),

    H = I_blocks ⊗ f0 ⊗ f1 ⊗ ... ⊗ f_last                       y = x H / sqrt(block)        (row vectors)

so x[..., n] viewed row-major as x[..., b, i0, i1, ..., i_last] (b the block, the last index fastest) gives

    y[..., b, j0, ..., j_last] = Σ_i x[..., b, i0, ..., i_last] f0[i0, j0] ... f_last[i_last, j_last] / sqrt(block).

`transpose=True` uses the transposed factors, and is the inverse. Factors may be applied in any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from resq_compiler.errors import QuantError
from resq_compiler.numerics.hadamard_orders import LARGEST_ORDER, base_matrix, is_known_order, is_power_of_two

# One more pass over the data costs about as much as widening a factor by this many columns (measured on CPU, float32).
_PASS_COST = 50


@dataclass(frozen=True)
class HadamardPlan:
    """How a transform of width n is built: `blocks` copies of kron(factors) along the diagonal.

    n: width. orders: the order of each factor, first factor slowest; their product is `block`. blocks: n / block, 1
    when the transform spans the full width. reason: why this shape, and for a block transform why not the full width.
    """

    n: int
    orders: tuple[int, ...]
    blocks: int
    reason: str

    @property
    def block(self) -> int:
        """The width that one Hadamard matrix spans."""
        return self.n // self.blocks

    @property
    def full_width(self) -> bool:
        """True when one Hadamard matrix spans all n columns."""
        return self.blocks == 1

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The ±1 matrices, float64 on the CPU, with H = I_blocks ⊗ factors[0] ⊗ factors[1] ⊗ ... (not scaled)."""
        return _plain_factors(self)


@lru_cache(maxsize=1024)
def hadamard_plan(n: int) -> HadamardPlan:
    """The cheapest known factorization of a Hadamard matrix of order n, else the widest block transform.

    Raises: QuantError: n is not a positive width.
    """
    if n < 1:
        raise QuantError(f"hadamard_plan: expected a positive width, got {n}; check the tensor's last dimension")
    orders = _cheapest_orders(n)
    if orders is not None:
        return HadamardPlan(n, orders, 1, f"full width: {' x '.join(map(str, orders)) or '1'}")
    block = max(b for b in range(1, n // 2 + 1) if n % b == 0 and _cheapest_orders(b) is not None)
    inner = _cheapest_orders(block)
    assert inner is not None
    return HadamardPlan(n, inner, n // block, f"{_why_not_full_width(n)}; {n // block} blocks of {block} instead")


def hadamard_transform(
    x: Tensor, plan: HadamardPlan, transpose: bool = False, factors: Sequence[Tensor] | None = None
) -> Tensor:
    """x H / sqrt(block) over the last dimension, or x Hᵀ / sqrt(block) (the inverse) when `transpose`.

    Args:    x: [..., n] float; leading dimensions may be symbolic. plan: from `hadamard_plan(n)`.
             factors: constants from `scaled_factors` kept by the caller; default: a cache per dtype and device.
    Returns: [..., n], dtype of x. float64 is computed in float64, everything else in float32 and rounded once.
    Raises:  QuantError: the last dimension of x is not plan.n, or x is not floating point.
    """
    if x.shape[-1] != plan.n or not x.is_floating_point():
        raise QuantError(
            f"hadamard_transform: expected a floating-point [..., {plan.n}], got {x.dtype} {tuple(x.shape)}; "
            "make the plan with hadamard_plan(x.shape[-1])"
        )
    wide = x if x.dtype == torch.float64 else x.float()
    if factors is None:
        factors = _cached_factors_like(wide, plan)
    y, right = wide, plan.block
    for factor in factors:
        order = factor.shape[0]
        right //= order
        step = factor.mT if transpose else factor
        if right == 1:
            y = y.reshape(-1, order) @ step
        else:
            y = step.mT @ y.reshape(-1, order, right)
    return y.reshape(x.shape).to(x.dtype)


def hadamard_matrix(plan: HadamardPlan | int) -> Tensor:
    """H as [n, n] float64 of ±1 (and 0 between the blocks of a block transform), without the 1/sqrt(block)."""
    if isinstance(plan, int):
        plan = hadamard_plan(plan)
    matrix = torch.eye(plan.blocks, dtype=torch.float64, device="cpu")
    for factor in plan.factors:
        matrix = torch.kron(matrix, factor)
    return matrix


@lru_cache(maxsize=64)
def scaled_factors(plan: HadamardPlan, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The plan's factors on a device, the last one carrying 1/sqrt(block). Shared: do not write to them."""
    with _real_tensors():
        scaled = list(plan.factors)
        if scaled:
            scaled[-1] = scaled[-1] / math.sqrt(plan.block)
        return tuple(factor.to(device=device, dtype=dtype) for factor in scaled)


@lru_cache(maxsize=64)
def _plain_factors(plan: HadamardPlan) -> tuple[Tensor, ...]:
    with _real_tensors():
        return tuple(base_matrix(order).double() for order in plan.orders)


def _cached_factors_like(x: Tensor, plan: HadamardPlan) -> tuple[Tensor, ...]:
    if isinstance(x, FakeTensor) and not x.fake_mode.allow_non_fake_inputs:
        return tuple(x.new_empty(order, order) for order in plan.orders)
    return scaled_factors(plan, x.dtype, x.device)


def _real_tensors() -> ExitStack:
    """Build cached constants outside fake, tracing and inference modes: they outlive the caller's mode."""
    stack = ExitStack()
    stack.enter_context(_disable_current_modes())
    stack.enter_context(torch.inference_mode(False))
    return stack


@lru_cache(maxsize=4096)
def _cheapest_orders(n: int) -> tuple[int, ...] | None:
    """Known orders whose product is n with the least cost, odd-carrying ones first; None when there are none."""
    if n == 1:
        return ()
    if n > 2 and n % 4:
        return None
    candidates = []
    for order in range(2, min(n, LARGEST_ORDER) + 1, 2):
        if n % order == 0 and is_known_order(order):
            rest = _cheapest_orders(n // order)
            if rest is not None:
                candidates.append(tuple(sorted((order, *rest), key=lambda k: (is_power_of_two(k), k))))
    return min(candidates, key=lambda orders: (_cost(orders), orders)) if candidates else None


def _cost(orders: tuple[int, ...]) -> int:
    return sum(orders) + _PASS_COST * len(orders)


def _why_not_full_width(n: int) -> str:
    if n % 4:
        return f"no Hadamard matrix of order {n} exists (not 1, 2 or a multiple of 4)"
    return f"no construction here gives a Hadamard matrix of order {n}"
