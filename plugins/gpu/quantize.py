"""Quantizers of activations: whole rows in registers, so memory is read once and written once.

A program holds ROWS rows of C channels as two blocks, BLOCK and TAIL wide (plugins/gpu/row_tiles.py); y is the first
block and z the second, which is not there where TAIL is 0. All arithmetic is float32. x [M, C], codes u8 [M, C] and
scales f32 [M] are row-major and contiguous.

A row with NaN or Inf has the scale NaN and codes 0: the sum of its numbers times zero is NaN, which costs one fused
multiply-add a number where a comparison would cost more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.rounding import grid_to_byte, quotient, reciprocal_parts, round_to_grid


@triton.jit
def _rows(ROWS: tl.constexpr):
    """Indices of this program's rows, int64 [ROWS, 1]: M * C may exceed 31 bits."""
    return (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]


@triton.jit
def _columns(START: tl.constexpr, WIDTH: tl.constexpr):
    return START + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _inside(row, M, C: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Mask of a block: only what may be outside is compared; a constant mask costs nothing."""
    if ROWS > 1 and START + WIDTH > C:
        return (row < M) & (_columns(START, WIDTH) < C)
    elif ROWS > 1:
        return row < M
    elif START + WIDTH > C:
        return _columns(START, WIDTH) < C
    else:
        return tl.full([1, 1], True, tl.int1)


@triton.jit
def _load(x, row, M, C: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """f32 [ROWS, WIDTH], 0 outside."""
    inside = _inside(row, M, C, ROWS, START, WIDTH)
    return tl.load(x + row * C + _columns(START, WIDTH), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _gelu(x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), as x / (1 + exp(-2 u))."""
    return x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * -1.5957691216057308))


