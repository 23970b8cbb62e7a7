"""Exact embedding: which format fits into which hardware type, computed from the bits.

Every value of a format is an integer k times 2^-f. It embeds in a type if some power of two scales all k (times an
optional group multiplier) onto numbers of that type.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from export.errors import RecipeError
from export.formats.format import FORMATS, Format, get_format

# Significand bits (the hidden one included), and exponents of the smallest and largest normal number.
FLOAT_TYPES = {"FP16": (11, -14, 15), "BF16": (8, -126, 127), "FP32": (24, -126, 127)}
INT8_MAX = 127
TARGETS = ("INT8", "E4M3", "E5M2", *FLOAT_TYPES)
# Multipliers that are tried; above 32 a group would be quantized with less than one significant bit.
MULTIPLIER_LIMIT = 32


def _fits_float(images: np.ndarray, significand: int, lowest: int, highest: int) -> bool:
    """True if a power of two puts all integers on a float type's numbers (subnormals included)."""
    top = int(np.floor(np.log2(images.max())))
    odd_part = images // (images & -images)
    return bool(odd_part.max() < 2**significand) and top <= highest - lowest + significand - 1


def _fits_format(images: np.ndarray, target: Format) -> bool:
    numbers = set(np.unique(target.image[target.image > 0]).tolist())
    shifts = range(int(target.kmax).bit_length())
    return any(all(int(k) << shift in numbers for k in images) for shift in shifts)


@cache
def embeds(name: str, target: str, multiplier: int = 1) -> bool:
    """Does every value of format `name`, times `multiplier`, fit exactly into the type `target`?

    >>> embeds("E3M2", "E4M3"), embeds("E3M2", "INT8"), embeds("E2M1", "E4M3", 7)
    (True, False, False)
    """
    if target not in TARGETS:
        raise RecipeError(f"{target!r} is no embedding type; use one of {', '.join(TARGETS)}")
    fmt = get_format(name)
    images = np.unique(np.abs(fmt.image))
    images = images[(images > 0) & (images <= fmt.kmax)] * multiplier
    if target == "INT8":
        return int(images.max()) <= INT8_MAX
    if target in FLOAT_TYPES:
        return _fits_float(images, *FLOAT_TYPES[target])
    return _fits_format(images, FORMATS[target])


@cache
def exact_multipliers(name: str, targets: tuple[str, ...] = ("INT8", "E4M3"), kmax_limit: int = 0) -> tuple[int, ...]:
    """Group multipliers that keep format `name` embedded in all `targets`; `kmax_limit` bounds kmax * m (0: none).

    >>> exact_multipliers("E2M1")
    (1, 2, 3, 4, 5, 6, 8, 10)
    """
    fmt = get_format(name)
    allowed = (m for m in range(1, MULTIPLIER_LIMIT + 1) if not kmax_limit or fmt.kmax * m <= kmax_limit)
    return tuple(m for m in allowed if all(embeds(name, target, m) for target in targets))


def exact_sum_limit(kmax_a: int, kmax_w: int, accumulator_bits: int = 24) -> int:
    """Largest K for which a sum of K products stays exact in an accumulator of that many significand bits."""
    return 2**accumulator_bits // (kmax_a * kmax_w)
