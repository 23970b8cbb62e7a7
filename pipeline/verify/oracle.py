"""Arithmetic of the parity gates: the oracle of one quantized linear, and error measures.

Plain NumPy in float64 and exact integers; what an engine computed comes in as arrays. Every tolerance is counted in
float32 roundings, with the count beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, reduce

import numpy as np
from numpy.typing import NDArray

from export.checkpoint import QuantizedLinear
from export.dialect.reference import ABSMAX_FLOOR
from export.formats.format import Format, encode, get_format, to_integers
from export.formats.operands import HALF_ROUNDING, ROUNDING, float32_sums
from pipeline.distance import Array

# Float32 operations between x and the number that is rounded to the grid, in the longest form a lowering may use:
# scale = absmax / max_value, inverse = 1 / scale, x * inverse, and one rescaling that is not a power of two.
QUOTIENT_ROUNDINGS = 4
# The same for the token scale: absmax / max_value, and one rescaling.
SCALE_ROUNDINGS = 2
# After the integer sum: conversion to float32, times the channel scale, times the token scale (itself SCALE_ROUNDINGS
# off), plus bias. Where scaled operands are multiplied instead, K products and their sum round K times, and besides:
# both operands (a zero point rounds the activation's once more, but then no token scale does), and plus bias.
OUTPUT_ROUNDINGS = 4 + SCALE_ROUNDINGS
# Numbers of which a block of rows consists: of a dozen float64 arrays of that size each stays in a cache.
BLOCK_NUMBERS = 2**17
# Second-order terms of that first-order count are below 2^-40; one per mille covers them.
FIRST_ORDER = 1.001


@dataclass(frozen=True)
class ActivationOracle:
    """What a layer's quantizer gives for x [M, K], and what float32 roundings may turn it into.

    integers: integers of the nearest code, [M, K]. lowest, highest: integers of the codes at both ends of the
    interval that contains the float32 quotient; they differ only where the quotient lies within QUOTIENT_ROUNDINGS (and
    those of a balanced input) of a midpoint. scale: [M, 1] or [M, groups] float64. scale_slack: relative error that a
    balanced input adds to it, same shape.
    """

    integers: NDArray[np.integer]
    lowest: NDArray[np.integer]
    highest: NDArray[np.integer]
    scale: NDArray[np.float64]
    scale_slack: NDArray[np.float64]

    @property
    def ambiguous(self) -> int:
        """How many codes may differ from the nearest one."""
        return int(np.count_nonzero(self.lowest != self.highest))

    def inadmissible(self, integers: Array) -> int:
        """How many of an engine's integers [M, K] no rounding explains."""
        outside = (integers < self.lowest) | (integers > self.highest) | ~np.isfinite(integers)
        return int(np.count_nonzero(outside))

    def of_rows(self, rows: slice) -> ActivationOracle:
        """The oracle of some of the tokens."""
        return ActivationOracle(*(getattr(self, field.name)[rows] for field in fields(self)))


def activation_oracle(x: Array, layer: QuantizedLinear) -> ActivationOracle:
    """Codes that `layer` gives for its input x [M, K] (finite), in float64: balanced, then by its scaling."""
    fmt, groups = get_format(layer.activation_format), layer.activation_groups
    balanced, error = _balanced(np.asarray(x, np.float64), layer)
    if layer.activation_scale is not None:
        rows = balanced - (0.0 if layer.activation_zero is None else float(layer.activation_zero[0]))
        scale = np.full((len(x), 1), layer.activation_scale[0], np.float64)
        slack = np.zeros_like(scale)
    else:
        rows = balanced.reshape(len(x) * groups, -1)
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), ABSMAX_FLOOR) / fmt.max_value
        slack = np.zeros_like(scale)
        if error is not None:
            error = error.reshape(rows.shape)
            slack = error.max(axis=1, keepdims=True) / (scale * fmt.max_value)
            error = error + slack * np.abs(rows)
    integers, lowest, highest = (array.reshape(x.shape) for array in code_intervals(fmt, rows, scale, error))
    by_group = (scale.reshape(len(x), groups), slack.reshape(len(x), groups))
    return ActivationOracle(integers, lowest, highest, *by_group)


