"""GEMM of operand bytes with 4-bit weights, packed or expanded: y = epilogue((a @ w^T) * scales + bias).

One source for SM80 to SM120: pointers and masks, no tensor maps, no inline assembly. The sum over K is one of integers
times a power of two, so its order is free: blocks of K may be split, promoted and padded with zeros, and the result is
the same number wherever the accumulator holds it (plugins/gpu/promotion.py). Shapes are in GemmSpec (spec.py), the
constants in tiles.py. M and N are any size, K is even.
"""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.decode import load_multipliers, operand_tile, packed_weights


@triton.jit
def tile_of(program, M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """program number -> (row, column) of its tile: BAND rows of tiles at a time, so that both operands stay in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = program // (BAND * columns) * BAND
    height = min(rows - first, BAND)
    inside = program % (BAND * columns)
    return first + inside % height, inside // height


@triton.jit
def add_products(acc, left, right, factor, FACTOR: tl.constexpr, WEIGHTS_FIRST: tl.constexpr, PROMOTE: tl.constexpr):
    """acc + left [BM, BK] @ right [BN, BK]^T, times factor [BN] unless FACTOR is "none"; transposed if WEIGHTS_FIRST.

    PROMOTE: how many products the tensor core may add before they go to a float32 addition of its own; 0: all.
    """
    if WEIGHTS_FIRST:
        one, two = right, tl.trans(left)
    else:
        one, two = left, tl.trans(right)
    if one.dtype == tl.int8 and FACTOR == "none":
        return tl.dot(one, two, acc, out_dtype=tl.int32)
    elif FACTOR != "none":
        if one.dtype == tl.int8:
            part = tl.dot(one, two, out_dtype=tl.int32).to(tl.float32)
        else:
            part = tl.dot(one, two, max_num_imprecise_acc=PROMOTE if PROMOTE else None)
        return acc + part * (factor[:, None] if WEIGHTS_FIRST else factor[None, :])
    elif PROMOTE:
        return acc + tl.dot(one, two, max_num_imprecise_acc=PROMOTE)
    else:
        return tl.dot(one, two, acc)


@triton.jit
def load_factor(
    w_scales, codes, n, first, K: tl.constexpr, GROUP: tl.constexpr, FACTOR: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr,
):  # fmt: skip
    """f32 [BN]: real scale or multiplier of the group of input channel `first`; ones for "none"."""
    if FACTOR == "scale":
        return tl.load(w_scales + n * (K // GROUP) + first // GROUP)
    elif FACTOR == "multiplier":
        return load_multipliers(codes, first // GROUP, K // GROUP, LOW, HIGH).to(tl.float32)
    else:
        return tl.full(n.shape, 1.0, tl.float32)


@triton.jit
def weight_tile(
    w, codes, first, limit, PACKED: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, SIGNED: tl.constexpr, INTEGER: tl.constexpr, SHIFT: tl.constexpr, TYPE: tl.constexpr,
    WIDTH: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights first .. first + BK of the rows at w [BN, 1], decoded or as expanded, in the type of operand_tile."""
    if PACKED:
        found = packed_weights(
            w, codes, first, limit, K, GROUP, LOW, HIGH, SIGNED, INTEGER, SHIFT, TYPE, WIDTH, BK, MASKED
        )
        if TYPE == "int8":
            found = found.to(tl.int8, bitcast=True)
        elif TYPE == "fp8":
            found = found.to(tl.float8e4nv, bitcast=True)
        return found
    else:
        return operand_tile(w, first, limit, TYPE, "signed", 7, WIDTH, BK, MASKED)


@triton.jit
def sum_of_products(
    a, w, w_scales, multiplier_codes, m, n,
    PACKED: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, REAL_GROUPS: tl.constexpr, FACTOR: tl.constexpr,
    MULTIPLIERS_LOW: tl.constexpr, MULTIPLIERS_HIGH: tl.constexpr, W_SIGNED: tl.constexpr, W_INTEGER: tl.constexpr,
    W_SHIFT: tl.constexpr, WIDTH: tl.constexpr, A_KIND: tl.constexpr, A_SHIFT: tl.constexpr, TYPE: tl.constexpr,
    PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """f32 [BM, BN] (transposed if WEIGHTS_FIRST): this split's sum for rows m and columns n, both in range.

    FACTOR: what multiplies the sum of a group: its real "scale"; its "multiplier", where a tile lies in one group; or
    "none", where weights are multiplied as they are decoded.
    """
    a_rows = a + m.to(tl.int64)[:, None] * K
    w_rows = w + n.to(tl.int64)[:, None] * (K // 2 if PACKED else K)
    codes = multiplier_codes
    if PACKED and MULTIPLIERS_LOW != 0:
        codes += n * ((K // GROUP + 1) // 2)
    SPAN: tl.constexpr = GROUP if REAL_GROUPS else K  # input channels that share their scales
    BLOCKS: tl.constexpr = (SPAN + BK - 1) // BK  # of a span
    MASKED: tl.constexpr = SPAN % BK != 0
    ALL: tl.constexpr = K // SPAN * BLOCKS
    EACH: tl.constexpr = (ALL + SPLITS - 1) // SPLITS
    LOW: tl.constexpr = 0 if FACTOR == "multiplier" else MULTIPLIERS_LOW
    start = tl.program_id(1) * EACH
    SUM: tl.constexpr = tl.int32 if TYPE == "int8" and FACTOR == "none" else tl.float32
    acc = tl.zeros((BN, BM) if WEIGHTS_FIRST else (BM, BN), SUM)
    for block in range(start, min(start + EACH, ALL)):
        span = block // BLOCKS
        first, limit = span * SPAN + block % BLOCKS * BK, (span + 1) * SPAN
        left = operand_tile(a_rows, first, limit, TYPE, A_KIND, A_SHIFT, WIDTH, BK, MASKED)
        right = weight_tile(
            w_rows, codes, first, limit, PACKED,
            K, GROUP, LOW, MULTIPLIERS_HIGH, W_SIGNED, W_INTEGER, W_SHIFT, TYPE, WIDTH, BK, MASKED,
        )  # fmt: skip
        factor = load_factor(w_scales, codes, n, first, K, GROUP, FACTOR, MULTIPLIERS_LOW, MULTIPLIERS_HIGH)
        acc = add_products(acc, left, right, factor, FACTOR, WEIGHTS_FIRST, PROMOTE)
    return acc.to(tl.float32)


@triton.jit
def packed_gemm(
    a, a_scale, w, w_scales, multiplier_codes, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, REAL_GROUPS: tl.constexpr, FACTOR: tl.constexpr,
    MULTIPLIERS_LOW: tl.constexpr, MULTIPLIERS_HIGH: tl.constexpr, W_SIGNED: tl.constexpr, W_INTEGER: tl.constexpr,
    W_SHIFT: tl.constexpr, WIDTH: tl.constexpr, A_KIND: tl.constexpr, A_SHIFT: tl.constexpr, TYPE: tl.constexpr,
    UNIT: tl.constexpr, EPILOGUE: tl.constexpr, PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLITS: tl.constexpr, BAND: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """w u8 [N, K / 2], decoded in registers. Grid (tiles, SPLITS); with SPLITS > 1 y is f32 [SPLITS, M, N]."""
    row, column = tile_of(tl.program_id(0), M, N, BM, BN, BAND)
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    acc = sum_of_products(
        a, w, w_scales, multiplier_codes, tl.minimum(m, M - 1), tl.minimum(n, N - 1),
        True, K, GROUP, REAL_GROUPS, FACTOR, MULTIPLIERS_LOW, MULTIPLIERS_HIGH, W_SIGNED, W_INTEGER, W_SHIFT, WIDTH,
        A_KIND, A_SHIFT, TYPE, PROMOTE, BM, BN, BK, SPLITS, WEIGHTS_FIRST,
    )  # fmt: skip
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    finish(
        acc * UNIT, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
        N, REAL_GROUPS, EPILOGUE, SPLITS,
    )  # fmt: skip


@triton.jit
def expanded_gemm(
    a, a_scale, w, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, REAL_GROUPS: tl.constexpr, FACTOR: tl.constexpr,
    WIDTH: tl.constexpr, A_KIND: tl.constexpr, A_SHIFT: tl.constexpr, TYPE: tl.constexpr, UNIT: tl.constexpr,
    EPILOGUE: tl.constexpr, PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLITS: tl.constexpr, BAND: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
):  # fmt: skip
    """w u8 [N, K], bytes from `expand`. Grid and y as in packed_gemm."""
    row, column = tile_of(tl.program_id(0), M, N, BM, BN, BAND)
    m, n = row * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN)
    acc = sum_of_products(
        a, w, w_scales, None, tl.minimum(m, M - 1), tl.minimum(n, N - 1),
        False, K, GROUP, REAL_GROUPS, FACTOR, 0, 0, 0, 0, 0, WIDTH, A_KIND, A_SHIFT, TYPE, PROMOTE, BM, BN, BK, SPLITS,
        WEIGHTS_FIRST,
    )  # fmt: skip
    if WEIGHTS_FIRST:
        acc = tl.trans(acc)
    finish(
        acc * UNIT, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
        N, REAL_GROUPS, EPILOGUE, SPLITS,
    )  # fmt: skip


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x / (1 + 2^(-2u log2(e))): nothing cancels."""
    return x / (1.0 + tl.exp2(x * (x * x * -0.10294323958 - 2.30220819814)))


@triton.jit
def store(value, m, n, M, y, N: tl.constexpr):
    at = (y + m.to(tl.int64)[:, None] * N) + n[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def epilogue(
    total, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
    N: tl.constexpr, REAL_GROUPS: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """total f32 [BM, BN], rows m and columns n of the sum (with real groups: of the scaled sums) -> y."""
    m_ok, n_ok = m < M, n < N
    if not REAL_GROUPS:
        total *= tl.load(w_scales + n, mask=n_ok, other=0.0)[None, :]
    total *= tl.load(a_scale + m, mask=m_ok, other=0.0)[:, None]
    if a_zero is not None:
        total += tl.load(a_zero + m, mask=m_ok, other=0.0)[:, None] * tl.load(w_sums + n, mask=n_ok, other=0.0)[None, :]
    total += tl.load(bias + n, mask=n_ok, other=0.0)[None, :]
    if EPILOGUE == "gelu":
        total = gelu_tanh(total)
    if EPILOGUE == "gate_residual":
        inside = m_ok[:, None] & n_ok[None, :]
        gates = tl.load((gate + (m // tokens).to(tl.int64)[:, None] * N) + n[None, :], mask=inside, other=0.0)
        skip = tl.load((residual + m.to(tl.int64)[:, None] * N) + n[None, :], mask=inside, other=0.0)
        total = skip.to(tl.float32) + gates.to(tl.float32) * total
    store(total, m, n, M, y, N)


@triton.jit
def finish(
    total, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
    N: tl.constexpr, REAL_GROUPS: tl.constexpr, EPILOGUE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The epilogue, or with SPLITS > 1 this split's part of the sum as it is, into f32 [SPLITS, M, N]."""
    if SPLITS > 1:
        store(total, m, n, M, y + tl.program_id(1).to(tl.int64) * M * N, N)
    else:
        epilogue(
            total, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
            N, REAL_GROUPS, EPILOGUE,
        )  # fmt: skip


@triton.jit
def reduce_splits(
    parts, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, M, tokens, y,
    N: tl.constexpr, REAL_GROUPS: tl.constexpr, EPILOGUE: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """parts f32 [SPLITS, M, N] added in their order, then the epilogue. Grid (tiles of BM x BN)."""
    columns = tl.cdiv(N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    at = parts + m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    size = tl.full((), N, tl.int64) * M
    for _ in range(SPLITS):
        total += tl.load(at, mask=inside, other=0.0)
        at += size
    epilogue(
        total, m, n, M, tokens, a_scale, w_scales, bias, a_zero, w_sums, gate, residual, y,
        N, REAL_GROUPS, EPILOGUE,
    )  # fmt: skip
