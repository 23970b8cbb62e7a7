"""Codes to tensor core operands by moving bits: no tables, nothing that rounds. Runs on a GPU and interpreted.

A float format's exponent and mantissa bits, shifted so that the mantissa ends where E4M3's (or FP16's) ends, are that
type's number times a power of two, subnormals included: all count the lowest binade from the same bit patterns.
Integers of 4 bits are E4M3's lowest numbers, which are evenly spaced. `plugins/gpu/spec.py` says which format is
stored as what; the powers of two leave again in the epilogue.

Codes are decoded WIDTH at a time, in one 32-bit word: about two instructions a weight, where one weight at a time takes
six. The compiler sees that taking a word's bytes or halves apart and putting them together again is no work.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_nibbles(q, WIDTH: tl.constexpr):
    """u32 words of WIDTH (2 or 4) nibbles, the first lowest -> u32 words with one in each byte, the first lowest."""
    if WIDTH == 4:
        q = (q | (q << 8)) & 0x00FF00FF
    return (q | (q << 4)) & 0x0F0F0F0F


@triton.jit
def nibbles_to_e4m3(x, SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr):
    """u32 words, a nibble in each byte -> u32, its E4M3 byte in each byte: value * 2^(bias - 7), SHIFT = 3 - mantissa.

    INTEGER: two's complement, value * 2^-9. A negative number's magnitude is 8 - (x & 7) = ((x & 7) ^ 7) + 1.
    """
    if INTEGER:
        sign = x & 0x08080808
        one = sign >> 3
        return (((x & 0x07070707) ^ (sign - one)) + one) | (sign << 4)
    elif SIGNED:
        return ((x & 0x07070707) << SHIFT) | ((x & 0x08080808) << 4)
    else:
        return x << SHIFT


@triton.jit
def nibbles_to_magnitudes(x, SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr):
    """u32 words, a nibble in each byte -> u32, in each byte the integer |value| * 2^f of the format, below 128.

    A float of e > 0 is its mantissa with the hidden bit, e - 1 places up; the places are moved 1, 2 and 4 at a time. No
    byte runs over into the next: what has been moved so far lies below 2^(8 - places) wherever more is to come.
    """
    if INTEGER:
        negative = (x >> 3) & 0x01010101
        return ((x & 0x07070707) ^ ((negative << 3) - negative)) + negative
    MANTISSA: tl.constexpr = 3 - SHIFT
    EXPONENT: tl.constexpr = (3 if SIGNED else 4) - MANTISSA
    exponent = (x >> MANTISSA) & (0x01010101 * ((1 << EXPONENT) - 1))
    normal = exponent
    for bit in tl.static_range(1, EXPONENT):
        normal |= exponent >> bit
    normal &= 0x01010101
    magnitudes = (x & (0x01010101 * ((1 << MANTISSA) - 1))) | (normal << MANTISSA)
    places = exponent - normal
    for bit in tl.static_range(0, EXPONENT):
        moved = ((places >> bit) & 0x01010101) * 255
        magnitudes = (magnitudes & ~moved) | ((magnitudes << (1 << bit)) & moved)
    return magnitudes


@triton.jit
def negated(v, x):
    """u32 words of bytes v below 128 -> two's complement bytes, minus v where the nibble in x has its sign bit."""
    one = (x >> 3) & 0x01010101
    top = one << 7
    return ((v ^ (top - one)) + one) ^ top


@triton.jit
def half_times(bits, factor):
    """u32, the bits of a fp16 number in its lower half, times fp16 -> u32 likewise."""
    product = bits.to(tl.uint16).to(tl.float16, bitcast=True) * factor
    return product.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def scaled_e4m3(r, factor):
    """u32 words of E4M3 bytes times fp16 integers -> u32 words of E4M3 bytes; every product must be an E4M3 number.

    Through FP16, which holds a magnitude's value times 2^-8 in the same 7 bits, 7 places higher.
    """
    even, odd = (r & 0x007F007F) << 7, (r & 0x7F007F00) >> 1
    even = half_times(even & 0xFFFF, factor) | (half_times(even >> 16, factor) << 16)
    odd = half_times(odd & 0xFFFF, factor) | (half_times(odd >> 16, factor) << 16)
    return ((even >> 7) & 0x007F007F) | ((odd << 1) & 0x7F007F00) | (r & 0x80808080)


