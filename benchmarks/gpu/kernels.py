"""Triton kernels that only the benchmark needs: what the quantizers are compared with, and the accumulator's probe."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from plugins.gpu.quantize import gelu_tanh


@triton.jit
def _at(row, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    return row.to(tl.int64) * C + column, column < C


@triton.jit
def _load(x, row, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _at(row, C, START, WIDTH)
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(y, row, value, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    at, inside = _at(row, C, START, WIDTH)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _centred(x, mean, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    return tl.where(START + tl.arange(0, WIDTH) < C, x - mean, 0.0)


@triton.jit
def _modulated(d, inverse, shift, scale, sample, C: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    return d * (inverse * (1.0 + _load(scale, sample, C, START, WIDTH))) + _load(shift, sample, C, START, WIDTH)


@triton.jit
def norm_modulate(
    x, shift, scale, tokens, y, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, EPSILON: tl.constexpr
):  # fmt: skip
    """y = LayerNorm(x) * (1 + scale) + shift in the form of norm_modulate_quantize: a row of [M, C] a program."""
    row = tl.program_id(0)
    first = _load(x, row, C, 0, BLOCK)
    total = tl.sum(first, 0)
    if TAIL > 0:
        last = _load(x, row, C, BLOCK, TAIL)
        total += tl.sum(last, 0)
    first = _centred(first, total * (1.0 / C), C, 0, BLOCK)
    squares = tl.sum(first * first, 0)
    if TAIL > 0:
        last = _centred(last, total * (1.0 / C), C, BLOCK, TAIL)
        squares += tl.sum(last * last, 0)
    inverse = tl.rsqrt(squares * (1.0 / C) + EPSILON)
    _store(y, row, _modulated(first, inverse, shift, scale, row // tokens, C, 0, BLOCK), C, 0, BLOCK)
    if TAIL > 0:
        _store(y, row, _modulated(last, inverse, shift, scale, row // tokens, C, BLOCK, TAIL), C, BLOCK, TAIL)


@triton.jit
def gelu(x, y, C: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """y = GELU(x) in the form of gelu_quantize: a row of [M, C] a program."""
    row = tl.program_id(0)
    _store(y, row, gelu_tanh(_load(x, row, C, 0, BLOCK)), C, 0, BLOCK)
    if TAIL > 0:
        _store(y, row, gelu_tanh(_load(x, row, C, BLOCK, TAIL)), C, BLOCK, TAIL)


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
