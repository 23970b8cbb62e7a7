"""GEMM of operand bytes with 4-bit weights, packed or expanded: y = epilogue((a @ w^T) * scales + bias).

One source for SM80 to SM120: pointers and masks, no tensor maps, no inline assembly. The sum over K is one of integers
times a power of two, so its order is free: blocks of K may be split, promoted and padded with zeros, and the result is
the same number wherever the accumulator holds it (plugins/gpu/promotion.py). Shapes are in GemmSpec (spec.py). M and N
are any size, K is even.

What is known when a kernel is compiled comes in groups (tiles.py): SHAPE (GemmShape), OPERANDS (GemmOperands) and TILE
(GemmTile). A field becomes a constant of its own before it stands in a tuple, or is passed on as a string: Triton 3.6
asks for that. AFTER is what follows the sum: (a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y).
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.decode import load_multipliers, operand_tile, packed_weights


@triton.jit
def packed_gemm(
    a, a_scale, w, w_scales, multiplier_codes, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    SHAPE: tl.constexpr, OPERANDS: tl.constexpr, TILE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """w u8 [N, K / 2], decoded in registers. Grid (tiles, SPLITS); with SPLITS > 1 y is f32 [SPLITS, M, N]."""
    AFTER = (a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y)
    gemm(a, w, w_scales, multiplier_codes, M, AFTER, True, SHAPE, OPERANDS, TILE, EPILOGUE)


@triton.jit
def expanded_gemm(
    a, a_scale, w, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    SHAPE: tl.constexpr, OPERANDS: tl.constexpr, TILE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """w u8 [N, K], bytes from `expand`. Grid and y as in packed_gemm."""
    AFTER = (a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y)
    gemm(a, w, w_scales, None, M, AFTER, False, SHAPE, OPERANDS, TILE, EPILOGUE)


@triton.jit
def gemm(
    a, w, w_scales, multiplier_codes, M, AFTER,
    PACKED: tl.constexpr, SHAPE: tl.constexpr, OPERANDS: tl.constexpr, TILE: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The kernel of packed and expanded weights: one tile of one split."""
    row, column = tile_of(tl.program_id(0), M, SHAPE.N, TILE)
    m, n = row * TILE.BM + tl.arange(0, TILE.BM), column * TILE.BN + tl.arange(0, TILE.BN)
    total = sum_of_products(
        a,
        w,
        w_scales,
        multiplier_codes,
        tl.minimum(m, M - 1),
        tl.minimum(n, SHAPE.N - 1),
        PACKED,
        SHAPE,
        OPERANDS,
        TILE,
    )
    if TILE.WEIGHTS_FIRST:
        total = tl.trans(total)
    if TILE.SPLITS > 1:  # this split's part of the sum as it is
        y = AFTER[9]
        store(total * OPERANDS.UNIT, m, n, M, y + tl.program_id(1).to(tl.int64) * M * SHAPE.N, SHAPE.N)
    else:
        epilogue(total * OPERANDS.UNIT, m, n, AFTER, SHAPE, EPILOGUE)