@triton.jit
def bytes_of(r, WIDTH: tl.constexpr):
    """u32 words [N, C] -> u8 [N, C * WIDTH], their WIDTH lowest bytes, the lowest first."""
    one = (r >> 8).to(tl.uint8)
    if WIDTH == 4:
        even = tl.interleave(r.to(tl.uint8), (r >> 16).to(tl.uint8))
        return tl.interleave(even, tl.interleave(one, (r >> 24).to(tl.uint8)))
    else:
        return tl.interleave(r.to(tl.uint8), one)


@triton.jit
def halves_of(h):
    """u32 words [N, C] -> fp16 [N, 2 C], their halves, the lower first."""
    bits = tl.interleave(h.to(tl.uint16), (h >> 16).to(tl.uint16))
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def byte_pair_to_fp16(r, KIND: tl.constexpr, SHIFT: tl.constexpr):
    """u32 words, bytes in the two lowest -> u32 words of two fp16 numbers (see bytes_to_fp16)."""
    x = (r | (r << 8)) & 0x00FF00FF
    if KIND == "int8":
        return (x ^ 0x00800080) | 0x64006400
    elif KIND == "signed":
        return ((x & 0x007F007F) << SHIFT) | ((x & 0x00800080) << 8)
    else:
        return x << SHIFT


