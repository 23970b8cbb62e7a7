"""Triton kernels that only the benchmark needs: what the quantizers are compared with, and the accumulator's probe."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.quantize import centred, gelu_tanh, load_part, modulated, store_part


@triton.jit
def norm_modulate(
    x, shift, scale, tokens, y, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, EPSILON: tl.constexpr
):  # fmt: skip
    """y = LayerNorm(x) * (1 + scale) + shift in the form of norm_modulate_quantize: a row of [M, C] a program."""
    row = tl.program_id(0)
    first = load_part(x, row, C, 0, BLOCK)
    total = tl.sum(first, 0)
    if TAIL > 0:
        last = load_part(x, row, C, BLOCK, TAIL)
        total += tl.sum(last, 0)
    first = centred(first, total * (1.0 / C), C, 0, BLOCK)
    squares = tl.sum(first * first, 0)
    if TAIL > 0:
        last = centred(last, total * (1.0 / C), C, BLOCK, TAIL)
        squares += tl.sum(last * last, 0)
    inverse = tl.rsqrt(squares * (1.0 / C) + EPSILON)
    store_part(y, row, modulated(first, inverse, shift, scale, row // tokens, C, 0, BLOCK), C, 0, BLOCK)
    if TAIL > 0:
        store_part(y, row, modulated(last, inverse, shift, scale, row // tokens, C, BLOCK, TAIL), C, BLOCK, TAIL)


@triton.jit
def gelu(x, y, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """y = GELU(x) in the form of gelu_quantize: a row of [M, C] a program."""
    row = tl.program_id(0)
    store_part(y, row, gelu_tanh(load_part(x, row, C, 0, BLOCK)), C, 0, BLOCK)
    if TAIL > 0:
        store_part(y, row, gelu_tanh(load_part(x, row, C, BLOCK, TAIL)), C, BLOCK, TAIL)


@triton.jit
def fp8_sums(
    a, w, y, M, N, K, PROMOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y f32 [M, N] = a [M, K] @ w [N, K]^T of E4M3 bytes, PROMOTE products (a multiple of BK) summed by tensor cores.

    Those sums are added in float32. Whole tiles only: M % BM = N % BN = 0.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    a = a.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + m[:, None] * K
    w = w.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + n[None, :] * K
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, PROMOTE):
        part = tl.zeros((BM, BN), tl.float32)
        for first in range(start, start + PROMOTE, BK):
            k = first + tl.arange(0, BK)
            left = tl.load(a + k[None, :], mask=k[None, :] < K, other=0.0)
            right = tl.load(w + k[:, None], mask=k[:, None] < K, other=0.0)
            part = tl.dot(left, right, part)
        total += part
    tl.store(y + m[:, None] * N + n[None, :], total)
