"""Exact embedding: which number of a hardware type stands for a code, computed from the formats' bits.

Every value of a format is an integer k times 2^-f. It embeds in a type if some power of two scales all k (times an
optional group multiplier) onto numbers of that type: the hardware number is then k * 2^exponent. A format may be the
type's own grid (the type's rounding is the format's), a subset of it, or the sum of two of its numbers (limbs).
INT8 holds integers of 0 to 255 less 128; what that takes off a sum is a constant for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from export.errors import RecipeError
from export.formats.format import FORMATS, Format, decode, encode, get_format

# Significand bits (the hidden one included), and exponents of the smallest and largest normal number.
FLOAT_TYPES = {"FP16": (11, -14, 15), "BF16": (8, -126, 127), "FP32": (24, -126, 127)}
FP32_BITS = FLOAT_TYPES["FP32"][0]
# Largest relative error of one rounding to nearest, in float32 and in FP16.
ROUNDING, HALF_ROUNDING = 2.0**-FP32_BITS, 2.0 ** -FLOAT_TYPES["FP16"][0]
HALF_MAX = 65504.0
INT8_MAX, UINT8_MAX, INT16_MAX, INT32_MAX = 2**7 - 1, 2**8 - 1, 2**15 - 1, 2**31 - 1
# Types of operands that processors multiply.
HARDWARE = ("INT8", "E4M3", "FP16")
TARGETS = ("INT8", "E4M3", "E5M2", *FLOAT_TYPES)
# Exponents that are tried for a type that is small enough to list.
EXPONENTS = range(8, -40, -1)
# Multipliers that are tried; above 32 a group would be quantized with less than one significant bit.
MULTIPLIER_LIMIT = 32


def magnitudes(fmt: Format) -> NDArray[np.int64]:
    """Positive integers that a quantizer emits, sorted."""
    integers = np.unique(np.abs(fmt.integers))
    return integers[(integers > 0) & (integers <= fmt.kmax)]


@cache
def embeds(name: str, target: str, multiplier: int = 1) -> bool:
    """Does every value of format `name`, times `multiplier`, fit exactly into the type `target`?

    >>> embeds("E3M2", "E4M3"), embeds("E3M2", "INT8"), embeds("E2M1", "E4M3", 7)
    (True, False, False)
    """
    if target not in TARGETS:
        raise RecipeError(f"{target!r} is no embedding type; use one of {', '.join(TARGETS)}")
    if target in FLOAT_TYPES:
        return _fits_float(magnitudes(get_format(name)) * multiplier, *FLOAT_TYPES[target])
    return weight_exponent(name, target, (multiplier,)) is not None


def exact_in(weight: str, activation: str, multipliers: tuple[int, ...] = (1,)) -> list[str]:
    """The types of HARDWARE that hold both operands of a GEMM exactly, the weight's times each of `multipliers`.

    >>> exact_in("E2M1", "E2M3"), exact_in("E2M1", "E3M4"), exact_in("E2M1", "E2M1", (1, 7))
    (['INT8', 'E4M3', 'FP16'], ['FP16'], ['INT8', 'FP16'])
    """
    return [kind for kind in HARDWARE if embeds(activation, kind) and all(embeds(weight, kind, m) for m in multipliers)]


def _fits_float(integers: NDArray[np.int64], significand: int, lowest: int, highest: int) -> bool:
    """True if a power of two puts all integers on a float type's numbers (subnormals included)."""
    top = int(np.floor(np.log2(integers.max())))
    odd_part = integers // (integers & -integers)
    return bool(odd_part.max() < 2**significand) and top <= highest - lowest + significand - 1


@cache
def exact_multipliers(name: str, targets: tuple[str, ...] = ("INT8", "E4M3"), kmax_limit: int = 0) -> tuple[int, ...]:
    """Group multipliers that keep format `name` embedded in all `targets`; `kmax_limit` bounds kmax * m (0: none).

    >>> exact_multipliers("E2M1")
    (1, 2, 3, 4, 5, 6, 8, 10)
    """
    fmt = get_format(name)
    allowed = (m for m in range(1, MULTIPLIER_LIMIT + 1) if not kmax_limit or fmt.kmax * m <= kmax_limit)
    return tuple(m for m in allowed if all(embeds(name, target, m) for target in targets))


def exact_sum_limit(kmax_a: int, kmax_w: int) -> int:
    """Largest K for which a sum of K products of such integers stays exact in float32."""
    return 2**FP32_BITS // (kmax_a * kmax_w)


# Input channels that are counted together where sums are cut.
SUM_UNIT = 64


