"""Quantizers of activations: a row in a program's registers, so memory is read once and written once.

A program holds one row of C channels as two blocks, BLOCK and TAIL wide (plugins/gpu/tiles.py, as all constants); y is
the first block and z the second, which is not there where TAIL is 0. All arithmetic is float32. x [M, C], codes
u8 [M, C] and scales f32 [M] are row-major and contiguous. The grid says how many rows there are; M is passed as to the
kernels whose programs share rows. No size is compiled in: one binary serves all.

With static_scale and static_zero, f32 [1], codes are those of (x - zero) / scale, saturating, and there are no scales;
they are None where each token has a scale of its own. The static scale is positive and normal.

A row with NaN or Inf has the scale NaN and codes 0. Magnitudes are compared as integers: their order is the same, and
NaN and Inf are above all numbers, where a maximum of floats would lose NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_part(x, row, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START.. of a row as f32 [WIDTH], 0 from column C on; M * C may exceed 31 bits."""
    column = START + tl.arange(0, WIDTH)
    at = x + row.to(tl.int64) * C + column
    if START + WIDTH > C:
        return tl.load(at, mask=column < C, other=0.0).to(tl.float32)
    else:
        return tl.load(at).to(tl.float32)


@triton.jit
def store_part(y, row, numbers, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers [WIDTH] -> columns START.. of a row, as its elements."""
    column = START + tl.arange(0, WIDTH)
    at = y + row.to(tl.int64) * C + column
    if START + WIDTH > C:
        tl.store(at, numbers, mask=column < C)
    else:
        tl.store(at, numbers)


@triton.jit
def centred(x, mean, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    if START + WIDTH > C:
        return tl.where(START + tl.arange(0, WIDTH) < C, x - mean, 0.0)
    else:
        return x - mean


@triton.jit
def modulated(d, inverse, shift, scale, sample, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """d / deviation * (1 + scale) + shift."""
    gain = 1.0 + load_part(scale, sample, C, START, WIDTH)
    return d * (inverse * gain) + load_part(shift, sample, C, START, WIDTH)


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + 2^(-2u log2(e))): nothing cancels."""
    return x / (1.0 + tl.exp2(x * (x * x * -0.10294323958 - 2.30220819814)))


@triton.jit
def _largest(y):
    """Bits of the largest magnitude."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def _bytes(y, up, divisor, high, low, GRID: tl.constexpr):
    """y f32 -> operand bytes of y / scale."""
    return grid_to_byte(round_to_grid(quotient(y, up, divisor, high, low), GRID), GRID)


@triton.jit
def _shifted(y, scale, zero, MAX_VALUE: tl.constexpr):
    """y - zero within what the grid holds at this scale; NaN becomes 0. What saturates either way is cut before the
    division, which could overflow."""
    shifted = y - zero
    shifted = tl.where(shifted == shifted, shifted, 0.0)
    return tl.minimum(tl.maximum(shifted, -MAX_VALUE * scale), MAX_VALUE * scale)


@triton.jit
def _quantize_static(y, z, row, codes, static_scale, static_zero, ROW: tl.constexpr, GRID: tl.constexpr):
    """Codes of a float32 row under a scale and a zero that are given."""
    scale, zero = tl.load(static_scale), tl.load(static_zero)
    up, divisor, high, low = reciprocal_parts(scale)
    y = _shifted(y, scale, zero, GRID.MAX_VALUE)
    store_part(codes, row, _bytes(y, up, divisor, high, low, GRID), ROW.C, 0, ROW.BLOCK)
    if ROW.TAIL > 0:
        z = _shifted(z, scale, zero, GRID.MAX_VALUE)
        store_part(codes, row, _bytes(z, up, divisor, high, low, GRID), ROW.C, ROW.BLOCK, ROW.TAIL)


@triton.jit
def _quantize_row(y, z, row, codes, scales, ROW: tl.constexpr, GRID: tl.constexpr):
    """Scale and codes of a float32 row: scale = max(absmax, ABSMAX_FLOOR) / MAX_VALUE, codes of y / scale."""
    BLOCK: tl.constexpr = ROW.BLOCK
    TAIL: tl.constexpr = ROW.TAIL
    largest = _largest(y)
    if TAIL > 0:
        largest = tl.maximum(largest, _largest(z))
    scale = tl.div_rn(tl.maximum(largest.to(tl.float32, bitcast=True), GRID.ABSMAX_FLOOR), GRID.MAX_VALUE)
    if largest < 0x7F800000:
        up, divisor, high, low = reciprocal_parts(scale)
        store_part(codes, row, _bytes(y, up, divisor, high, low, GRID), ROW.C, 0, BLOCK)
        if TAIL > 0:
            store_part(codes, row, _bytes(z, up, divisor, high, low, GRID), ROW.C, BLOCK, TAIL)
        tl.store(scales + row, scale)
    else:
        store_part(codes, row, tl.zeros((BLOCK,), tl.uint8), ROW.C, 0, BLOCK)
        if TAIL > 0:
            store_part(codes, row, tl.zeros((TAIL,), tl.uint8), ROW.C, BLOCK, TAIL)
        tl.store(scales + row, float("nan"))


@triton.jit
def _quantize_either(
    y, z, row, codes, scales, static_scale, static_zero, ROW: tl.constexpr, GRID: tl.constexpr
):  # fmt: skip
    """Codes of a float32 row, under a scale that is given or under its own, which is stored."""
    if static_scale is not None:
        _quantize_static(y, z, row, codes, static_scale, static_zero, ROW, GRID)
    else:
        _quantize_row(y, z, row, codes, scales, ROW, GRID)


@triton.jit(do_not_specialize=["M"])
def quantize(x, static_scale, static_zero, M, codes, scales, ROW: tl.constexpr, GRID: tl.constexpr):
    """x [M, C] -> codes, scales."""
    row = tl.program_id(0)
    y = load_part(x, row, ROW.C, 0, ROW.BLOCK)
    z = load_part(x, row, ROW.C, ROW.BLOCK, ROW.TAIL) if ROW.TAIL > 0 else y
    _quantize_either(y, z, row, codes, scales, static_scale, static_zero, ROW, GRID)


@triton.jit(do_not_specialize=["M"])
def gelu_quantize(x, static_scale, static_zero, M, codes, scales, ROW: tl.constexpr, GRID: tl.constexpr):
    """x [M, C] -> codes, scales of GELU(x)."""
    row = tl.program_id(0)
    y = gelu_tanh(load_part(x, row, ROW.C, 0, ROW.BLOCK))
    z = gelu_tanh(load_part(x, row, ROW.C, ROW.BLOCK, ROW.TAIL)) if ROW.TAIL > 0 else y
    _quantize_either(y, z, row, codes, scales, static_scale, static_zero, ROW, GRID)


@triton.jit(do_not_specialize=["M", "tokens"])
def norm_modulate_quantize(
    x, shift, scale, M, tokens, codes, scales, ROW: tl.constexpr, GRID: tl.constexpr, EPSILON: tl.constexpr
):  # fmt: skip
    """x [M, C], shift and scale [M / tokens, C] -> codes, scales of LayerNorm(x) * (1 + scale) + shift.

    Mean first, then the mean square of what is left, both from registers: one pass over memory and no cancellation.
    """
    C: tl.constexpr = ROW.C
    BLOCK: tl.constexpr = ROW.BLOCK
    TAIL: tl.constexpr = ROW.TAIL
    row = tl.program_id(0)
    sample = row // tokens
    y = load_part(x, row, C, 0, BLOCK)
    z = load_part(x, row, C, BLOCK, TAIL) if TAIL > 0 else y
    total = tl.sum(y, 0)
    if TAIL > 0:
        total += tl.sum(z, 0)
    y = centred(y, total * (1.0 / C), C, 0, BLOCK)
    squares = tl.sum(y * y, 0)
    if TAIL > 0:
        z = centred(z, total * (1.0 / C), C, BLOCK, TAIL)
        squares += tl.sum(z * z, 0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / C) + EPSILON))
    y = modulated(y, inverse, shift, scale, sample, C, 0, BLOCK)
    if TAIL > 0:
        z = modulated(z, inverse, shift, scale, sample, C, BLOCK, TAIL)
    _quantize_row(y, z, row, codes, scales, ROW, GRID)


# --- division and rounding -------------------------------------------------------------------------------------------
# In float32, to the bit as export.dialect.reference does. No function here branches on data or needs a device library,
# so the interpreter runs them. A token's scale is s; p = 2^-exponent(s) makes s * p lie in [1, 2).


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
def round_to_grid(q, GRID: tl.constexpr):
    """q f32 -> the nearest number of the grid, ties to even, never -0. |q| is at most max_value * (1 + 2^-22).

    Adding a number whose float32 step is the grid's step at |q|, and an even multiple of it, rounds; taking it off
    again is exact. In the binade of 2^e that number is ANCHOR * 2^e = 1.5 * 2^(23 - mantissa bits + e), which q cannot
    move out of its own binade; LOWEST is the smallest 2^e, 0 for grids of one step.
    """
    if not GRID.SIGNED:
        q = tl.maximum(q, 0.0)
    if GRID.LOWEST == 0.0:
        return (q + GRID.ANCHOR) - GRID.ANCHOR
    else:
        binade = (q.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        binade = tl.maximum(binade, GRID.LOWEST)
        return tl.fma(binade, -GRID.ANCHOR, tl.fma(binade, GRID.ANCHOR, q))


@triton.jit
def grid_to_byte(r, GRID: tl.constexpr):
    """r f32 on the grid -> u8 operand byte.

    "e4m3": the hardware's conversion, exact for a number of the grid. "int8": the low byte of an integer at the end
    of a float32's mantissa. "bits": times UP, a float32 has the byte's exponent field, subnormals included; what is
    left of its mantissa moves out at MOVE, the sign to bit SIGN.
    """
    if GRID.KIND == "e4m3":
        return (r * GRID.UP).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif GRID.KIND == "int8":
        return ((r * GRID.UP + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)
    else:
        bits = (r * GRID.UP).to(tl.int32, bitcast=True)
        byte = (bits & 0x7FFFFFFF) >> GRID.MOVE
        if GRID.SIGN > 0:
            byte = byte | (((bits >> 31) & 1) << GRID.SIGN)
        return byte.to(tl.uint8)
