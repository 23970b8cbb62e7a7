"""Measures of picture quality, each with the interval in which chance leaves it.

Frechet distance: every set has the same number of pictures of the same prompts from the same noise, since the distance
falls with the number of pictures; it is comparable within a table, not with published ones. Its interval is a
bootstrap over pictures with the real data held fixed. Resampled sets repeat pictures, which raises the distance, so
the spread of the bootstrap is centred on the estimate. Shares of right pictures have Wilson's interval: a bootstrap
of 100 % right would claim certainty. PSNR and SSIM are medians over pictures with a percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import distance

Array = NDArray[np.float64]
RESAMPLES, LEVEL = 400, 0.95
Z = 1.959964  # of a normal distribution, two-sided, for LEVEL
# SSIM (Wang et al. 2004): a Gaussian window of 11 x 11 with sigma 1.5, and the two constants as shares of the range.
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it in LEVEL of all repetitions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features."""

    mean: Array
    covariance: Array


def gaussian(features: Array) -> Gaussian:
    """Of features [N, D]; unbiased covariance."""
    return Gaussian(features.mean(axis=0), np.cov(features, rowvar=False))


def frechet(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2) (arXiv 1706.08500)."""
    # tr (C1 C2)^1/2 from the eigenvalues of C1 C2, which are real and not negative up to rounding.
    root = np.sqrt(np.linalg.eigvals(first.covariance @ second.covariance).real.clip(min=0)).sum()
    means = np.sum((first.mean - second.mean) ** 2)
    return float(means + np.trace(first.covariance) + np.trace(second.covariance) - 2 * root)


def frechet_estimate(features: Array, real: Array) -> Estimate:
    """Frechet distance of pictures' features [N, D] from those of real data [M, D]."""
    fixed = gaussian(real)
    return centred(lambda rows: frechet(gaussian(features[rows]), fixed), len(features))


def frechet_increase(features: Array, base: Array, real: Array) -> Estimate:
    """How much farther from `real` than the pictures of `base` [N, D], which show the same prompts from the same noise.

    Both sets are resampled together, so that what chance does to both cancels.
    """
    fixed = gaussian(real)

    def increase(rows: NDArray[np.intp]) -> float:
        return frechet(gaussian(features[rows]), fixed) - frechet(gaussian(base[rows]), fixed)

    return centred(increase, len(features))


def frechet_between(features: Array, base: Array) -> Estimate:
    """Frechet distance of two sets of pictures of the same prompts from the same noise, resampled together."""
    return centred(lambda rows: frechet(gaussian(features[rows]), gaussian(base[rows])), len(features))


def resamples(count: int) -> list[NDArray[np.intp]]:
    """RESAMPLES index arrays [count], drawn with replacement."""
    rng = np.random.default_rng(0)
    return [rng.integers(count, size=count) for _ in range(RESAMPLES)]


def centred(statistic: Callable[[NDArray[np.intp]], float], count: int) -> Estimate:
    """The statistic of all pictures, with the bootstrap's percentiles moved so that their mean is the estimate."""
    value = statistic(np.arange(count))
    drawn = np.array([statistic(rows) for rows in resamples(count)])
    low, high = np.quantile(drawn - drawn.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, value + float(low), value + float(high))


def median_estimate(values: Array) -> Estimate:
    """Median over pictures [N] with percentile bootstrap; infinite values (equal pictures) are allowed."""
    drawn = np.sort([np.median(values[rows]) for rows in resamples(len(values))])
    at = [int((1 - LEVEL) / 2 * (RESAMPLES - 1)), math.ceil((1 + LEVEL) / 2 * (RESAMPLES - 1))]
    return Estimate(float(np.median(values)), float(drawn[at[0]]), float(drawn[at[1]]))


def share_estimate(right: NDArray[np.bool_]) -> Estimate:
    """Share of right pictures [N], with Wilson's interval."""
    n, share = len(right), float(right.mean())
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0))


def psnr_db(pictures: NDArray[np.floating], reference: NDArray[np.floating]) -> Array:
    """[N] dB for pictures [N, C, H, W], both cut to [-1, 1]; inf where they are equal."""
    pairs = zip(_shown(reference), _shown(pictures), strict=True)
    return np.array([distance.psnr_db(*pair, distance.PIXEL_RANGE) for pair in pairs])


def ssim(pictures: NDArray[np.floating], reference: NDArray[np.floating]) -> Array:
    """[N]: structural similarity of pictures [N, C, H, W] cut to [-1, 1], mean over channels and window positions."""
    a, b = _shown(pictures), _shown(reference)
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a, variance_b = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (K1 * distance.PIXEL_RANGE) ** 2, (K2 * distance.PIXEL_RANGE) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (top / bottom).mean(axis=(1, 2, 3))


def _shown(pictures: NDArray[np.floating]) -> Array:
    return np.clip(np.asarray(pictures, np.float64), -1, 1)


def _windowed(pictures: Array) -> Array:
    """Gaussian-weighted means of every window that lies inside the picture, [N, C, H - 10, W - 10]."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    rows = np.lib.stride_tricks.sliding_window_view(pictures, WINDOW, axis=2) @ weights
    return np.lib.stride_tricks.sliding_window_view(rows, WINDOW, axis=3) @ weights