def float32_sums(integers: NDArray[np.integer], largest: float) -> list[slice] | None:
    """Slices of K over which float32 adds the products of `integers` [N, K] with others up to `largest` exactly and in
    any order: the magnitudes of no sum reach 2^24. As few as there can be of one width, most often one; None where
    SUM_UNIT channels are too many.

    >>> float32_sums(np.full((2, 256), 100, np.int8), 1000.0)
    [slice(0, 128, None), slice(128, 256, None)]
    """
    starts = np.arange(0, integers.shape[1], SUM_UNIT)
    sums = np.add.reduceat(np.abs(integers), starts, axis=1, dtype=np.int64)  # [N, units]
    for count in range(1, len(starts) + 1):
        width = -(-len(starts) // count)
        firsts = np.arange(0, len(starts), width)
        if largest * float(np.add.reduceat(sums, firsts, axis=1).max(initial=0)) < 2**FP32_BITS:
            return [slice(first * SUM_UNIT, (first + width) * SUM_UNIT) for first in firsts.tolist()]
    return None


@cache
def weight_exponent(name: str, kind: str, multipliers: tuple[int, ...] = (1,)) -> int | None:
    """Exponent with which every integer * multiplier is a number of the type, None if there is none.

    >>> weight_exponent("E2M1", "E4M3", (1, 2, 3)), weight_exponent("E2M1", "E4M3", (7,))
    (-1, None)
    """
    fmt = get_format(name)
    integers = np.unique(np.outer(magnitudes(fmt), multipliers))
    return next((e for e in _exponents(fmt, kind) if _contained(integers, e, kind)), None)


def _exponents(fmt: Format, kind: str) -> list[int]:
    """Candidate exponents, the plain value first. INT8 holds the integer itself; FP16 numbers stay below 1 in
    magnitude, so that no sum of products with weights below 1 overflows."""
    if kind == "INT8":
        return [0]
    if kind == "FP16":
        return [-fmt.kmax.bit_length()]
    return [-fmt.fraction_bits, *EXPONENTS]


def _contained(integers: NDArray[np.int64], exponent: int, kind: str) -> bool:
    """Are all integers * 2^exponent numbers of the type?"""
    numbers = integers * 2.0**exponent
    if kind == "FP16":
        return bool(numbers.max() <= 1 and (numbers.astype(np.float16).astype(np.float64) == numbers).all())
    return _numbers(kind).issuperset(numbers.tolist())


@cache
def _numbers(kind: str) -> frozenset[float]:
    """Magnitudes of a hardware type that is small enough to list; 0 included."""
    if kind == "INT8":
        return frozenset(float(k) for k in range(INT8_MAX + 1))
    values = np.abs(FORMATS[kind].values)
    return frozenset(values[np.isfinite(values)].tolist())


# --- activations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HardwareNumber:
    """How codes of `format` become numbers of the type `type`: integer * 2^exponent = sum of limbs.

    rounds_itself: the format is the type's own grid, so that the type's rounding is the format's. limb_base: 0 where
    both limbs are rounded by the type itself (E4M3), else the radix of the high limb (INT8). shift: what is taken off
    the integer, 128 for unsigned ones beyond INT8's own range.
    """

    format: str
    type: str
    exponent: int
    rounds_itself: bool
    limbs: int = 1
    limb_base: int = 0
    shift: int = 0

    @property
    def gain(self) -> float:
        """Hardware number per unit of value: value * gain = integer * 2^exponent. A power of two, so exact."""
        return 2.0 ** (get_format(self.format).fraction_bits + self.exponent)

    @property
    def limb_weights(self) -> tuple[float, ...]:
        """Weight of each limb in units of the hardware number, high limb first."""
        if self.limbs == 1:
            return (1.0,)
        return (float(self.limb_base or 1), 1.0)


@cache
def activation_number(name: str, kind: str, max_limbs: int) -> HardwareNumber | None:
    """The cheapest exact form of an activation format, None if `max_limbs` numbers of the type cannot hold it.

    >>> activation_number("E2M3", "E4M3", 1)
    HardwareNumber(format='E2M3', type='E4M3', exponent=-9, rounds_itself=True, limbs=1, limb_base=0, shift=0)
    """
    fmt = get_format(name)
    integers = magnitudes(fmt)
    held = [e for e in _exponents(fmt, kind) if _contained(integers, e, kind)]
    own = [e for e in held if _is_own_grid(integers, e, kind)]
    if held:
        return HardwareNumber(name, kind, (own or held)[0], rounds_itself=bool(own))
    if max_limbs == 1 and kind == "INT8" and not fmt.sign_bits and fmt.kmax <= UINT8_MAX:
        return HardwareNumber(name, kind, 0, rounds_itself=False, shift=INT8_MAX + 1)
    return _two_limbs(fmt, kind) if max_limbs >= 2 else None


def _is_own_grid(integers: NDArray[np.int64], exponent: int, kind: str) -> bool:
    """True if the type has exactly these numbers up to the largest, so that its rounding is the format's."""
    if kind == "FP16":
        return False
    top = float(integers.max()) * 2.0**exponent
    return {n for n in _numbers(kind) if 0 < n <= top} == set((integers * 2.0**exponent).tolist())


def _two_limbs(fmt: Format, kind: str) -> HardwareNumber | None:
    integers = magnitudes(fmt)
    if kind == "INT8":
        base = 2 ** max(0, int(fmt.kmax // INT8_MAX).bit_length())
        high = np.rint(integers / base)
        fits = high.max() <= INT8_MAX and np.abs(integers - high * base).max() <= INT8_MAX
        return HardwareNumber(fmt.name, kind, 0, rounds_itself=False, limbs=2, limb_base=base) if fits else None
    values = integers * 2.0**-fmt.fraction_bits
    e4m3 = FORMATS["E4M3"]
    rest = np.abs(values - decode(e4m3, encode(e4m3, values)))
    fits = values.max() <= e4m3.max_value and _numbers(kind).issuperset(rest.tolist())
    return HardwareNumber(fmt.name, kind, -fmt.fraction_bits, rounds_itself=False, limbs=2) if fits else None


# --- activations as unsigned bytes, which CPUs multiply with signed ones ---------------------------------------------

# A u8 operand with this zero point holds integers up to the zero point less one.
SMALL_ZERO, LARGE_ZERO = 64, 128


def zero_point(kmax: int) -> int:
    """Zero point of a u8 operand for integers up to `kmax` in magnitude; the smaller one keeps pair sums small."""
    return SMALL_ZERO if kmax < SMALL_ZERO else LARGE_ZERO


def limb_base(kmax: int, limbs: int) -> int:
    """Weight of the high limb: 1 for one limb, else the smallest power of two that fits it into 64 codes."""
    if limbs == 1:
        return 1
    base = 2
    while round(kmax / base) >= SMALL_ZERO:
        base *= 2
    return base


def fits_byte(fmt: Format) -> bool:
    """Does one u8 operand hold the format's integers?"""
    return fmt.kmax < LARGE_ZERO if fmt.sign_bits else fmt.kmax <= UINT8_MAX


def largest_code(fmt: Format, limbs: int) -> int:
    """Largest u8 code of any limb of the format; unsigned ones in one limb need no zero point."""
    if limbs == 1 and not fmt.sign_bits:
        return fmt.kmax
    base = limb_base(fmt.kmax, limbs)
    largest = max(round(fmt.kmax / base), base // 2 if limbs > 1 else 0)
    return largest + zero_point(largest)


def pair_sum(fmt: Format, limbs: int, weight: int) -> int:
    """What two products of codes of the format with the integer `weight` can add up to."""
    return 2 * largest_code(fmt, limbs) * weight


def pair_limit(activation: str) -> int:
    """Largest weight integer (multiplier included) that is safe beside `activation` on every CPU: those without dot
    products of bytes add pairs of u8 x s8 products in saturating int16."""
    fmt = get_format(activation)
    largest = largest_code(fmt, 1) if fits_byte(fmt) else 2 * SMALL_ZERO - 1  # as limbs, whose integers have 7 bits
    return INT16_MAX // (2 * largest)


# --- 4-bit weights that are decoded by arithmetic ------------------------------------------------------------------


@cache
def decoding_lines(name: str) -> tuple[tuple[float, float], ...]:
    """Lines (slope, intercept) whose maximum at i is the integer of the i-th magnitude of a signed 4-bit format.

    Such a maximum decodes 4-bit indices with a few multiplications and no table. Empty where the magnitudes are not
    convex or the format is not a signed 4-bit one.

    >>> decoding_lines("E2M1"), decoding_lines("E1M2"), decoding_lines("E2M3")
    (((1.0, 0.0), (2.0, -4.0), (4.0, -16.0)), ((1.0, 0.0),), ())
    """
    fmt = get_format(name)
    if fmt.bits != 4 or not (fmt.sign_bits or fmt.is_integer):
        return ()
    integers = np.concatenate([[0], magnitudes(fmt)])
    slopes = np.diff(integers)
    if (np.diff(slopes) < 0).any():
        return ()
    lines = {float(m): float(y - m * i) for i, (m, y) in enumerate(zip(slopes, integers, strict=False))}
    return tuple(lines.items())
