"""How much of a row's range a few codes should cover: the share with the least error, from the number of columns and bits.

A random rotation makes the columns of a part close to independent normal variables. The largest of n of them grows with n, the range
that is best for 2^b evenly spaced codes doesn't: the wider a part, the more of its range is worth giving up.
"""

from __future__ import annotations

from statistics import NormalDist

BEST_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569}
"""Step, in standard deviations, of the uniform quantizer with 2^b codes that has the least mean square error on a normal variable."""


def best_clip(width: int, bits: int) -> float:
    """Share of [min, max] of a row of `width` normal columns that `bits` bits should cover, in (0, 1], to two decimals.

    1 from 8 bits on: their steps are small, and what clipping cuts off is what the high part is there for.

    Source: steps from J. Max, Quantizing for Minimum Distortion (1960), table II; the expected maximum of n normal variables by
    G. Blom's formula (1958), good to 1 % for n >= 8.
    """
    if bits not in BEST_STEP or width < 2:
        return 1.0
    largest = NormalDist().inv_cdf((width - 0.375) / (width + 0.25))
    return min(1.0, round(BEST_STEP[bits] * (2**bits - 1) / 2 / largest, 2))
