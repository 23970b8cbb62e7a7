"""Arithmetic of the parity gates: the oracle of one quantized linear, and error measures.

Plain NumPy in float64 and exact integers; what an engine computed comes in as arrays. Every tolerance is counted in
float32 roundings, with the count beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.formats import Format, encode, get_format, to_image
from export.op_meanings import ABSMAX_FLOOR

Array = NDArray[np.floating]
# Largest relative error of one float32 operation (round to nearest), and of one in FP16.
ROUNDING = 2.0**-24
HALF_ROUNDING = 2.0**-11
# Float32 operations between x and the number that is rounded to the grid, in the longest form a lowering may use:
# scale = absmax / max_value, inverse = 1 / scale, x * inverse, and one rescaling that is not a power of two.
QUOTIENT_ROUNDINGS = 4
# The same for the token scale: absmax / max_value, and one rescaling.
SCALE_ROUNDINGS = 2
# After the integer sum: conversion to float32, times the channel scale, times the token scale (itself SCALE_ROUNDINGS
# off), plus bias.
OUTPUT_ROUNDINGS = 4 + SCALE_ROUNDINGS
# Second-order terms of that first-order count are below 2^-40; one per mille covers them.
FIRST_ORDER = 1.001


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


@dataclass(frozen=True)
class ActivationOracle:
    """What fpq.QuantizeActivation gives for x [M, K], and what float32 roundings may turn it into.

    image: integer image of the nearest code, [M, K]. lowest, highest: images of the codes at both ends of the
    interval that contains the float32 quotient; they differ only where the quotient lies within QUOTIENT_ROUNDINGS of
    a midpoint. scale: [M, 1] float64.
    """

    image: NDArray[np.integer]
    lowest: NDArray[np.integer]
    highest: NDArray[np.integer]
    scale: NDArray[np.float64]

    @property
    def ambiguous(self) -> int:
        """How many codes may differ from the nearest one."""
        return int(np.count_nonzero(self.lowest != self.highest))


def quantize_oracle(x: Array, format_name: str) -> ActivationOracle:
    """Codes of x [M, K] (finite) by the rules of fpq.QuantizeActivation, in float64: one scale for each row."""
    fmt = get_format(format_name)
    x = np.asarray(x, np.float64)
    scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), ABSMAX_FLOOR) / fmt.max_value
    quotient = x / scale
    slack = QUOTIENT_ROUNDINGS * ROUNDING * np.abs(quotient)
    images, midpoints = _grid(fmt)
    bounds = np.concatenate([[-np.inf], midpoints, [np.inf]])
    place = np.searchsorted(midpoints, quotient)
    close = (quotient - bounds[place] <= slack) | (bounds[place + 1] - quotient <= slack)
    nearest = images[place]
    lowest, highest = nearest.copy(), nearest.copy()
    lowest[close] = images[np.searchsorted(midpoints, (quotient - slack)[close])]
    highest[close] = images[np.searchsorted(midpoints, (quotient + slack)[close])]
    nearest[close] = to_image(fmt, encode(fmt, quotient[close]))  # ties to even
    return ActivationOracle(nearest, lowest, highest, scale)


def _grid(fmt: Format) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """Images in ascending order, and the midpoints between neighbours, of the values a symmetric quantizer uses."""
    usable = np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max_value)
    values = np.unique(fmt.values[usable])
    integer = np.int32 if fmt.kmax <= np.iinfo(np.int32).max else np.int64
    return np.ldexp(values, fmt.fraction_bits).astype(integer), (values[1:] + values[:-1]) / 2


@dataclass(frozen=True)
class LinearProbe:
    """What an engine computed for one linear on M tokens.

    x: [M, K]. image: integer image of its activation codes, [M, K] float64. act_scale: [M, 1]. gemm: [M, N].
    output: [M, N], or None where the engine does not keep it. The other fields are those of the ProbeRow, gemm_scale as
    array [N] or None.
    """

    x: Array
    image: Array
    act_scale: Array
    gemm: Array
    output: Array | None = None
    gemm_unit: float = 1.0
    gemm_scale: Array | None = None
    exact: bool = True
    half_roundings: int = 0


@dataclass(frozen=True)
class LinearCheck:
    """Findings about one linear.

    gemm_max_abs_diff: against the exact integer sum of the engine's own codes (nan where the path is not an integer
    embedding). scale_error, output_error: largest difference over the bound that float32 roundings allow, so at most 1.
    """

    codes: int
    codes_different: int
    codes_ambiguous: int
    codes_inadmissible: int
    gemm_max_abs_diff: float
    scale_error: float
    output_error: float
    nonfinite: int


def check_linear(layer: QuantizedLinear, probe: LinearProbe, oracle: ActivationOracle) -> LinearCheck:
    """Compare one linear of an engine with the oracle; `oracle` is quantize_oracle(probe.x, format of the layer)."""
    image = np.nan_to_num(probe.image, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float64)
    weight = layer.image()
    total = exact_product(image, weight)
    outside = (probe.image < oracle.lowest) | (probe.image > oracle.highest) | ~np.isfinite(probe.image)
    produced = [item for item in (probe.x, probe.gemm, probe.act_scale, probe.output) if item is not None]
    return LinearCheck(
        codes=image.size,
        codes_different=int(np.count_nonzero(probe.image != oracle.image)),
        codes_ambiguous=oracle.ambiguous,
        codes_inadmissible=int(np.count_nonzero(outside)),
        gemm_max_abs_diff=_gemm_difference(probe, total),
        scale_error=_largest(probe.act_scale - oracle.scale, oracle.scale * (SCALE_ROUNDINGS * ROUNDING * FIRST_ORDER)),
        output_error=_output_error(layer, probe, oracle, image, total),
        nonfinite=sum(int(np.count_nonzero(~np.isfinite(item))) for item in produced),
    )


def exact_product(image: Array, weight: NDArray[np.int32]) -> NDArray[np.float64]:
    """image [M, K] @ weight[N, K].T without any rounding, as float64 [M, N].

    Floats of p bits add integers exactly, in any order, while the sum of the magnitudes stays below 2^p: float32 where
    that holds (twice as fast), float64 else.
    """
    largest = float(np.abs(image).max(initial=0)) * float(np.abs(weight).sum(axis=1, dtype=np.int64).max(initial=0))
    if largest >= 2.0**53:
        raise ValueError(f"sums up to {largest:.3g} are not exact in float64")
    dtype = np.float32 if largest < 2.0**24 else np.float64
    return (image.astype(dtype) @ weight.T.astype(dtype)).astype(np.float64)


def _gemm_difference(probe: LinearProbe, total: Array) -> float:
    if not probe.exact:
        return math.nan
    expected = (total * probe.gemm_unit).astype(np.float32)
    if probe.gemm_scale is not None:
        expected = expected * np.asarray(probe.gemm_scale, np.float32).reshape(1, -1)
    difference = np.abs(np.asarray(probe.gemm, np.float64) - expected)
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0))


def _output_error(
    layer: QuantizedLinear, probe: LinearProbe, oracle: ActivationOracle, image: Array, total: Array
) -> float:
    if probe.output is None:
        return math.nan
    value = to_value(layer, "weight") * to_value(layer, "activation") * oracle.scale
    if not probe.exact:  # float sums over real scales per group, or of formats too wide for integers
        weight = layer.dequantized()
        unit = to_value(layer, "activation") * oracle.scale
        product, magnitude = image @ weight.T * unit, np.abs(image) @ np.abs(weight).T * unit
        roundings = OUTPUT_ROUNDINGS + layer.in_features + probe.half_roundings * HALF_ROUNDING / ROUNDING
    else:
        product = total * value * layer.scales[:, 0].astype(np.float64)
        magnitude, roundings = np.abs(product), OUTPUT_ROUNDINGS
    bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    bound = roundings * ROUNDING * FIRST_ORDER * (magnitude + np.abs(bias))
    return _largest(probe.output - (product + bias), bound)


def to_value(layer: QuantizedLinear, operand: str) -> float:
    """What one unit of an operand's integer image is worth: 2^-f of its format; operand "weight" or "activation"."""
    return 2.0 ** -get_format(getattr(layer, f"{operand}_format")).fraction_bits


def _largest(difference: Array, bound: Array) -> float:
    """Largest |difference| / bound; inf where the difference is not finite, 0 where both are zero."""
    difference, bound = np.abs(np.nan_to_num(difference, nan=np.inf)), np.broadcast_to(bound, np.shape(difference))
    ratio = np.divide(difference, bound, out=np.where(difference > 0, np.inf, 0.0), where=bound > 0)
    return float(ratio.max(initial=0))
