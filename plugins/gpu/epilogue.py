"""What follows the sum of a GEMM: scales, zero point, bias, GELU or gate and residual, rounding to the output type."""

from __future__ import annotations

import triton
import triton.language as tl


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
