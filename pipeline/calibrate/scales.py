"""Weight scales: how large is one step of the grid, for a row or a group of input channels?

All granularities are one search over blocks [R, G, g]: R rows with a real scale each, whose G groups of g elements take
a small integer multiplier each. Per channel is G = 1; real group scales are R = channels * groups and G = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import Granularity
from export.dialect.ops import ABSMAX_FLOOR
from export.formats.format import Format, quantize
from pipeline import machine
from plugins.cpu import rounding_errors

F32 = NDArray[np.float32]
T = TypeVar("T")
# What is tried for the largest multiplier's reach, as shares of the row's absmax. Below 1 the row's peak is clipped.
# Above 1 the peak takes a smaller multiplier, which leaves the others finer choices: worth 0.1 dB at g = 64, 0.2 at 32.
REACHES = tuple(float(share) for share in np.linspace(1.5, 0.5, 21))
# A chunk of float32 stays in a core's second-level cache.
CHUNK_ELEMENTS = 65536
# Rows of an absmax within 2^+-40 are searched as they are: their scales, down to 2^-50, have squares that are numbers.
USUAL_EXPONENT = 40
LANES = 16  # as in plugins/cpu/variants.h


def in_blocks(weight: F32, granularity: Granularity, group_size: int) -> F32:
    """Weight [N, K] as blocks [R, G, g]; group_size 0 stands for all of K."""
    n, k = weight.shape
    group = group_size or k
    return weight.reshape(n * (k // group) if granularity == "group" else n, -1, group)


def find_scales(blocks: F32, fmt: Format, multipliers: tuple[int, ...], search: str) -> tuple[F32, NDArray[np.uint8]]:
    """Scales [R] float32 and multipliers [R, G] uint8 for blocks [R, G, g]; `search` is a key of `SEARCHES`.

    The value of a code in group j of row i is decode(code) * multiplier[i, j] * scale[i].
    """
    rounding_errors.compiled()  # once, before the threads ask
    chunks = _by_chunk(lambda chunk: SEARCHES[search](np.abs(chunk), fmt, multipliers), blocks)
    return np.concatenate([scale for scale, _ in chunks]), np.concatenate([multiplier for _, multiplier in chunks])


def _by_chunk(work: Callable[..., T], *arrays: NDArray[np.generic]) -> list[T]:
    """`work` on chunks of rows, in threads (NumPy lets them run); chunks do not depend on the number of threads."""
    rows = max(1, CHUNK_ELEMENTS // max(1, arrays[0][0].size))
    parts = [[array[i : i + rows] for array in arrays] for i in range(0, len(arrays[0]), rows)]
    pool = ThreadPoolExecutor(machine.threads())
    try:
        return list(pool.map(lambda part: work(*part), parts))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C only the chunks that have begun are waited for


def round_to_codes(blocks: F32, fmt: Format, scales: F32, multipliers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nearest code of every element, uint8 [R, G, g], in the arithmetic of the op `QuantizeWeight`: float32 quotients,
    within +-max_value, one zero."""

    def codes(chunk: F32, scale: F32, multiplier: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return quantize(fmt, chunk / (scale[:, None] * multiplier.astype(np.float32))[..., None])

    return np.concatenate(_by_chunk(codes, blocks, scales, multipliers))


def _widest_scale(magnitude: F32, fmt: Format, multipliers: tuple[int, ...]) -> F32:
    """[R]: the scale at which the largest multiplier reaches the row's absmax."""
    absmax = np.maximum(magnitude.max(axis=(1, 2)), np.float32(ABSMAX_FLOOR))
    return (absmax / np.float32(fmt.max_value * max(multipliers))).astype(np.float32)


def absmax_scales(magnitude: F32, fmt: Format, multipliers: tuple[int, ...]) -> tuple[F32, NDArray[np.uint8]]:
    """The finest scale and smallest multipliers that clip nothing."""
    scale = _widest_scale(magnitude, fmt, multipliers)
    needed = magnitude.max(axis=2) / (scale[:, None] * np.float32(fmt.max_value))
    # The largest multiplier is needed exactly once rounded: 1e-6 is above the two float32 roundings of `needed`.
    index = np.searchsorted(np.array(multipliers) * (1 + 1e-6), needed)
    return scale, np.array(multipliers, np.uint8)[index]


def mse_scales(magnitude: F32, fmt: Format, multipliers: tuple[int, ...]) -> tuple[F32, NDArray[np.uint8]]:
    """The scale and multipliers with the least squared error, out of `REACHES` and all multipliers."""
    unit = _units(magnitude)
    magnitude = magnitude if (unit == 1).all() else magnitude / unit[:, None, None]
    widest = _widest_scale(magnitude, fmt, multipliers)
    scales = widest[:, None] * np.array(REACHES, np.float32)  # [R, reaches]
    # Many a reach times a multiplier is another one's (1.5 * 2 = 1 * 3): a step is tried once.
    products = np.round(np.outer(multipliers, REACHES), 9)  # [multipliers, reaches]
    distinct, place = np.unique(products, return_inverse=True)
    steps = widest[:, None] * distinct.astype(np.float32)
    errors = RoundingErrors(magnitude, fmt).at(steps)[:, place.reshape(products.shape)]  # [R, *products, G]
    rows, best = np.arange(len(steps)), errors.min(axis=1).sum(axis=2).argmin(axis=1)  # the first of equals, as below
    return scales[rows, best] * unit, np.array(multipliers, np.uint8)[errors[rows, :, best].argmin(axis=1)]


def _units(magnitude: F32) -> F32:
    """[R]: powers of two that take rows whose squared errors would leave float32 to about 1, exactly; 1 for others."""
    absmax = magnitude.max(axis=(1, 2))
    odd = (absmax > ABSMAX_FLOOR) & (np.abs(np.log2(np.maximum(absmax, np.float32(ABSMAX_FLOOR)))) > USUAL_EXPONENT)
    return np.where(odd, np.exp2(np.floor(np.log2(np.where(odd, absmax, 1)))), 1).astype(np.float32)


class RoundingErrors:
    """Squared rounding errors of fixed magnitudes [R, G, g] at many scales, the same bits in C and in NumPy.

    Rounding is one addition: a + c - c rounds a to multiples of ulp(c), and with c = a * 2^(23 - M), not below
    2^(23 - f), that ulp is the format's own step at a. Ties may go the other way than the codec's; the error is equal.
    """

    def __init__(self, magnitude: F32, fmt: Format) -> None:
        self.magnitude = np.ascontiguousarray(magnitude, np.float32)
        self.slope = np.float32(2.0 ** (23 - fmt.mantissa_bits))
        self.floor = np.float32(2.0 ** (23 - fmt.fraction_bits))
        self.max_value, self.function = np.float32(fmt.max_value), rounding_errors.compiled()

    def at(self, scales: F32) -> F32:
        """[R, S, G]: sum over each group of (magnitude - rounded magnitude)^2, for S scales of each row, [R, S]."""
        if self.function is None:
            return np.stack([self._by_numpy(scale) for scale in scales.T], axis=1)
        grid = (float(number) for number in (self.slope, self.floor, self.max_value))
        return rounding_errors.rounding_errors(self.function, self.magnitude, scales, *grid)

    def _by_numpy(self, scale: F32) -> F32:
        scaled = self.magnitude * (1 / scale)[:, None, None]
        magic = scaled * self.slope
        np.maximum(magic, self.floor, out=magic)
        rounded = scaled + magic
        np.subtract(rounded, magic, out=rounded)
        np.minimum(rounded, self.max_value, out=rounded)
        np.subtract(rounded, scaled, out=rounded)
        return _sums(np.square(rounded, out=rounded)) * (scale * scale)[:, None]


def _sums(x: F32) -> F32:
    """Sums over the last axis of [R, G, g]: LANES partial sums in order, then added in pairs."""
    padded = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))
    part = np.zeros((*x.shape[:2], LANES), np.float32)
    for row in np.moveaxis(padded.reshape(*x.shape[:2], -1, LANES), 2, 0):
        part += row
    while part.shape[2] > 1:
        part = part[..., : part.shape[2] // 2] + part[..., part.shape[2] // 2 :]
    return part[..., 0]


SEARCHES: dict[str, Callable[[F32, Format, tuple[int, ...]], tuple[F32, NDArray[np.uint8]]]] = {
    "absmax": absmax_scales,
    "mse": mse_scales,
}
