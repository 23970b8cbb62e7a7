"""How many products a tensor core may add up before the sum goes to a float32 addition of its own ("promotion").

A sum of products is an integer times a power of two: |sum| <= K * kmax_a * kmax_w. An accumulator of `bits` significand
bits holds every integer up to 2^bits, so the sum is exact, in any order, while no partial sum is larger. Three cases:

- "exact": K * kmax_a * kmax_w <= 2^bits. True for all data.
- "expected": the largest sums that data of the usual spread gives, DEVIATIONS standard deviations of a sum of
  independent products, stay within 2^bits. With `every`: those of `every` products do, and the float32 addition that
  follows is exact while the whole sum stays within 2^24. Rows that are far from that (all products of one sign) round.
- "rounded": neither holds. One rounding of 2^(1 - bits) of the running sum may happen in each step of the tensor core;
  promotion every EVERY_ROUNDED products keeps those within short sums. The float32 additions round by 2^-24 each.
  With FP16 operands the accumulator is float32 itself: promotion would not make its sum exact, and is not used.

INT8 operands are added in INT32, which a spec that has them never leaves: exact for all data.

Accumulators: float32 (24 bits) for FP16 operands and for FP8 on Blackwell; 14 bits (a float of 13 fraction bits, which
truncates) for FP8 on Ada and Hopper: arXiv 2411.10958, and 2412.19437 section 3.3. Cited, not measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from export.formats.operands import FP32_BITS
from plugins.gpu.spec import GemmSpec

SHORT_BITS = 14
SHORT_ACCUMULATORS = (89, 90)
# Root mean square of a row over its largest magnitude: 1152 to 4608 normal numbers reach 3.3 to 3.6 deviations.
RMS_SHARE = 0.29
DEVIATIONS = 3.0
STEPS = (128, 64, 32)  # promotion per step of K; 32 products are one FP8 instruction
EVERY_ROUNDED = 128


@dataclass(frozen=True)
class Promotion:
    """every: products of a partial sum, 0 for all K. holds: what is known of the result, as above."""

    every: int
    holds: Literal["exact", "expected", "rounded"]


def accumulator_bits(fp8: bool, architecture: int) -> int:
    """Significand bits of the tensor core's accumulator."""
    return SHORT_BITS if fp8 and architecture in SHORT_ACCUMULATORS else FP32_BITS


def largest_product(spec: GemmSpec, with_multipliers: bool) -> int:
    """kmax_a * kmax_w; lowest integers (INT4: -8) included."""
    largest = spec.activation_format.largest_integer * spec.weight_format.largest_integer
    return largest * (max(spec.multipliers) if with_multipliers else 1)


def usual_sum(product: int, count: int) -> float:
    """Magnitude that a sum of `count` products of the usual spread seldom passes; `product` is the largest one."""
    return DEVIATIONS * RMS_SHARE**2 * product * math.sqrt(count)


def promotion_of(spec: GemmSpec, fp8: bool, architecture: int, *, by_group: bool = False) -> Promotion:
    """The promotion for `spec`. by_group: every group's sum is promoted anyway, multipliers follow it.

    >>> from plugins.gpu.spec import GemmSpec
    >>> promotion_of(GemmSpec("E2M3", "E2M1", 1152, 1152), fp8=False, architecture=80)
    Promotion(every=0, holds='exact')
    >>> promotion_of(GemmSpec("E3M2", "E2M1", 1152, 1152), fp8=True, architecture=90)
    Promotion(every=128, holds='expected')
    """
    if spec.multiplies_integers:
        return Promotion(0, "exact")
    bits = accumulator_bits(fp8, architecture)
    count = spec.group_size if by_group else spec.in_features
    product = largest_product(spec, with_multipliers=not by_group)
    whole = largest_product(spec, with_multipliers=True)
    total_fits = spec.in_features * whole <= 2**FP32_BITS
    if count * product <= 2**bits and total_fits:
        return Promotion(0, "exact")
    if bits == FP32_BITS:
        return Promotion(0, "expected" if usual_sum(whole, spec.in_features) <= 2**bits else "rounded")
    if usual_sum(product, count) <= 2**bits:
        return Promotion(0, "expected")
    fitting = [step for step in STEPS if usual_sum(product, step) <= 2**bits]
    return Promotion(fitting[0], "expected") if fitting else Promotion(EVERY_ROUNDED, "rounded")
