"""Codes to tensor core operands by moving bits: no tables, no arithmetic that rounds. Runs on a GPU and interpreted.

A float format's exponent and mantissa bits, shifted so that the mantissa ends where E4M3's (or FP16's) ends, are that
type's number times a power of two, subnormals included: both types count the lowest binade from the same bit patterns.
Integers of 4 bits are E4M3's lowest 16 numbers, which are evenly spaced. `plugins/gpu/operands.py` says which format is
stored as what, `plugins/gpu/tiles.py` takes the powers of two out again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nibble_to_e4m3(nibble, SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr):
    """u8 0..15 -> u8, the E4M3 byte of value * 2^(bias - 7), for an integer of value * 2^-9. SHIFT: 3 - mantissa bits.

    INTEGER: two's complement, so that a negative number -8 + (nibble & 7) has the magnitude 8 - (nibble & 7).
    """
    if INTEGER:
        low = nibble & 0x07
        return tl.where(nibble > 7, (8 - low) | 0x80, low).to(tl.uint8)
    elif SIGNED:
        return (((nibble & 0x07) << SHIFT) | ((nibble & 0x08) << 4)).to(tl.uint8)
    else:
        return (nibble << SHIFT).to(tl.uint8)


@triton.jit
def float_byte_to_fp16(byte, SIGNED: tl.constexpr, SHIFT: tl.constexpr):
    """u8 codes of a float with at most 4 exponent bits (E4M3's bytes too) -> fp16, value * 2^(bias - 15), exact.

    SHIFT: 10 - mantissa bits. A signed code has 8 bits.
    """
    wide = byte.to(tl.uint16)
    bits = ((wide & 0x7F) << SHIFT) | ((wide & 0x80) << 8) if SIGNED else wide << SHIFT
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def int8_to_fp16(byte):
    """u8, an integer in two's complement -> fp16, exact."""
    return byte.to(tl.int8, bitcast=True).to(tl.float16)


@triton.jit
def scaled_e4m3(byte, multiplier):
    """u8 E4M3 bytes times fp16 integers -> u8 E4M3 bytes; the caller knows that every product is an E4M3 number.

    Through FP16, which holds the byte's value times 2^-8 in the same bits, 7 places higher.
    """
    product = float_byte_to_fp16(byte, True, 7) * multiplier
    bits = product.to(tl.uint16, bitcast=True)
    return (((bits >> 7) & 0x7F) | ((bits >> 8) & 0x80)).to(tl.uint8)


@triton.jit
def small_integer(index, TABLE_LOW: tl.constexpr, TABLE_HIGH: tl.constexpr):
    """u8 index 0..15 -> fp16, byte `index` of the 16 bytes of TABLE_LOW (0..7) and TABLE_HIGH (8..15)."""
    shift = (index & 7).to(tl.uint64) * 8
    word = tl.full(index.shape, TABLE_LOW, tl.uint64) >> shift
    if TABLE_HIGH != 0:
        word = tl.where(index < 8, word, tl.full(index.shape, TABLE_HIGH, tl.uint64) >> shift)
    return (word & 0xFF).to(tl.int32).to(tl.float16)