def _balanced(x: Array, layer: QuantizedLinear) -> tuple[Array, Array | None]:
    """(x * input_multiplier + input_offset, bound on what two float32 operations change, None without either)."""
    if layer.input_multiplier is None and layer.input_offset is None:
        return x, None
    product = x if layer.input_multiplier is None else x * layer.input_multiplier.astype(np.float64)
    balanced = product if layer.input_offset is None else product + layer.input_offset.astype(np.float64)
    return balanced, ROUNDING * FIRST_ORDER * (np.abs(product) + np.abs(balanced))


def code_intervals(fmt: Format, x: Array, scale: Array, error: Array | None) -> Iterator[NDArray[np.integer]]:
    """Integers of the nearest codes of x / scale [M, K], and of the lowest and highest that float32 may make of them.

    error: by how much x may be off beforehand, or None.
    """
    blocks = (
        _block_rounded(fmt, x[rows], scale[rows], None if error is None else error[rows])
        for rows in row_blocks(*x.shape)
    )
    return map(np.concatenate, zip(*blocks, strict=True))


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices of the rows of [rows, columns] whose arrays stay in the processor's caches: at least one."""
    count = max(1, BLOCK_NUMBERS // max(1, columns))
    return [slice(first, first + count) for first in range(0, max(1, rows), count)]


def _block_rounded(fmt: Format, x: Array, scale: Array, error: Array | None) -> tuple[NDArray[np.integer], ...]:
    quotient = x / scale
    slack = QUOTIENT_ROUNDINGS * ROUNDING * np.abs(quotient)
    if error is not None:
        slack += error / scale
    integers, midpoints = _grid(fmt)
    bounds = np.concatenate([[-np.inf], midpoints, [np.inf]])
    place = _places(fmt, quotient)
    close = (quotient - bounds[place] <= slack) | (bounds[place + 1] - quotient <= slack)
    nearest = integers[place]
    lowest, highest = nearest.copy(), nearest.copy()
    lowest[close] = integers[np.searchsorted(midpoints, (quotient - slack)[close])]
    highest[close] = integers[np.searchsorted(midpoints, (quotient + slack)[close])]
    nearest[close] = to_integers(fmt, encode(fmt, quotient[close]))  # ties to even
    return nearest, lowest, highest


# Lower bits of a float64 that do not say between which midpoints of a format it lies.
PLACE_SHIFT = 44


@cache
def _place_table(fmt: Format) -> NDArray[np.uint16]:
    """Upper 20 bits of a float64 -> how many midpoints lie at or below it (below it, of negative numbers).

    These bits hold sign, exponent and 8 bits of the significand. A midpoint of a format of 8 bits has no more, so all
    numbers with the same upper bits lie between the same two midpoints, or on the one with zeros for lower bits.
    """
    _, midpoints = _grid(fmt)
    assert np.array_equal(midpoints.view(np.int64) & (2**PLACE_SHIFT - 1), np.zeros(len(midpoints), np.int64))
    first = (np.arange(2 ** (64 - PLACE_SHIFT), dtype=np.uint64) << np.uint64(PLACE_SHIFT)).view(np.float64)
    places = np.where(np.signbit(first), *(np.searchsorted(midpoints, first, side) for side in ("left", "right")))
    return places.astype(np.uint16)


def _places(fmt: Format, x: Array) -> NDArray[np.uint16]:
    """Between which midpoints each number lies; of a number on a midpoint, on either side of it."""
    return _place_table(fmt)[np.ascontiguousarray(x, np.float64).view(np.uint64) >> np.uint64(PLACE_SHIFT)]


@cache
def _grid(fmt: Format) -> tuple[NDArray[np.integer], NDArray[np.float64]]:
    """Integers in ascending order, and the midpoints between neighbours, of the values a symmetric quantizer uses."""
    usable = np.isfinite(fmt.values) & (np.abs(fmt.values) <= fmt.max_value)
    values = np.unique(fmt.values[usable])
    integer = np.int32 if fmt.kmax <= np.iinfo(np.int32).max else np.int64
    return np.ldexp(values, fmt.fraction_bits).astype(integer), (values[1:] + values[:-1]) / 2


@dataclass(frozen=True)
class LinearProbe:
    """What an engine computed for one linear on M tokens.

    x: [M, K]. integers: integers of its activation codes, [M, K] float64. act_scale: [M, 1] or [M, groups], None
    where it is a constant of the GEMM. gemm: [M, N], or [M, groups of sums, N]. output, low_rank: [M, N], the
    latter None without a branch. timesteps: [M], which each token's sample had, or None. The other fields are those of
    the ProbeRow, gemm_scale as array [N] or None. operand, weight_operand: the GEMM's own, float32 [M, K] and [K, N],
    where it multiplies values that are scaled already, or None.
    """

    x: Array
    integers: Array
    act_scale: Array | None
    gemm: Array
    output: Array
    gemm_unit: float = 1.0
    gemm_scale: Array | None = None
    exact: bool = True
    half_roundings: int = 0
    low_rank: Array | None = None
    timesteps: Array | None = None
    operand: Array | None = None
    weight_operand: Array | None = None

    def of_rows(self, rows: slice) -> LinearProbe:
        """The probe of some of its tokens."""
        return _by_token([self], lambda arrays: arrays[0][rows])


# Fields of a LinearProbe that have a row for each token.
BY_TOKEN = ("x", "integers", "act_scale", "gemm", "output", "low_rank", "timesteps", "operand")


def joined(probes: Sequence[LinearProbe]) -> LinearProbe:
    """The probes of one linear in several calls as one, rows after rows."""
    return _by_token(probes, np.concatenate)


def _by_token(probes: Sequence[LinearProbe], combined: Callable[[list[Array]], Array]) -> LinearProbe:
    """One probe whose arrays with a row for each token are `combined`; the rest is the same in every call."""
    kept = [key for key in BY_TOKEN if getattr(probes[0], key) is not None]
    arrays = {key: combined([getattr(probe, key) for probe in probes]) for key in kept}
    return LinearProbe(**{**vars(probes[0]), **arrays})


@dataclass(frozen=True)
class LinearCheck:
    """Findings about one linear.

    gemm_max_abs_diff: against the exact integer sum of the engine's own codes (nan where the path is not an integer
    embedding). operand_max_abs_diff: of the GEMM's own float32 operands against codes times scales, rounded as the
    dialect says (nan where it multiplies codes). scale_error, output_error: largest difference over the bound that
    float32 roundings allow, so at most 1; output_error covers the low-rank branch, too.
    """

    codes: int
    codes_different: int
    codes_ambiguous: int
    codes_inadmissible: int
    gemm_max_abs_diff: float
    scale_error: float
    output_error: float
    nonfinite: int
    operand_max_abs_diff: float = math.nan


def check_quantizer(layer: QuantizedLinear, x: Array, integers: Array, act_scale: Array | None) -> tuple[int, float]:
    """(codes that no rounding explains, error of the scale over its bound) of a layer's quantizer on x [M, K]."""
    oracle = activation_oracle(x, layer)
    return oracle.inadmissible(integers), _scale_error(act_scale, oracle)


class LinearWeight:
    """The weight of one layer in the forms that its check multiplies, each made when it is first asked for."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self._layer = layer
        self._factors: dict[tuple[type[np.floating], bool], Array] = {}

    @cached_property
    def integers(self) -> NDArray[np.integer]:
        """[N, K]: of the codes, with group multipliers folded in."""
        return self._layer.integers()

    @cached_property
    def dequantized(self) -> NDArray[np.float64]:
        """[N, K]; large, and not needed where sums are exact."""
        return self._layer.dequantized()

    @cached_property
    def magnitudes(self) -> NDArray[np.float64]:
        """[N, K]: of the dequantized weight."""
        return np.abs(self.dequantized)

    @cached_property
    def largest_sum(self) -> float:
        """The largest sum of the magnitudes of one output channel's integers."""
        return float(np.abs(self.integers).sum(axis=1, dtype=np.int64).max(initial=0))

    def factor(self, dtype: type[np.floating], magnitudes: bool) -> Array:
        """[K, N]: the integers, or their magnitudes, in a float type."""
        key = (dtype, magnitudes)
        if key not in self._factors:
            self._factors[key] = (np.abs(self.integers) if magnitudes else self.integers).T.astype(dtype)
        return self._factors[key]


def check_linear(layer: QuantizedLinear, probe: LinearProbe, oracle: ActivationOracle) -> LinearCheck:
    """Compare one linear of an engine with the oracle; `oracle` is activation_oracle(probe.x, layer)."""
    weight, integers = LinearWeight(layer), probe.integers
    if not np.isfinite(integers).all():
        integers = np.nan_to_num(integers, nan=0.0, posinf=0.0, neginf=0.0)
    products: tuple[Array, ...]
    if probe.exact:
        products = (exact_sums(integers, weight, probe.gemm.shape[1] if probe.gemm.ndim == 3 else 1),)
    else:
        products = _float_products(layer, weight, probe, oracle, integers)
    parts = []
    for rows in row_blocks(len(probe.x), max(probe.x.shape[1], layer.out_features)):
        of_rows = [product[rows] for product in products]
        parts.append(_check_rows(layer, weight, probe.of_rows(rows), oracle.of_rows(rows), integers[rows], of_rows))
    of_all_rows = _joined(parts)
    if probe.weight_operand is None:
        return of_all_rows
    expected = weight.dequantized.astype(np.float32).T
    same = np.array_equal(probe.weight_operand, expected)
    of_weight = 0.0 if same else _largest_difference(probe.weight_operand, expected)
    return replace(
        of_all_rows,
        operand_max_abs_diff=max(of_all_rows.operand_max_abs_diff, of_weight),
        nonfinite=of_all_rows.nonfinite + _nonfinite(probe.weight_operand),
    )


def _check_rows(
    layer: QuantizedLinear,
    weight: LinearWeight,
    probe: LinearProbe,
    oracle: ActivationOracle,
    integers: Array,
    products: Sequence[Array],
) -> LinearCheck:
    """integers: that of the probe, finite. products: the exact sums, or the two results of `_float_products`."""
    produced = (probe.x, probe.gemm, probe.act_scale, probe.output, probe.low_rank, probe.operand)
    errors = (_output_error(layer, weight, probe, oracle, products), _low_rank_error(layer, probe))
    return LinearCheck(
        codes=integers.size,
        codes_different=int(np.count_nonzero(probe.integers != oracle.integers)),
        codes_ambiguous=oracle.ambiguous,
        codes_inadmissible=oracle.inadmissible(probe.integers),
        gemm_max_abs_diff=_gemm_difference(probe, products[0]),
        scale_error=_scale_error(probe.act_scale, oracle),
        output_error=math.nan if math.isnan(errors[0]) else max(errors),
        nonfinite=sum(_nonfinite(tensor) for tensor in produced if tensor is not None),
        operand_max_abs_diff=_operand_difference(layer, probe, integers),
    )


def _joined(parts: Sequence[LinearCheck]) -> LinearCheck:
    """Findings about all rows from those about some each: counts are added, of errors the largest stands (nan is)."""

    def largest(errors: Iterable[float]) -> float:
        return float(np.max(list(errors)))

    return LinearCheck(
        codes=sum(part.codes for part in parts),
        codes_different=sum(part.codes_different for part in parts),
        codes_ambiguous=sum(part.codes_ambiguous for part in parts),
        codes_inadmissible=sum(part.codes_inadmissible for part in parts),
        gemm_max_abs_diff=largest(part.gemm_max_abs_diff for part in parts),
        scale_error=largest(part.scale_error for part in parts),
        output_error=largest(part.output_error for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
        operand_max_abs_diff=largest(part.operand_max_abs_diff for part in parts),
    )


def exact_sums(integers: Array, weight: LinearWeight, groups: int = 1, magnitudes: bool = False) -> NDArray[np.float64]:
    """integers [M, K] @ weight[N, K].T without rounding: [M, N], or the sums of `groups` parts of K, [M, groups, N].

    Floats of p bits add integers exactly, in any order, while the sum of the magnitudes stays below 2^p: float32 for as
    many of K at a time as have it so (twice as fast), float64 where that are too few, and for what the parts add up to.
    magnitudes: of both factors. Raises ValueError where float64 is too short.
    """
    largest = _largest_sum(integers, weight)
    if largest >= 2.0**53:
        raise ValueError(f"sums up to {largest:.3g} are not exact in float64")
    cuts = [slice(None)] if largest < 2.0**24 else None
    if cuts is None and groups == 1:
        cuts = float32_sums(weight.integers, float(np.abs(integers).max(initial=0)))
    factor = weight.factor(np.float64 if cuts is None else np.float32, magnitudes)
    left = integers.astype(factor.dtype)
    left = np.abs(left, out=left) if magnitudes else left
    if groups == 1:
        return reduce(np.add, ((left[:, cut] @ factor[cut]).astype(np.float64) for cut in cuts or [slice(None)]))
    parts = zip(np.split(left, groups, axis=1), np.split(factor, groups, axis=0), strict=True)
    return np.stack([a @ w for a, w in parts], axis=1).astype(np.float64)


def _largest_sum(integers: Array, weight: LinearWeight) -> float:
    return float(np.abs(integers).max(initial=0)) * weight.largest_sum


def _gemm_difference(probe: LinearProbe, total: Array) -> float:
    if not probe.exact:
        return math.nan
    expected = (total * probe.gemm_unit).astype(np.float32)
    if probe.gemm_scale is not None:
        expected = expected * np.asarray(probe.gemm_scale, np.float32).reshape(1, -1)
    return _largest_difference(probe.gemm, expected)


def _operand_difference(layer: QuantizedLinear, probe: LinearProbe, integers: Array) -> float:
    """Largest difference of the GEMM's activation operand from the engine's own codes and scales, to the bit.

    value(code) * scale is exact in float64 (8 bits times 24), so its float32 is the one rounding that the graph makes;
    a zero point is added in float32, which rounds once more, as in the graph.
    """
    if probe.operand is None:
        return math.nan
    scale = layer.activation_scale if probe.act_scale is None else probe.act_scale
    assert scale is not None, f"{layer.name}: neither a scale per token nor a static one"
    spread = np.repeat(
        np.atleast_2d(np.asarray(scale, np.float64)), layer.activation_group or integers.shape[1], axis=1
    )
    value = (integers * unit_of(layer.activation_format) * spread).astype(np.float32)
    if layer.activation_zero is not None:
        value = value + layer.activation_zero.astype(np.float32)
    return _largest_difference(probe.operand, value)


def _scale_error(act_scale: Array | None, oracle: ActivationOracle) -> float:
    """0 for a static scale: it is a constant that codes and output prove."""
    if act_scale is None:
        return 0.0
    relative = SCALE_ROUNDINGS * ROUNDING * FIRST_ORDER + oracle.scale_slack
    return _largest(act_scale - oracle.scale, oracle.scale * relative)


def _output_error(
    layer: QuantizedLinear,
    weight: LinearWeight,
    probe: LinearProbe,
    oracle: ActivationOracle,
    products: Sequence[Array],
) -> float:
    """The output, less what the engine's own low-rank branch gave, against product and bias.

    A zero point counts as a part of the bias, as which it is rounded once; the sum with the branch rounds once more.
    """
    if probe.exact:
        product, magnitude, roundings = _scaled_sums(layer, oracle, products[0])
    else:
        product, magnitude = products
        roundings = OUTPUT_ROUNDINGS + layer.in_features + probe.half_roundings * HALF_ROUNDING / ROUNDING
    bias: Array | float = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    if layer.activation_zero is not None:
        bias = bias + float(layer.activation_zero[0]) * weight.dequantized.sum(axis=1)
    slack = np.max(oracle.scale_slack, axis=-1, keepdims=True)
    bound = roundings * ROUNDING * FIRST_ORDER * (magnitude + np.abs(bias)) + FIRST_ORDER * slack * magnitude
    output = np.asarray(probe.output, np.float64)
    if probe.low_rank is not None:
        bound, output = bound + ROUNDING * FIRST_ORDER * np.abs(output), output - probe.low_rank
    return _largest(output - (product + bias), bound)


def _float_products(
    layer: QuantizedLinear, weight: LinearWeight, probe: LinearProbe, oracle: ActivationOracle, integers: Array
) -> tuple[Array, Array]:
    """(product [M, N] in float64, sum of the magnitudes that float32 rounds) of float sums: over real scales per group,
    of formats too wide for integers, of scaled operands."""
    unit = unit_of(layer.activation_format) * oracle.scale
    if unit.shape[1] == layer.scales.shape[1] == 1 and _largest_sum(integers, weight) < 2.0**53:
        per_channel = layer.scales[:, 0].astype(np.float64) * unit_of(layer.weight_format)
        product, magnitude = (exact_sums(integers, weight, magnitudes=of) * unit * per_channel for of in (False, True))
    else:
        spread = np.repeat(unit, integers.shape[1] // unit.shape[1], axis=1) if unit.shape[1] > 1 else unit
        value = integers * spread
        product, magnitude = value @ weight.dequantized.T, np.abs(value) @ weight.magnitudes.T
    if probe.operand is not None and layer.activation_zero is not None:  # each product has its share of the zero
        magnitude = magnitude + np.abs(layer.activation_zero[0]) * weight.magnitudes.sum(axis=1)
    return product, magnitude


def _scaled_sums(layer: QuantizedLinear, oracle: ActivationOracle, total: Array) -> tuple[Array, Array, float]:
    """(product [M, N], sum of the magnitudes that were rounded, how often float32 rounds) of exact integer sums."""
    unit = unit_of(layer.activation_format) * oracle.scale
    if total.ndim == 2:
        product = total * (unit_of(layer.weight_format) * unit) * layer.scales[:, 0].astype(np.float64)
        return product, np.abs(product), OUTPUT_ROUNDINGS
    sums = total.shape[1]
    of_token = np.repeat(unit, sums // unit.shape[1], axis=1)
    of_channel = np.repeat(layer.scales.astype(np.float64), sums // layer.scales.shape[1], axis=1)
    parts = total * of_token[..., None] * (of_channel.T * unit_of(layer.weight_format))
    return parts.sum(axis=1), np.abs(parts).sum(axis=1), OUTPUT_ROUNDINGS + sums


def _low_rank_error(layer: QuantizedLinear, probe: LinearProbe) -> float:
    """The branch of each token's timestep against float64; 0 without branches, inf where the engine has none of them.

    Two float32 sums in a row, of K and of R products, are off by at most (K + R) roundings of the sum of all
    magnitudes. Tokens whose timestep float32 may route either way are left out.
    """
    if layer.lora_down is None or layer.lora_up is None:
        return 0.0 if probe.low_rank is None else math.inf
    if probe.low_rank is None:
        return math.inf
    if layer.router is None:
        chosen, decided = np.zeros(len(probe.x), np.int64), np.ones(len(probe.x), bool)
    elif probe.timesteps is None:
        return math.inf
    else:
        chosen, decided = layer.router.choose(probe.timesteps), ~layer.router.undecided(probe.timesteps)
    worst = 0.0
    for h in np.unique(chosen):
        rows = (chosen == h) & decided
        x, branch = np.asarray(probe.x[rows], np.float64), np.asarray(probe.low_rank[rows], np.float64)
        down, up = layer.lora_down[h].astype(np.float64), layer.lora_up[h].astype(np.float64)
        roundings = (layer.in_features + len(down)) * ROUNDING * FIRST_ORDER
        bound = roundings * (np.abs(x) @ np.abs(down).T @ np.abs(up).T)
        worst = max(worst, _largest(branch - x @ down.T @ up.T, bound))
    return worst


def unit_of(format_name: str) -> float:
    """What one unit of a format's integers is worth."""
    return 2.0 ** -get_format(format_name).fraction_bits


def _nonfinite(tensor: Array) -> int:
    return int(np.count_nonzero(~np.isfinite(tensor)))


def _largest_difference(tensor: Array, expected: Array) -> float:
    """Without a bound, of what must be equal; inf where the tensor is nan."""
    difference = np.abs(np.asarray(tensor, np.float64) - expected)
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0))


def _largest(difference: Array, bound: Array) -> float:
    """Largest |difference| / bound; inf where the difference is not finite, 0 where both are zero."""
    return float(ratio(np.abs(np.nan_to_num(difference, nan=np.inf)), bound).max(initial=0))


def ratio(value: Array, limit: Array) -> Array:
    """value / limit, of numbers that are not negative; 0 where both are zero, inf where only the limit is."""
    return np.divide(value, limit, out=np.where(value > 0, np.inf, 0.0), where=limit > 0)
