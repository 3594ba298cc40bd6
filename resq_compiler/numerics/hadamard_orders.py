"""Hadamard matrices (±1 entries, H Hᵀ = n I) built from number theory: which orders are known here, and each matrix.

Constructions: Sylvester (powers of two); Paley I, order q + 1 for a prime power q = 3 mod 4; Paley II, order 2(q + 1)
for q = 1 mod 4 (R. Paley 1933); Williamson, order 4p from four symmetric circulants of prime order p (J. Williamson
1944). Kronecker products of these are left to `hadamard.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LARGEST_ORDER = 2048
"""Above this a dense factor costs more than the transform is worth, so no matrix is built."""

# p: (class size, four masks). Z_p* is cut into the cosets of its subgroup of `class size` elements, which contains -1:
# every sequence is symmetric. Entry 0 is +1; coset i, that of the i-th of `_powers_of_primitive_element(p, 1)`, is +1
# where bit i of the mask is set. Found by our own exhaustive search for four sequences whose power spectra add to 4p;
# that they exist is classical (23: Baumert, Golomb, Hall 1962; 43: Williamson 1944).
WILLIAMSON = {
    23: (2, (195, 1989, 1182, 1127)),
    29: (2, (703, 6249, 6745, 16240)),
    43: (6, (51, 82, 116, 106)),
}


def is_known_order(n: int) -> bool:
    """True when `base_matrix(n)` can build a Hadamard matrix of order n."""
    if n < 1 or n > LARGEST_ORDER:
        return False
    if is_power_of_two(n):
        return True
    return n % 4 == 0 and (_paley_one_applies(n) or _paley_two_applies(n) or n // 4 in WILLIAMSON)


@lru_cache(maxsize=64)
def base_matrix(n: int) -> Tensor:
    """The Hadamard matrix [n, n] int8 of a known order, on the CPU; shared, so do not write to it.

    Raises: ValueError: n is not a known order (callers ask `is_known_order` first).
    """
    if not is_known_order(n):
        raise ValueError(f"no construction for a Hadamard matrix of order {n}; ask is_known_order first")
    if is_power_of_two(n):
        return _sylvester(n).to(torch.int8)
    if _paley_one_applies(n):
        return _paley_one(n - 1).to(torch.int8)
    if _paley_two_applies(n):
        return _paley_two(n // 2 - 1).to(torch.int8)
    return _williamson(n // 4).to(torch.int8)


def is_power_of_two(n: int) -> bool:
    """1, 2, 4, 8, ..."""
    return n > 0 and n & (n - 1) == 0


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _paley_one_applies(n: int) -> bool:
    return (n - 1) % 4 == 3 and prime_power(n - 1) is not None


def _paley_two_applies(n: int) -> bool:
    return (n // 2 - 1) % 4 == 1 and prime_power(n // 2 - 1) is not None


def _sylvester(n: int) -> Tensor:
    """H[i, j] = (-1)^popcount(i & j)."""
    index = torch.arange(n, device="cpu")
    bits = index[:, None] & index
    parity = torch.zeros_like(bits)
    for shift in range(n.bit_length()):
        parity ^= (bits >> shift) & 1
    return 1 - 2 * parity


def _paley_one(q: int) -> Tensor:
    """H = I + S, where S borders the skew matrix of quadratic characters with +1 above and -1 at the left."""
    skew = _bordered_characters(q)
    skew[1:, 0] = -1
    return torch.eye(q + 1, dtype=torch.int64, device="cpu") + skew


def _paley_two(q: int) -> Tensor:
    """H = C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], with C the symmetric conference matrix of order q + 1."""
    conference = _bordered_characters(q)
    plus = torch.tensor([[1, 1], [1, -1]], device="cpu")
    diagonal = torch.tensor([[1, -1], [-1, -1]], device="cpu")
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.int64, device="cpu"), diagonal)


def _bordered_characters(q: int) -> Tensor:
    """[q+1, q+1]: zero corner, ones along the border, then χ(i - j) for the elements i, j of GF(q)."""
    field = prime_power(q)
    assert field is not None
    p, k = field
    character = _quadratic_character(p, k)
    elements = torch.arange(q, device="cpu")
    difference = torch.zeros(q, q, dtype=torch.int64, device="cpu")
    for position in range(k):  # elements are base-p numerals of polynomial coefficients: subtraction has no carry
        digit = elements // p**position % p
        difference += (digit[:, None] - digit) % p * p**position
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int64, device="cpu")
    bordered[1:, 1:] = character[difference]
    bordered[0, 0] = 0
    return bordered


def _quadratic_character(p: int, k: int) -> Tensor:
    """χ over GF(p^k) as a table [p^k]: 0 at zero, +1 at even powers of a primitive element, -1 at odd ones."""
    table = torch.zeros(p**k, dtype=torch.int64, device="cpu")
    powers = torch.tensor(_powers_of_primitive_element(p, k), device="cpu")
    table[powers[0::2]] = 1
    table[powers[1::2]] = -1
    return table


def _powers_of_primitive_element(p: int, k: int) -> list[int]:
    """1, x, x², ... (p^k - 1 of them) modulo the first monic polynomial of degree k for which x is primitive."""
    for numeral in range(1, p**k):
        tail = [numeral // p**i % p for i in range(k)]
        powers = _powers_of_x(p, tail)
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) always has a primitive polynomial")


def _powers_of_x(p: int, tail: list[int]) -> list[int]:
    """Powers of x modulo x^k + Σ tail[i] x^i over GF(p), as numerals, until 1 returns or a power repeats."""
    k = len(tail)
    element = [1] + [0] * (k - 1)
    seen: dict[int, None] = {}
    numeral = 1
    while numeral not in seen and numeral != 0:
        seen[numeral] = None
        carry = element[-1]
        element = [(low - carry * t) % p for low, t in zip([0, *element[:-1]], tail, strict=True)]
        numeral = sum(digit * p**i for i, digit in enumerate(element))
    return list(seen)


def _williamson(p: int) -> Tensor:
    """The Williamson array of four symmetric circulants A, B, C, D of order p: its row blocks are orthogonal."""
    class_size, masks = WILLIAMSON[p]
    a, b, c, d = (_circulant(_class_sequence(p, class_size, mask)) for mask in masks)
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _class_sequence(p: int, class_size: int, mask: int) -> Tensor:
    """[p] of ±1, constant on the cosets of the subgroup of order class_size (see WILLIAMSON)."""
    powers = _powers_of_primitive_element(p, 1)
    classes = (p - 1) // class_size
    sequence = torch.ones(p, dtype=torch.int64, device="cpu")
    for exponent, element in enumerate(powers):
        sequence[element] = 1 if mask >> (exponent % classes) & 1 else -1
    return sequence


def _circulant(first_row: Tensor) -> Tensor:
    index = torch.arange(len(first_row), device="cpu")
    return first_row[(index - index[:, None]) % len(first_row)]
