"""Exact sums of float64 as a few numbers: partial sums, added anywhere in any order, give the same bits."""

from __future__ import annotations

import math

import numpy as np

_LARGEST = 2.0**900
"""Above this a splitting constant could overflow; gradients of a working training are far below."""


def terms(values: np.ndarray) -> np.ndarray:
    """Returns a few float64 (about one per 30 bits of the range of `values`) with the same exact sum; one NaN if any value is not finite.

    Each round cuts all values at one power of two, so that the parts above it can be added without rounding, and continues with the rest
    (Rump, Ogita, Oishi: Accurate floating-point summation part I, ExtractVector).
    """
    rest = values.astype(np.float64, copy=False)
    if not np.isfinite(rest).all():
        return np.array([math.nan])
    room = math.ceil(math.log2(rest.size + 2))
    found: list[float] = []
    while (largest := float(np.abs(rest).max(initial=0.0))) > 0.0:
        if largest > _LARGEST:
            return np.array([*found, *_slowly(rest)])
        _, exponent = math.frexp(largest)  # largest < 2**exponent
        cut = math.ldexp(1.0, exponent + room)
        above = (cut + rest) - cut
        found.append(float(above.sum()))
        rest = rest - above
        rest = rest[rest != 0.0]
    return np.array(found, dtype=np.float64)


def _slowly(values: np.ndarray) -> list[float]:
    """Returns the same for any finite values: collects the rounding error of each sum until none is left."""
    given, found = values.tolist(), []
    try:
        while (left := math.fsum([*given, *(-term for term in found)])) != 0.0:
            found.append(left)
    except OverflowError:  # the sum exceeds float64
        return [math.inf]
    return found