@triton.jit
def reduce_splits(
    parts, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    SHAPE: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """parts f32 [SPLITS, M, N] added in their order, then the epilogue. Grid (tiles of BM x BN)."""
    AFTER = (a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y)
    columns = tl.cdiv(SHAPE.N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    at = parts + m.to(tl.int64)[:, None] * SHAPE.N + n[None, :]
    inside = (m < M)[:, None] & (n < SHAPE.N)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    size = tl.full((), SHAPE.N, tl.int64) * M
    for _ in range(SPLITS):
        total += tl.load(at, mask=inside, other=0.0)
        at += size
    epilogue(total, m, n, AFTER, SHAPE, EPILOGUE)


# --- the sum ---------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(program, M, N: tl.constexpr, TILE: tl.constexpr):
    """program number -> (row, column) of its tile: BAND rows of tiles at a time, so that both operands stay in L2."""
    rows, columns = tl.cdiv(M, TILE.BM), tl.cdiv(N, TILE.BN)
    first = program // (TILE.BAND * columns) * TILE.BAND
    height = min(rows - first, TILE.BAND)
    inside = program % (TILE.BAND * columns)
    return first + inside % height, inside // height


@triton.jit
def sum_of_products(
    a, w, w_scales, multiplier_codes, m, n,
    PACKED: tl.constexpr, SHAPE: tl.constexpr, OPERANDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """f32 [BM, BN] (transposed if WEIGHTS_FIRST): this split's sum for rows m and columns n, both in range."""
    K: tl.constexpr = SHAPE.K
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    BK: tl.constexpr = TILE.BK
    A_KIND: tl.constexpr = OPERANDS.A_KIND
    a_rows = a + m.to(tl.int64)[:, None] * K
    w_rows = w + n.to(tl.int64)[:, None] * (K // 2 if PACKED else K)
    codes = multiplier_codes
    if PACKED and OPERANDS.MULTIPLIERS_LOW != 0:
        codes += n * ((K // SHAPE.GROUP + 1) // 2)
    SPAN: tl.constexpr = SHAPE.GROUP if SHAPE.REAL_GROUPS else K  # input channels that share their scales
    BLOCKS: tl.constexpr = (SPAN + BK - 1) // BK  # of a span
    MASKED: tl.constexpr = SPAN % BK != 0
    ALL: tl.constexpr = K // SPAN * BLOCKS
    EACH: tl.constexpr = (ALL + TILE.SPLITS - 1) // TILE.SPLITS
    start = tl.program_id(1) * EACH
    SUM: tl.constexpr = tl.int32 if OPERANDS.TYPE == "int8" and OPERANDS.FACTOR == "none" else tl.float32
    acc = tl.zeros((BN, BM) if TILE.WEIGHTS_FIRST else (BM, BN), SUM)
    for block in range(start, min(start + EACH, ALL)):
        span = block // BLOCKS
        first, limit = span * SPAN + block % BLOCKS * BK, (span + 1) * SPAN
        left = operand_tile(a_rows, first, limit, A_KIND, OPERANDS.A_SHIFT, OPERANDS, BK, MASKED)
        right = weight_tile(w_rows, codes, first, limit, PACKED, SHAPE, OPERANDS, BK, MASKED)
        factor = load_factor(w_scales, codes, n, first, SHAPE, OPERANDS)
        acc = add_products(acc, left, right, factor, OPERANDS, TILE)
    return acc.to(tl.float32)


@triton.jit
def weight_tile(
    w, codes, first, limit, PACKED: tl.constexpr, SHAPE: tl.constexpr, OPERANDS: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Weights first .. first + BK of the rows at w [BN, 1], decoded or as expanded, in the type of operand_tile."""
    if PACKED:
        weights = packed_weights(w, codes, first, limit, SHAPE, OPERANDS, BK, MASKED)
        if OPERANDS.TYPE == "int8":
            weights = weights.to(tl.int8, bitcast=True)
        elif OPERANDS.TYPE == "fp8":
            weights = weights.to(tl.float8e4nv, bitcast=True)
        return weights
    else:
        return operand_tile(w, first, limit, "signed", 7, OPERANDS, BK, MASKED)


@triton.jit
def load_factor(w_scales, codes, n, first, SHAPE: tl.constexpr, OPERANDS: tl.constexpr):
    """f32 [BN]: real scale or multiplier of the group of input channel `first`; ones for "none"."""
    if OPERANDS.FACTOR == "scale":
        return tl.load(w_scales + n * (SHAPE.K // SHAPE.GROUP) + first // SHAPE.GROUP)
    elif OPERANDS.FACTOR == "multiplier":
        return load_multipliers(codes, first // SHAPE.GROUP, SHAPE.K // SHAPE.GROUP, OPERANDS).to(tl.float32)
    else:
        return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def add_products(acc, left, right, factor, OPERANDS: tl.constexpr, TILE: tl.constexpr):
    """acc + left [BM, BK] @ right [BN, BK]^T, times factor [BN] unless FACTOR is "none"; transposed if WEIGHTS_FIRST.

    PROMOTE: how many products the tensor core may add before they go to a float32 addition of its own; 0: all.
    """
    if TILE.WEIGHTS_FIRST:
        one, two = right, tl.trans(left)
    else:
        one, two = left, tl.trans(right)
    if one.dtype == tl.int8 and OPERANDS.FACTOR == "none":
        return tl.dot(one, two, acc, out_dtype=tl.int32)
    elif OPERANDS.FACTOR != "none":
        if one.dtype == tl.int8:
            part = tl.dot(one, two, out_dtype=tl.int32).to(tl.float32)
        else:
            part = tl.dot(one, two, max_num_imprecise_acc=OPERANDS.PROMOTE if OPERANDS.PROMOTE else None)
        return acc + part * (factor[:, None] if TILE.WEIGHTS_FIRST else factor[None, :])
    elif OPERANDS.PROMOTE:
        return acc + tl.dot(one, two, max_num_imprecise_acc=OPERANDS.PROMOTE)
    else:
        return tl.dot(one, two, acc)


# --- what follows the sum --------------------------------------------------------------------------------------------


@triton.jit
def epilogue(total, m, n, AFTER, SHAPE: tl.constexpr, EPILOGUE: tl.constexpr):
    """total f32 [BM, BN], rows m and columns n of the sum (with real groups: of the scaled sums) -> y."""
    a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y = AFTER
    N: tl.constexpr = SHAPE.N
    m_ok, n_ok = m < M, n < N
    if not SHAPE.REAL_GROUPS:
        total *= tl.load(w_scales + n, mask=n_ok, other=0.0)[None, :]
    total *= tl.load(a_scale + m, mask=m_ok, other=0.0)[:, None]
    if a_zero is not None:
        total += tl.load(a_zero + m, mask=m_ok, other=0.0)[:, None] * tl.load(w_sums + n, mask=n_ok, other=0.0)[None, :]
    total += tl.load(bias + n, mask=n_ok, other=0.0)[None, :]
    if EPILOGUE == "gate_residual":
        inside = m_ok[:, None] & n_ok[None, :]
        gates = tl.load((gate + (m // tokens).to(tl.int64)[:, None] * N) + n[None, :], mask=inside, other=0.0)
        skip = tl.load((residual + m.to(tl.int64)[:, None] * N) + n[None, :], mask=inside, other=0.0)
        total = skip.to(tl.float32) + gates.to(tl.float32) * total
    store(total, m, n, M, y, N)


@triton.jit
def store(value, m, n, M, y, N: tl.constexpr):
    at = (y + m.to(tl.int64)[:, None] * N) + n[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
