"""8-bit attention in float32, in the orders and with the approximations that engines have, and with faults planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.formats.format import decode, get_format, quantize
from pipeline.verify.attention_oracle import AttentionNumbers

F32 = np.float32
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def sum_pairwise(k: Doubles) -> Doubles:
    """Of k [T, D] over the tokens, halves first."""
    return k[0] if len(k) == 1 else sum_pairwise(k[: len(k) // 2]) + sum_pairwise(k[len(k) // 2 :])


def sum_in_turn(k: Doubles) -> Doubles:
    """One token after the other."""
    total = np.zeros(k.shape[1])
    for row in k:
        total = total + row
    return total


def sum_backwards_by_size(k: Doubles) -> Doubles:
    """The largest numbers first: partial sums as large as they can be."""
    return sum_in_turn(np.sort(k, axis=0)[::-1])


def sum_of_tiles(k: Doubles, tile: int = 16) -> Doubles:
    """Of tiles of tokens, which are added up."""
    return sum_in_turn(np.stack([sum_in_turn(k[i : i + tile]) for i in range(0, len(k), tile)]))


def ulps_off(x: Floats, ulps: int, seed: int = 0) -> Floats:
    """Moved at random by up to so many units in the last place."""
    steps = np.random.default_rng(seed).integers(-ulps, ulps + 1, x.shape)
    moved = x + np.spacing(x) * steps
    return np.where(x > 0, moved, x).astype(F32)


@dataclass(frozen=True)
class Form:
    """How a right engine computes. total: the sum of k over its tokens, in float64. by_reciprocal: multiplies where
    others divide. exp_ulps: error of its exponential. fused: mask and scale in one operation, which rounds once.
    folded: the scale of the scores is multiplied with that of k."""

    total: Callable[[Doubles], Doubles] = sum_pairwise
    by_reciprocal: bool = False
    exp_ulps: int = 0
    fused: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Faults:
    """What is wrong; the defaults are right. narrow_mean: the sum of k in float32, one token after the other."""

    centred: bool = True
    narrow_mean: bool = False
    query_scale: float = 1.0
    key_scale: float = 1.0
    p_max: float = 255.0
    sum_of_exponentials: bool = False
    truncated: bool = False
    sharp: float = 1.0


RIGHT = Faults()


def codes_of(fmt_name: str, x: Floats, form: Form) -> tuple[Floats, Floats]:
    """Values of codes [rows, K] without their scale, and the scale [rows, 1]."""
    fmt = get_format(fmt_name)
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), F32(1e-30)) / F32(fmt.max_value)
    quotient = x * (F32(1) / scale) if form.by_reciprocal else x / scale
    return decode(fmt, quantize(fmt, quotient)).astype(F32), scale.astype(F32)


def attend(
    q: Floats, k: Floats, v: Floats, mask: Floats, numbers: AttentionNumbers, form: Form, faults: Faults = RIGHT
) -> Floats:
    """One head: q [Tq, D], k and v [Tk, D], mask [Tq, Tk] -> [Tq, D]."""
    wide = form.total(k.astype(np.float64))
    mean = (wide * (1 / len(k)) if form.by_reciprocal else wide / len(k)).astype(F32)
    if faults.narrow_mean:
        mean = np.cumsum(k, axis=0, dtype=F32)[-1] / F32(len(k))
    centred = (k - mean).astype(F32) if faults.centred else k
    q_values, q_scale = codes_of(numbers.qk_format, q, form)
    k_values, k_scale = codes_of(numbers.qk_format, centred, form)
    q_scale, k_scale = q_scale * F32(faults.query_scale), k_scale * F32(faults.key_scale)
    products = q_values @ k_values.T
    scale = F32(numbers.scale)
    first, second = (k_scale.T * scale, q_scale) if form.folded else (q_scale * scale, k_scale.T)
    score = products * first * second
    if form.fused:
        score = (products.astype(np.float64) * first * second.astype(np.float64) + mask).astype(F32)
    else:
        score = (score + mask).astype(F32)
    x = score - score.max(axis=1, keepdims=True)
    sharp = x if faults.sharp == 1 else np.maximum(x, F32(-200)) * F32(faults.sharp)
    exponential = np.exp(sharp).astype(F32)
    if form.exp_ulps:
        exponential = np.where(x == 0, exponential, ulps_off(exponential, form.exp_ulps))
    scaled = (F32(faults.p_max) * exponential).astype(F32)
    p = np.floor(scaled) if faults.truncated else np.rint(scaled)
    v_values, v_scale = codes_of(numbers.pv_format, v.T.copy(), form)
    mixed = (p.astype(np.float64) @ v_values.T.astype(np.float64)).astype(F32)
    divisor = scaled.sum(axis=1, keepdims=True) if faults.sum_of_exponentials else p.sum(axis=1, keepdims=True)
    divisor = divisor.astype(F32)
    if form.by_reciprocal:
        return (mixed * v_scale.T * (F32(1) / divisor)).astype(F32)
    return (mixed / divisor * v_scale.T).astype(F32)