@triton.jit
def bytes_to_fp16(r, KIND: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """u32 words [N, C] of WIDTH operand bytes -> fp16 [N, C * WIDTH], exact.

    KIND "signed" and "unsigned": floats of at most 4 exponent bits (E4M3's bytes too), value * 2^(bias - 15), SHIFT =
    10 - mantissa bits; a signed one has 8 bits. "int8": two's complement, as the number 1024 + 128 + value less 1152.
    """
    h = byte_pair_to_fp16(r & 0xFFFF, KIND, SHIFT)
    if WIDTH == 4:
        h = tl.interleave(h, byte_pair_to_fp16(r >> 16, KIND, SHIFT))
    value = halves_of(h)
    if KIND == "int8":
        value -= 1152.0
    return value


@triton.jit
def repeated(x, TIMES: tl.constexpr):
    """[N, C] -> [N, C * TIMES], each element TIMES (2 or 4) times."""
    x = tl.interleave(x, x)
    return tl.interleave(x, x) if TIMES == 4 else x


@triton.jit
def small_integer(index, TABLE_LOW: tl.constexpr, TABLE_HIGH: tl.constexpr):
    """u8 index 0..15 -> int32, byte `index` of the 16 bytes of TABLE_LOW (0..7) and TABLE_HIGH (8..15)."""
    shift = (index & 7).to(tl.uint64) * 8
    word = tl.full(index.shape, TABLE_LOW, tl.uint64) >> shift
    if TABLE_HIGH != 0:
        word = tl.where(index < 8, word, tl.full(index.shape, TABLE_HIGH, tl.uint64) >> shift)
    return (word & 0xFF).to(tl.int32)


@triton.jit
def load_words(base, first, limit, BYTES: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """COUNT words of BYTES (1, 2 or 4) from each pointer of base u8 [N, 1] + first words on -> u32 [N, COUNT].

    Zero from word `limit` on.
    """
    if BYTES == 4:
        base = base.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif BYTES == 2:
        base = base.to(tl.pointer_type(tl.uint16), bitcast=True)
    word = first + tl.arange(0, COUNT)[None, :]
    words = tl.load(base + word, mask=word < limit, other=0) if MASKED else tl.load(base + word)
    return words.to(tl.uint32)


@triton.jit
def operand_tile(
    a, first, limit, KIND: tl.constexpr, SHIFT: tl.constexpr, OPERANDS: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Operand bytes first .. first + BK of the rows at a [N, 1], zero from `limit` on -> [N, BK] of OPERANDS.TYPE."""
    WIDTH: tl.constexpr = OPERANDS.WIDTH
    if OPERANDS.TYPE == "fp16":
        words = load_words(a, first // WIDTH, limit // WIDTH, WIDTH, BK // WIDTH, MASKED)
        return bytes_to_fp16(words, KIND, SHIFT, WIDTH)
    else:
        at = a.to(tl.pointer_type(tl.int8 if OPERANDS.TYPE == "int8" else tl.float8e4nv), bitcast=True)
        k = first + tl.arange(0, BK)[None, :]
        return tl.load(at + k, mask=k < limit, other=0.0) if MASKED else tl.load(at + k)


@triton.jit
def load_multipliers(codes, group, COUNT: tl.constexpr, OPERANDS: tl.constexpr):
    """codes: pointers to rows of nibbles; group: which of COUNT groups -> int32 multipliers."""
    byte = tl.load(codes + tl.minimum(group, COUNT - 1) // 2)
    return small_integer(
        (byte >> ((group % 2) * 4).to(tl.uint8)) & 0x0F, OPERANDS.MULTIPLIERS_LOW, OPERANDS.MULTIPLIERS_HIGH
    )


@triton.jit
def multiplier_of_words(codes, first, SHAPE: tl.constexpr, OPERANDS: tl.constexpr, BK: tl.constexpr):
    """int32 multipliers of the BK / WIDTH words of WIDTH weights from `first` on, for rows of codes [BN]."""
    GROUP: tl.constexpr = SHAPE.GROUP
    WIDTH: tl.constexpr = OPERANDS.WIDTH
    GROUPS: tl.constexpr = SHAPE.K // SHAPE.GROUP
    if GROUP % BK == 0:
        return load_multipliers(codes, first // GROUP, GROUPS, OPERANDS)[:, None]
    elif BK % GROUP == 0:  # groups are whole parts of the tile: load each once
        rows: tl.constexpr = codes.shape[0]
        parts: tl.constexpr = BK // GROUP
        multipliers = load_multipliers(codes[:, None], first // GROUP + tl.arange(0, parts)[None, :], GROUPS, OPERANDS)
        wide = tl.broadcast_to(multipliers[:, :, None], (rows, parts, GROUP // WIDTH))
        return tl.reshape(wide, (rows, BK // WIDTH))
    else:
        group = (first + tl.arange(0, BK // WIDTH)[None, :] * WIDTH) // GROUP
        return load_multipliers(codes[:, None], group, GROUPS, OPERANDS)


@triton.jit
def packed_weights(
    w, codes, first, limit, SHAPE: tl.constexpr, OPERANDS: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr
):
    """Weights first .. first + BK of the rows at w [BN, 1], codes [BN] -> [BN, BK], zero from `limit` on.

    u8 for "int8" and "fp8" (E4M3 bytes), else fp16; if MULTIPLIED times the multipliers of their groups. WIDTH: weights
    of a load (4 or 2); it divides K, GROUP and `limit`.
    """
    WIDTH: tl.constexpr = OPERANDS.WIDTH
    SIGNED: tl.constexpr = OPERANDS.W_SIGNED
    INTEGER: tl.constexpr = OPERANDS.W_INTEGER
    SHIFT: tl.constexpr = OPERANDS.W_SHIFT
    x = spread_nibbles(load_words(w, first // WIDTH, limit // WIDTH, WIDTH // 2, BK // WIDTH, MASKED), WIDTH)
    if OPERANDS.MULTIPLIED:
        factor = multiplier_of_words(codes, first, SHAPE, OPERANDS, BK)
    if OPERANDS.TYPE == "int8":
        v = nibbles_to_magnitudes(x, SIGNED, INTEGER, SHIFT)
        if OPERANDS.MULTIPLIED:
            v *= factor.to(tl.uint32)
        return bytes_of(negated(v, x) if SIGNED else v, WIDTH)
    elif OPERANDS.TYPE == "fp8":
        r = nibbles_to_e4m3(x, SIGNED, INTEGER, SHIFT)
        return bytes_of(scaled_e4m3(r, factor.to(tl.float16)) if OPERANDS.MULTIPLIED else r, WIDTH)
    else:
        value = bytes_to_fp16(nibbles_to_e4m3(x, SIGNED, INTEGER, SHIFT), "signed", 7, WIDTH)
        if OPERANDS.MULTIPLIED and SHAPE.GROUP % BK == 0:
            value *= factor.to(tl.float16)
        elif OPERANDS.MULTIPLIED:
            value *= repeated(factor.to(tl.float16), WIDTH)
        return value
