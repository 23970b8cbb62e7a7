"""Which hardware number stands for a code: rules of the `rtx` lowering, computed from the formats' bits.

An operand is integer image * 2^exponent. A format may be the hardware type's own grid ("native": the type's rounding
is the format's), a subset of it, or the sum of two of its numbers ("limbs"). INT8 holds images of 0 to 255 less 128;
what that takes off a sum is a constant for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.formats.format import FORMATS, Format, decode, encode, get_format

INT8_MAX, UINT8_MAX = 127, 255
EXPONENTS = range(8, -40, -1)


@dataclass(frozen=True)
class Operand:
    """How codes of `format` become operands of the type `type`: image * 2^exponent = sum of limbs.

    limb_base: 0 where both limbs are rounded by the type itself (E4M3), else the radix of the high limb (INT8).
    shift: what is taken off the image, 128 for unsigned images beyond INT8's own range.
    """

    format: str
    type: str
    exponent: int
    native: bool
    limbs: int = 1
    limb_base: int = 0
    shift: int = 0

    @property
    def gain(self) -> float:
        """Operand per unit of value: value * gain = image * 2^exponent. A power of two, so exact."""
        return 2.0 ** (get_format(self.format).fraction_bits + self.exponent)

    @property
    def limb_weights(self) -> tuple[float, ...]:
        """Weight of each limb in units of the operand, high limb first."""
        if self.limbs == 1:
            return (1.0,)
        return (float(self.limb_base or 1), 1.0)


def magnitudes(fmt: Format) -> NDArray[np.int64]:
    """Positive integer images that a quantizer emits, sorted."""
    images = np.unique(np.abs(fmt.image))
    return images[(images > 0) & (images <= fmt.kmax)]


@cache
def _numbers(kind: str) -> frozenset[float]:
    """All numbers of a hardware type that is small enough to list (E4M3, INT8); 0 included."""
    if kind == "INT8":
        return frozenset(float(k) for k in range(INT8_MAX + 1))
    values = np.abs(FORMATS[kind].values)
    return frozenset(values[np.isfinite(values)].tolist())


def _contained(images: NDArray[np.int64], exponent: int, kind: str) -> bool:
    if kind == "FP16":
        return _in_fp16(images * 2.0**exponent)
    return all(value in _numbers(kind) for value in (images * 2.0**exponent).tolist())


def _in_fp16(values: NDArray[Any]) -> bool:
    return bool(values.max() <= 1 and (values.astype(np.float16).astype(np.float64) == values).all())


def _is_own_grid(images: NDArray[np.int64], exponent: int, kind: str) -> bool:
    """True if the type has exactly these numbers up to the largest, so that its rounding is the format's."""
    if kind == "FP16":
        return False
    top = float(images.max()) * 2.0**exponent
    return {n for n in _numbers(kind) if 0 < n <= top} == set((images * 2.0**exponent).tolist())


def _exponents(fmt: Format, kind: str) -> list[int]:
    """Candidate exponents, the plain value first. INT8 holds the image itself; FP16 numbers stay below 1 in magnitude,
    so that no sum of products with weights below 1 overflows."""
    if kind == "INT8":
        return [0]
    if kind == "FP16":
        return [-fmt.kmax.bit_length()]
    return [-fmt.fraction_bits, *EXPONENTS]


@cache
def activation_operand(name: str, kind: str, max_limbs: int) -> Operand | None:
    """The cheapest exact operand of an activation format, None if `max_limbs` numbers of the type cannot hold it.

    >>> activation_operand("E2M3", "E4M3", 1)
    Operand(format='E2M3', type='E4M3', exponent=-9, native=True, limbs=1, limb_base=0, shift=0)
    """
    fmt = get_format(name)
    images, exponents = magnitudes(fmt), _exponents(fmt, kind)
    own = [e for e in exponents if _contained(images, e, kind) and _is_own_grid(images, e, kind)]
    if own:
        return Operand(name, kind, own[0], native=True)
    held = [e for e in exponents if _contained(images, e, kind)]
    if held:
        return Operand(name, kind, held[0], native=False)
    if max_limbs == 1 and kind == "INT8" and not fmt.sign_bits and fmt.kmax <= UINT8_MAX:
        return Operand(name, kind, 0, native=False, shift=INT8_MAX + 1)
    return _two_limbs(fmt, kind) if max_limbs >= 2 else None


def _two_limbs(fmt: Format, kind: str) -> Operand | None:
    images = magnitudes(fmt)
    if kind == "INT8":
        base = 2 ** max(0, int(fmt.kmax // INT8_MAX).bit_length())
        high = np.rint(images / base)
        fits = high.max() <= INT8_MAX and np.abs(images - high * base).max() <= INT8_MAX
        return Operand(fmt.name, kind, 0, native=False, limbs=2, limb_base=base) if fits else None
    values = images * 2.0**-fmt.fraction_bits
    e4m3 = FORMATS["E4M3"]
    rest = np.abs(values - decode(e4m3, encode(e4m3, values)))
    fits = values.max() <= e4m3.max_value and all(value in _numbers(kind) for value in rest.tolist())
    return Operand(fmt.name, kind, -fmt.fraction_bits, native=False, limbs=2) if fits else None


@cache
def weight_exponent(name: str, kind: str, multipliers: tuple[int, ...]) -> int | None:
    """Exponent with which every image * multiplier is a number of the type, None if there is none.

    >>> weight_exponent("E2M1", "E4M3", (1, 2, 3)), weight_exponent("E2M1", "E4M3", (7,))
    (-1, None)
    """
    fmt = get_format(name)
    images = np.unique(np.outer(magnitudes(fmt), multipliers or (1,)))
    return next((e for e in _exponents(fmt, kind) if _contained(images, e, kind)), None)


@cache
def decoding_lines(name: str) -> tuple[tuple[float, float], ...]:
    """Lines (slope, intercept) whose maximum at i is the image of the i-th magnitude of a signed 4-bit format.

    Such a maximum decodes 4-bit indices with a few multiplications and no table. Empty where the magnitudes are not
    convex or the format is not a signed 4-bit one.

    >>> decoding_lines("E2M1"), decoding_lines("E1M2"), decoding_lines("E2M3")
    (((1.0, 0.0), (2.0, -4.0), (4.0, -16.0)), ((1.0, 0.0),), ())
    """
    fmt = get_format(name)
    if fmt.bits != 4 or not (fmt.sign_bits or fmt.is_integer):
        return ()
    images = np.concatenate([[0], magnitudes(fmt)])
    slopes = np.diff(images)
    if (np.diff(slopes) < 0).any():
        return ()
    lines = {float(m): float(y - m * i) for i, (m, y) in enumerate(zip(slopes, images, strict=False))}
    return tuple(lines.items())
