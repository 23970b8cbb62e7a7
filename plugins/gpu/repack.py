"""Weights from one layout to another on the device: codes to nibbles, nibbles to E4M3 or INT8 bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.decode import packed_weights


@triton.jit
def pack(codes, rows, packed, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """codes u8 [rows, K] below 16 -> u8 [rows, K / 2], element 2i in the low nibble. Grid (bands of ROWS rows)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    for first in range(0, K // 2, COLUMNS):
        pair = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (pair < K // 2)
        low = tl.load(codes + row * K + 2 * pair, mask=inside, other=0)
        high = tl.load(codes + row * K + 2 * pair + 1, mask=inside, other=0)
        tl.store(packed + row * (K // 2) + pair, low | (high << 4), mask=inside)


@triton.jit
def expand(
    w, multiplier_codes, rows, expanded,
    SHAPE: tl.constexpr, OPERANDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """w u8 [rows, K / 2] -> u8 [rows, K], bytes of value * multiplier * 2^e. Grid (bands of ROWS rows)."""
    K: tl.constexpr = SHAPE.K
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    safe = tl.minimum(row, rows - 1)
    codes = multiplier_codes
    if OPERANDS.MULTIPLIED:
        codes += tl.reshape(safe, (ROWS,)) * ((K // SHAPE.GROUP + 1) // 2)
    for first in range(0, K, COLUMNS):
        byte = packed_weights(w + safe * (K // 2), codes, first, K, SHAPE, OPERANDS, COLUMNS, True)
        column = first + tl.arange(0, COLUMNS)[None, :]
        tl.store(expanded + row * K + column, byte, mask=(row < rows) & (column < K))
