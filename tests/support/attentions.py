"""Operands of quantized attention, and how far two ways of computing it may be apart in float32."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from export.dialect.reference import ABSMAX_FLOOR, quantize_activation
from export.formats.attention import WEIGHT_MAX, AttentionFormats
from export.formats.format import decode, get_format, quantize

FORMATS = tuple(
    AttentionFormats(*pair) for pair in (("INT8", "INT8"), ("E2M3", "INT6"), ("E3M0", "E1M2"), ("INT4", "E2M1"))
)
EPS, UNIT = 2.0**-24, np.float32(2**-10)
# Roundings of a score between the sum and the exponential, and of the exponential: products with three factors of
# which one is a product, scales (a division each), sum with the mask, difference to the largest; exp within 4 units.
SCORE_ROUNDINGS, EXP_ROUNDINGS = 8, 9
# Of the result: the sum, two factors (a scale has a rounding of its own) and a division.
OUT_ROUNDINGS = 6


class Operands(NamedTuple):
    """q f32 [B, H, Tq, D], k and v f32 [B, H, Tk, D], mask f32; all four inputs of the op."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray


def operands(
    batch: int, heads: int, queries: int, keys: int, channels: int, mask: str = "none", seed: int = 0
) -> Operands:
    """Multiples of UNIT, so that means over up to 256 tokens are equal however they are added; K has an offset in each
    channel, and outliers in two.

    mask: "none", "penalty" (-10000), "infinite" (-inf) or "partial" (small numbers, a row for each query).
    """
    rng = np.random.default_rng([seed, batch, heads, queries, keys, channels])

    def draw(tokens: int) -> np.ndarray:
        return np.round(rng.normal(size=(batch, heads, tokens, channels)) / UNIT).astype(np.float32) * UNIT

    q, k, v = draw(queries), draw(keys), draw(keys)
    k += np.round(rng.normal(size=channels) * 4).astype(np.float32)
    k[..., 0] += 24
    k[..., -1] *= 8
    v[..., 0] += 3
    return Operands(q, k, v, make_mask(mask, rng, batch, queries, keys))


def agreeing(*shape: int, formats: AttentionFormats, mask: str = "none") -> Operands:
    """Operands whose codes are the same in float64: none lies so near a midpoint that a rounding moves it."""
    for seed in range(100):
        given = operands(*shape, mask=mask, seed=seed)
        centred = given.k - given.k.mean(axis=-2, keepdims=True, dtype=np.float64).astype(np.float32)
        pairs = ((given.q, formats.qk), (centred, formats.qk), (given.v.swapaxes(-1, -2), formats.pv))
        if all(_codes_agree(x, name) for x, name in pairs):
            return given
    raise AssertionError(f"no seed of 100 whose codes float64 agrees with at {shape}, {formats}")


def _codes_agree(x: np.ndarray, name: str) -> bool:
    fmt, wide = get_format(name), x.astype(np.float64)
    scale = np.maximum(np.abs(wide).max(axis=-1, keepdims=True), ABSMAX_FLOOR) / fmt.max_value
    return bool((quantize(fmt, wide / scale) == quantize_activation(x, format=name)[0]).all())


def make_mask(name: str, rng: np.random.Generator, batch: int, queries: int, keys: int) -> np.ndarray:
    if name == "none":
        return np.zeros((1, 1, 1, 1), np.float32)
    if name == "partial":
        return rng.normal(size=(1, 1, queries, keys)).astype(np.float32)
    hidden = rng.random((batch, 1, 1, keys)) < 0.4
    hidden[..., 0] = False  # a row of nothing but hidden keys is another test's
    return np.where(hidden, np.float32(-10000 if name == "penalty" else -np.inf), np.float32(0))


class Bound(NamedTuple):
    """error [B, H, Tq, D]: how far results may be apart. undecided: share of the weights that lie so near a midpoint
    that float32 may round them either way."""

    error: np.ndarray
    undecided: float


def bound(given: Operands, formats: AttentionFormats, scale: float) -> Bound:
    """For ways that agree on the codes of q, k and v: what weights that may round either way change, and roundings."""
    centred = given.k - given.k.mean(axis=-2, keepdims=True, dtype=np.float64).astype(np.float32)
    q, k = (_dequantized(x, formats.qk) for x in (given.q, centred))
    v = _dequantized(given.v.swapaxes(-1, -2), formats.pv).swapaxes(-1, -2)
    plain = q @ k.swapaxes(-1, -2) * scale
    score = plain + given.mask
    largest = score.max(axis=-1, keepdims=True)
    weight = WEIGHT_MAX * np.exp(score - largest)
    sizes = np.abs(plain) + np.where(weight > 0, np.abs(score) + np.abs(largest), 0)
    error = weight * (SCORE_ROUNDINGS * sizes + EXP_ROUNDINGS) * EPS
    either = np.abs(weight % 1 - 0.5) <= error
    total, flips = np.rint(weight).sum(axis=-1, keepdims=True), either.sum(axis=-1, keepdims=True)
    out = np.abs(np.rint(weight) @ v) / total
    moved = (either @ np.abs(v) + flips * out) / (total - flips)
    return Bound(moved + OUT_ROUNDINGS * EPS * (np.rint(weight) @ np.abs(v)) / total, float(either.mean()))


def _dequantized(x: np.ndarray, name: str) -> np.ndarray:
    codes, scale = quantize_activation(x, format=name)
    return decode(get_format(name), codes) * scale.astype(np.float64)
