"""Low-bit number formats: one table, one codec.

A format is sign, exponent and mantissa bits; bias, values, integers and everything else follow from them. Floats
without sign start at zero and serve MSFP's unsigned activations (a zero point is added outside). Sources: OCP MX 1.0
section 5.3 (E2M1, E2M3, E3M2), OCP FP8 1.0 (E4M3, E5M2), FP4DiT arXiv 2503.15465 (E1M2, E3M0, E3M4 without special
values), MSFP arXiv 2505.21591 (unsigned formats).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from export.errors import RecipeError

Number = TypeVar("Number", bound=np.generic)

Specials = Literal["none", "one_nan", "ieee"]


@dataclass(frozen=True)
class Format:
    """One row of the table; `name`, bit counts and how the top codes are used.

    `specials`: "none" (every code is a number), "one_nan" (the code of all ones, E4M3), "ieee" (the highest exponent
    is Inf or NaN, E5M2). Integers (`exponent_bits` 0 and signed) are two's complement.
    """

    name: str
    sign_bits: int
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = "none"

    def __post_init__(self) -> None:
        if self.sign_bits not in (0, 1) or min(self.exponent_bits, self.mantissa_bits) < 0:
            raise ValueError(f"{self.name}: sign_bits must be 0 or 1 and the other counts not negative")
        if self.bits not in (4, 6, 8):
            raise ValueError(f"{self.name}: {self.bits} bits; only 4, 6 and 8 can be packed")

    @property
    def bits(self) -> int:
        return self.sign_bits + self.exponent_bits + self.mantissa_bits

    @property
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(E-1) - 1 (IEEE 754 rule; 0 where E is 1)."""
        return 0 if self.is_integer else 2 ** (self.exponent_bits - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value, and of the subnormals."""
        return 1 - self.bias

    @property
    def fraction_bits(self) -> int:
        """f of the integers: every value is an integer times 2^-f."""
        return 0 if self.is_integer else self.mantissa_bits - self.min_exponent

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """The value of every code, [2^bits] float64; NaN and Inf where the format has them."""
        codes = np.arange(2**self.bits)
        if self.is_integer:
            return np.where(codes < 2 ** (self.bits - 1), codes, codes - 2**self.bits).astype(np.float64)
        magnitude_bits = self.exponent_bits + self.mantissa_bits
        magnitude = codes % 2**magnitude_bits
        field, mantissa = magnitude >> self.mantissa_bits, magnitude % 2**self.mantissa_bits
        significand = np.where(field > 0, mantissa + 2**self.mantissa_bits, mantissa).astype(np.float64)
        values = np.ldexp(significand, np.maximum(field, 1) - self.bias - self.mantissa_bits)
        values = self._with_specials(values, field, mantissa)
        return np.where(codes >> magnitude_bits == 1, -values, values)

    def _with_specials(self, values: NDArray, field: NDArray, mantissa: NDArray) -> NDArray:
        top = field == 2**self.exponent_bits - 1
        if self.specials == "ieee":
            return np.where(top, np.where(mantissa == 0, np.inf, np.nan), values)
        if self.specials == "one_nan":
            return np.where(top & (mantissa == 2**self.mantissa_bits - 1), np.nan, values)
        return values

    @property
    def max_value(self) -> float:
        """Largest magnitude a symmetric quantizer uses (INT4: 7, although the code -8 exists)."""
        return float(self.values[np.isfinite(self.values)].max())

    @cached_property
    def max_code(self) -> int:
        """Code of `max_value`."""
        return int(np.flatnonzero(self.values == self.max_value)[0])

    @cached_property
    def integers(self) -> NDArray[np.int64]:
        """Integer of every code, [2^bits]: values * 2^f. Special values have the integer 0."""
        finite = np.where(np.isfinite(self.values), self.values, 0.0)
        return np.ldexp(finite, self.fraction_bits).astype(np.int64)

    @property
    def kmax(self) -> int:
        """Largest integer of a symmetric quantizer."""
        return int(self.max_value * 2**self.fraction_bits)

    @cached_property
    def largest_integer(self) -> int:
        """Largest magnitude of all codes' integers (INT4: 8, where kmax is 7)."""
        return int(np.abs(self.integers).max())

    @cached_property
    def binade_starts(self) -> NDArray[np.float64]:
        """Values at which the rounding step doubles: 2^e for every exponent above the smallest normal one."""
        if self.is_integer:
            return np.zeros(0)
        top = int(np.floor(np.log2(self.max_value)))
        return np.ldexp(1.0, np.arange(self.min_exponent + 1, top + 1))


def _signed(name: str, exponent_bits: int, mantissa_bits: int, specials: Specials = "none") -> Format:
    return Format(name, 1, exponent_bits, mantissa_bits, specials)


def _unsigned(exponent_bits: int, mantissa_bits: int) -> Format:
    return Format(f"UE{exponent_bits}M{mantissa_bits}", 0, exponent_bits, mantissa_bits)


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        _signed("E2M1", 2, 1),
        _signed("E1M2", 1, 2),
        _signed("E3M0", 3, 0),
        _signed("E2M3", 2, 3),
        _signed("E3M2", 3, 2),
        _signed("E3M4", 3, 4),
        _signed("E4M3", 4, 3, "one_nan"),
        _signed("E5M2", 5, 2, "ieee"),
        _signed("INT4", 0, 3),
        _signed("INT6", 0, 5),
        _signed("INT8", 0, 7),
        *(_unsigned(e, bits - e) for bits in (4, 6, 8) for e in range(1, min(bits, 5) + 1)),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`. Raises RecipeError for an unknown one."""
    if name not in FORMATS:
        raise RecipeError(f"number format {name!r} is unknown; use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def encode(fmt: Format, x: ArrayLike) -> NDArray[np.uint8]:
    """Nearest code of every number, ties to the even multiple of the local step (= IEEE ties-to-even for M >= 1).

    x: any shape, computed in float64 -> uint8 codes of that shape. Too large numbers, and Inf, become the largest code.
    -0 keeps its sign in signed floats; a negative number in an unsigned format becomes 0. NaN needs a format that has
    NaN, else ValueError.
    """
    value = np.asarray(x, np.float64)
    if np.isnan(value).any() and not np.isnan(fmt.values).any():
        raise ValueError(f"{fmt.name} has no code for NaN; find where the NaN comes from before quantizing")
    return (_encode_integer if fmt.is_integer else _encode_float)(fmt, value)


def _encode_integer(fmt: Format, value: NDArray) -> NDArray[np.uint8]:
    half = 2 ** (fmt.bits - 1)
    return (np.clip(np.rint(value), -half, half - 1).astype(np.int64) % 2**fmt.bits).astype(np.uint8)


def _encode_float(fmt: Format, value: NDArray) -> NDArray[np.uint8]:
    negative = np.signbit(value)
    magnitude = np.abs(value) if fmt.sign_bits else np.where(negative, 0.0, value)
    bounded = np.minimum(np.nan_to_num(magnitude, nan=0.0, posinf=np.inf), 2 * fmt.max_value)
    # frexp gives zero the exponent 0, which would put it above the subnormals of formats with a large bias.
    exponent = np.where(bounded > 0, np.maximum(np.frexp(bounded)[1] - 1, fmt.min_exponent), fmt.min_exponent)
    steps = np.rint(np.ldexp(bounded, fmt.mantissa_bits - exponent)).astype(np.int64)
    code = (exponent - fmt.min_exponent) * 2**fmt.mantissa_bits + steps
    code = np.minimum(code, fmt.max_code)
    code = np.where(np.isnan(value), 2 ** (fmt.exponent_bits + fmt.mantissa_bits) - 1, code)
    return (code + np.where(negative & (fmt.sign_bits == 1), 2 ** (fmt.bits - 1), 0)).astype(np.uint8)


def decode(fmt: Format, codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The value of every code, float64 (exact)."""
    return fmt.values[codes]


def to_integers(fmt: Format, codes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The integer of every code: decode(codes) * 2^f, exact."""
    return fmt.integers[codes]


def fold_negative_zero(fmt: Format, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes with -0 replaced by +0: quantizers emit one zero, so that equal values have equal codes."""
    return np.where(fmt.values[codes] == 0, 0, codes).astype(np.uint8)


def quantize(fmt: Format, x: ArrayLike) -> NDArray[np.uint8]:
    """Codes of the symmetric quantizer that graphs and checkpoints use: nearest, within +-max_value, one zero.

    It differs from `encode` in two codes only: the lowest integer (INT4: -8) and -0 never occur. Float32 numbers are
    rounded as they are, ten times as fast and to the same codes: no midpoint of a format has more bits than they have.
    """
    if isinstance(x, np.ndarray) and x.dtype == np.float32 and not np.isnan(x).any():
        return _quantize_float32(fmt, x)
    bounded = np.clip(np.asarray(x, np.float64), -fmt.max_value, fmt.max_value)
    return fold_negative_zero(fmt, encode(fmt, bounded))


def _quantize_float32(fmt: Format, x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`quantize` of numbers that are not NaN. The upper bits of a float32 are a code of the format, but for where the
    exponent counts from, once the significand is rounded to the format's bits."""
    bounded = np.clip(x, np.float32(-fmt.max_value), np.float32(fmt.max_value))
    if fmt.is_integer:
        return np.rint(bounded).astype(np.int8).view(np.uint8) & np.uint8(2**fmt.bits - 1)
    magnitude = np.abs(bounded) if fmt.sign_bits else np.maximum(bounded, np.float32(0))
    bits, dropped = magnitude.view(np.int32), 23 - fmt.mantissa_bits
    # To even; without a significand the even multiple of the step, of 1 and 2, is always the upper one.
    upper_on_tie = (bits >> dropped) & 1 if fmt.mantissa_bits else 1
    code = (bits + (2 ** (dropped - 1) - 1) + upper_on_tie) >> dropped
    code -= (127 - 1 + fmt.min_exponent) << fmt.mantissa_bits
    first = np.float32(2.0**fmt.min_exponent)  # of the binades; below it the steps are equal, and count as the code
    below = np.rint(np.minimum(magnitude, first) * np.float32(2.0**fmt.fraction_bits)).astype(np.int32)
    code += (below - code) * (magnitude < first)  # several times as fast as a choice
    if fmt.sign_bits:
        code |= ((x < 0) & (code > 0)).astype(np.int32) << (fmt.bits - 1)
    return code.astype(np.uint8)


# --- packing -----------------------------------------------------------------------------------------------------
# Four codes fill bits / 2 whole bytes, so code i of every such block starts at the same bit of the same byte.

BLOCK = 4


def packed_size(bits: int, count: int) -> int:
    """Bytes that `count` codes of `bits` bits take: 4-bit two in a byte, 6-bit four in three bytes."""
    return -(-count * bits // 8)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack along the last axis, [..., K] -> [..., ceil(K * bits / 8)], element 0 in the lowest bits (little end).

    Codes of 8 bits come back as they are, without a copy. Bits of a code above `bits` must be zero.
    """
    if bits == 8:
        return codes
    count, stride = codes.shape[-1], bits // 2
    blocks = _whole(codes, BLOCK)
    packed = np.zeros((*codes.shape[:-1], blocks.shape[-1] // BLOCK * stride), np.uint8)
    for i in range(BLOCK):
        byte, offset = divmod(i * bits, 8)
        packed[..., byte::stride] |= blocks[..., i::BLOCK] << offset
        if offset + bits > 8:
            packed[..., byte + 1 :: stride] |= blocks[..., i::BLOCK] >> (8 - offset)
    return packed[..., : packed_size(bits, count)]


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Inverse of `pack`: [..., ceil(count * bits / 8)] -> [..., count] uint8 codes (8 bits: without a copy)."""
    expected = packed_size(bits, count)
    if packed.shape[-1] != expected:
        raise ValueError(f"{packed.shape[-1]} bytes per row; {count} codes of {bits} bits take {expected}")
    if bits == 8:
        return packed
    return (_unpack_nibbles(packed) if bits == 4 else _unpack_blocks(packed, bits))[..., :count]


# Types of twice as many bytes, by which two numbers are looked up at once.
TWICE = {1: np.uint16, 2: np.uint32, 4: np.uint64, 8: np.complex128}


def looked_up(of_code: NDArray[Number], packed: NDArray[np.uint8], count: int) -> NDArray[Number]:
    """of_code[unpack(packed, bits, count)], in C order, for numbers by code, [2^bits]. Those of two codes of 4 bits are
    looked up at once, by their byte: four times as fast."""
    bits = len(of_code).bit_length() - 1
    if bits != 4:
        return np.take(of_code, unpack(packed, bits, count))
    byte = np.arange(256)
    of_byte = np.stack([of_code[byte & 15], of_code[byte >> 4]], axis=1)
    pairs: NDArray[np.generic] = of_byte.view(TWICE[of_code.itemsize])[:, 0]
    numbers: NDArray[Number] = np.take(pairs, packed).view(of_code.dtype)
    return numbers if numbers.shape[-1] == count else np.ascontiguousarray(numbers[..., :count])


def _unpack_nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Both nibbles of a byte at once, as the two bytes of a little-endian word (10 times faster than by blocks)."""
    word = packed.astype("<u2", order="C")
    word |= word << 4
    word &= 0x0F0F
    return word.view(np.uint8)


def _unpack_blocks(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    stride = bits // 2
    blocks = _whole(packed, stride)
    codes = np.empty((*packed.shape[:-1], blocks.shape[-1] // stride * BLOCK), np.uint8)
    for i in range(BLOCK):
        byte, offset = divmod(i * bits, 8)
        code = blocks[..., byte::stride] >> offset
        if offset + bits > 8:
            code |= blocks[..., byte + 1 :: stride] << (8 - offset)
        codes[..., i::BLOCK] = code & (2**bits - 1)
    return codes


def _whole(x: NDArray[np.uint8], multiple: int) -> NDArray[np.uint8]:
    """x with zeros added to the last axis up to a multiple of `multiple`; x itself if none are missing."""
    missing = -x.shape[-1] % multiple
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
