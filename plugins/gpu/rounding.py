"""Division by a token's scale and rounding to a format's grid, in float32, to the bit as export.dialect.reference does.

Constants come from plugins/gpu/rounding_tables.py. No function here branches on data or needs a device library, so the
interpreter runs them. A token's scale is s; p = 2^-exponent(s) makes s * p lie in [1, 2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reciprocal_parts(scale):
    """scale f32 (positive, normal) -> (p, s * p, high, low): high + low is 1 / (s * p) to 48 bits, high rounded."""
    exponent_field = (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
    up = ((254 - exponent_field) << 23).to(tl.float32, bitcast=True)
    divisor = scale * up
    high = tl.div_rn(1.0, divisor)
    low = tl.fma(-divisor, high, 1.0) * high
    return up, divisor, high, low


@triton.jit
def quotient(y, up, divisor, high, low):
    """y / s rounded to nearest even, as IEEE division, from `reciprocal_parts(s)`; one multiplication and four steps.

    y * (high + low) is off by less than 2^-46 relative, so `near` is one of the two float32 next to the quotient; then
    the remainder is exact, and near + remainder * high rounds correctly (Markstein 1990, theorem on division with a
    correctly rounded reciprocal). With the divisor in [1, 2) nothing underflows but quotients below 2^-100, whose code
    is 0 either way.
    """
    scaled = y * up
    near = tl.fma(scaled, high, scaled * low)
    remainder = tl.fma(-divisor, near, scaled)
    return tl.fma(remainder, high, near)


@triton.jit
def round_to_grid(q, ANCHOR: tl.constexpr, LOWEST: tl.constexpr, SIGNED: tl.constexpr):
    """q f32 -> the nearest number of the grid, ties to even, never -0. |q| is at most max_value * (1 + 2^-22).

    Adding a number whose float32 step is the grid's step at |q|, and an even multiple of it, rounds; taking it off
    again is exact. In the binade of 2^e that number is ANCHOR * 2^e = 1.5 * 2^(23 - mantissa bits + e), which q cannot
    move out of its own binade; LOWEST is the smallest 2^e, 0 for grids of one step.
    """
    if not SIGNED:
        q = tl.maximum(q, 0.0)
    if LOWEST == 0.0:
        return (q + ANCHOR) - ANCHOR
    else:
        binade = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, LOWEST)
        return tl.fma(binade, -ANCHOR, tl.fma(binade, ANCHOR, q))


@triton.jit
def grid_to_byte(r, KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr):
    """r f32 on the grid -> u8 operand byte.

    "e4m3": the hardware's conversion, exact for a number of the grid. "int8": the low byte of an integer at the end
    of a float32's mantissa. "bits": times UP, a float32 has the byte's exponent field, subnormals included; what is
    left of its mantissa moves out at MOVE, the sign to bit SIGN.
    """
    if KIND == "e4m3":
        return (r * UP).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif KIND == "int8":
        return ((r * UP + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)
    else:
        bits = (r * UP).to(tl.int32, bitcast=True)
        byte = (bits & 0x7FFFFFFF) >> MOVE
        if SIGN > 0:
            byte = byte | (((bits >> 31) & 1) << SIGN)
        return byte.to(tl.uint8)
