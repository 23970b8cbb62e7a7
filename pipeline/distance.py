"""Distances between arrays in decibels, by which calibration searches, verification judges and benchmarks report."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
# Pictures of pixel models lie in [-1, 1].
PIXEL_RANGE = 2.0


def sqnr_db(reference: Array, value: Array) -> float:
    """Signal to noise, 10 log10(|reference|^2 / |value - reference|^2); inf if equal, nan if not finite."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    noise, signal = float(np.sum((value - reference) ** 2)), float(np.sum(reference**2))
    return ratio_db(signal, noise)


def psnr_db(reference: Array, value: Array, peak: float) -> float:
    """Peak signal to noise of images, 10 log10(peak^2 / mean square error); `peak` is the range of the values."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    return ratio_db(peak**2, float(np.mean((value - reference) ** 2)))


def ratio_db(signal: float, noise: float) -> float:
    """10 log10 of a ratio of powers; inf without noise, nan if one is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