@triton.jit
def _centred(x, mean, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    if START + WIDTH > C:
        return tl.where(_columns(START, WIDTH) < C, x - mean, 0.0)
    else:
        return x - mean


@triton.jit
def _modulate(
    d, inverse, shift, scale, row, M, tokens, C: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, W: tl.constexpr
):
    """d / deviation * (1 + scale) + shift."""
    inside = _inside(row, M, C, ROWS, START, W)
    offset = row // tokens * C + _columns(START, W)
    gain = 1.0 + tl.load(scale + offset, mask=inside, other=0.0).to(tl.float32)
    return d * (inverse * gain) + tl.load(shift + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _poison_and_max(y):
    """[ROWS, W] -> sums of y * 0 (NaN where y has NaN or Inf, else 0) and largest magnitudes, [ROWS, 1]."""
    return tl.sum(y * 0.0, 1, keep_dims=True), tl.max(tl.abs(y), 1, keep_dims=True)


@triton.jit
def _store_codes(
    y, up, divisor, high, low, finite, codes, row, M,
    C: tl.constexpr, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    GROW: tl.constexpr, FLOOR: tl.constexpr, SIGNED: tl.constexpr,
    KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Two stores of disjoint rows: masking is one instruction for 16 bytes, selecting would be one for each byte."""
    grid = round_to_grid(quotient(y, up, divisor, high, low), GROW, FLOOR, SIGNED)
    byte = grid_to_byte(grid, KIND, UP, MOVE, SIGN)
    inside = _inside(row, M, C, ROWS, START, WIDTH)
    at = codes + row * C + _columns(START, WIDTH)
    tl.store(at, byte, mask=inside & finite)
    tl.store(at, tl.zeros_like(byte), mask=inside & (finite == 0))


@triton.jit
def _quantize_rows(
    y, z, row, M, codes, scales,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    MAX_VALUE: tl.constexpr, ABSMAX_FLOOR: tl.constexpr,
    GROW: tl.constexpr, FLOOR: tl.constexpr, SIGNED: tl.constexpr,
    KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """Scale and codes of float32 rows: scale = max(absmax, ABSMAX_FLOOR) / MAX_VALUE, codes of y / scale."""
    poison, absmax = _poison_and_max(y)
    if TAIL > 0:
        more_poison, more = _poison_and_max(z)
        poison += more_poison
        absmax = tl.maximum(absmax, more)
    finite = poison == 0.0
    scale = tl.div_rn(tl.maximum(absmax, ABSMAX_FLOOR), MAX_VALUE)
    tl.store(scales + row, tl.where(finite, scale, float("nan")), mask=row < M)
    up, divisor, high, low = reciprocal_parts(scale)
    _store_codes(
        y, up, divisor, high, low, finite, codes, row, M,
        C, ROWS, 0, BLOCK, GROW, FLOOR, SIGNED, KIND, UP, MOVE, SIGN,
    )  # fmt: skip
    if TAIL > 0:
        _store_codes(
            z, up, divisor, high, low, finite, codes, row, M,
            C, ROWS, BLOCK, TAIL, GROW, FLOOR, SIGNED, KIND, UP, MOVE, SIGN,
        )  # fmt: skip


@triton.jit
def quantize(
    x, M, codes, scales,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    MAX_VALUE: tl.constexpr, ABSMAX_FLOOR: tl.constexpr,
    GROW: tl.constexpr, FLOOR: tl.constexpr, SIGNED: tl.constexpr,
    KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """x [M, C] -> codes, scales."""
    row = _rows(ROWS)
    y = _load(x, row, M, C, ROWS, 0, BLOCK)
    z = _load(x, row, M, C, ROWS, BLOCK, TAIL) if TAIL > 0 else y
    _quantize_rows(
        y, z, row, M, codes, scales, C, ROWS, BLOCK, TAIL,
        MAX_VALUE, ABSMAX_FLOOR, GROW, FLOOR, SIGNED, KIND, UP, MOVE, SIGN,
    )  # fmt: skip


@triton.jit
def gelu_quantize(
    x, M, codes, scales,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
    MAX_VALUE: tl.constexpr, ABSMAX_FLOOR: tl.constexpr,
    GROW: tl.constexpr, FLOOR: tl.constexpr, SIGNED: tl.constexpr,
    KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """x [M, C] -> codes, scales of GELU(x)."""
    row = _rows(ROWS)
    y = _gelu(_load(x, row, M, C, ROWS, 0, BLOCK))
    z = _gelu(_load(x, row, M, C, ROWS, BLOCK, TAIL)) if TAIL > 0 else y
    _quantize_rows(
        y, z, row, M, codes, scales, C, ROWS, BLOCK, TAIL,
        MAX_VALUE, ABSMAX_FLOOR, GROW, FLOOR, SIGNED, KIND, UP, MOVE, SIGN,
    )  # fmt: skip


@triton.jit
def norm_modulate_quantize(
    x, shift, scale, M, tokens, codes, scales,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, EPSILON: tl.constexpr,
    MAX_VALUE: tl.constexpr, ABSMAX_FLOOR: tl.constexpr,
    GROW: tl.constexpr, FLOOR: tl.constexpr, SIGNED: tl.constexpr,
    KIND: tl.constexpr, UP: tl.constexpr, MOVE: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """x [M, C], shift and scale [M / tokens, C] -> codes, scales of LayerNorm(x) * (1 + scale) + shift.

    Mean first, then the mean square of what is left, both from registers: one pass over memory and no cancellation.
    """
    row = _rows(ROWS)
    y = _load(x, row, M, C, ROWS, 0, BLOCK)
    z = _load(x, row, M, C, ROWS, BLOCK, TAIL) if TAIL > 0 else y
    total = tl.sum(y, 1, keep_dims=True)
    if TAIL > 0:
        total += tl.sum(z, 1, keep_dims=True)
    y = _centred(y, total * (1.0 / C), C, 0, BLOCK)
    squares = tl.sum(y * y, 1, keep_dims=True)
    if TAIL > 0:
        z = _centred(z, total * (1.0 / C), C, BLOCK, TAIL)
        squares += tl.sum(z * z, 1, keep_dims=True)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / C) + EPSILON))
    y = _modulate(y, inverse, shift, scale, row, M, tokens, C, ROWS, 0, BLOCK)
    if TAIL > 0:
        z = _modulate(z, inverse, shift, scale, row, M, tokens, C, ROWS, BLOCK, TAIL)
    _quantize_rows(
        y, z, row, M, codes, scales, C, ROWS, BLOCK, TAIL,
        MAX_VALUE, ABSMAX_FLOOR, GROW, FLOOR, SIGNED, KIND, UP, MOVE, SIGN,
    )  # fmt: skip
