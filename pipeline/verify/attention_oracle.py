"""The oracle of one 8-bit attention: what its definition gives for an engine's own q, k, v and mask, and how far
float32 roundings may carry a right engine from it.

    k_centred = k - mean of k over the tokens, for each channel; the mean in float64, then a float32
    q, k      codes, one scale for each token; v: codes, one scale for each channel
    score     = sum of the codes' products * q_scale * scale * k_scale + mask
    p         = round(255 * exp(score - the row's largest score)), an integer
    out       = sum_j p_j v_j / sum_j p_j

Plain NumPy in float64 and exact integers. Everything between input and output is an interval: a code that float32 may
round to either neighbour, the scores that such codes make possible, the integers p that these scores make possible.
The bound of an output follows from it without another assumption: with p', v' any numbers in their intervals,

    out' - out = sum_j p'_j (v'_j - out) / sum_j p'_j
    |out' - out| <= (sum_j |p'_j - p_j| |v_j - out| + sum_j p'_j |v'_j - v_j|) / sum_j p'_j,

for the p_j take nothing off each other: sum_j p_j (v_j - out) is zero. What rounds behind that is counted.

A flipped code is rare and large: where no number of a row lies near a midpoint, which is so for most rows of some
hundred keys, the bound is a few roundings of the output, and a single code off by one is a thousand times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.dialect.reference import ABSMAX_FLOOR
from export.formats.attention import WEIGHT_MAX
from export.formats.format import Format, get_format
from export.formats.operands import ROUNDING
from pipeline.distance import Array
from pipeline.verify.oracle import FIRST_ORDER, SCALE_ROUNDINGS, code_intervals, ratio, row_blocks

Floats = NDArray[np.float64]
# The mean of a channel over n tokens in float64: n - 1 additions in any order, each off by up to 2^-53 of what is added
# up so far, and the division or a product with a rounded 1 / n: together less than n + 2 such parts of the mean
# magnitude. It becomes a float32.
DOUBLE_ROUNDING = 2.0**-53
# From the sum of products, which is exact, to the score without the mask: both scales, the attention's factor as
# float32, and three products. The mask's addition is counted apart: it rounds by the size of the masked score.
SCORE_ROUNDINGS = 2 * SCALE_ROUNDINGS + 1 + 3
# An exponential within three units in the last place, each up to two roundings, times 255. The difference before it
# rounds by its own size, which is counted apart.
EXP_ROUNDINGS = 3 * 2 + 1
# Both sums become float32; the scale of v, the product with it, and a division or a product with a reciprocal.
OUTPUT_ROUNDINGS = 2 + SCALE_ROUNDINGS + 1 + 2
# What a runtime that flushes denormal numbers may lose of a score or an output.
SMALLEST = 2.0**-126
# Below this an exponential times 255 is 0 in any arithmetic; -inf of a mask is taken for it.
LOWEST_EXPONENT = -1e4
# Float32 adds integers below this exactly in any order.
EXACT_IN_FLOAT = 2.0**24


@dataclass(frozen=True)
class AttentionNumbers:
    """How one attention is quantized. qk_format, pv_format: names of number formats. scale: of the scores."""

    qk_format: str
    pv_format: str
    scale: float


@dataclass(frozen=True)
class AttentionProbe:
    """What an engine computed for one attention in one call, all float32.

    q, output: [B, H, Tq, D]. k, v: [B, H, Tk, D]. mask: broadcasts to [B, H, Tq, Tk]; -inf takes a key away.
    """

    q: Array
    k: Array
    v: Array
    mask: Array
    output: Array


@dataclass(frozen=True)
class AttentionCheck:
    """Findings about one attention in one call.

    output_error: largest |engine - oracle| over its bound, so at most 1; inf where the engine is not finite. worst: of
    that output (sample, head, query, channel). errors: the largest of each sample and head, [B, H]. nonfinite: numbers
    of q, k, v and output that are not finite, and of the mask NaN and +inf. rows: how many queries were judged, of
    rows_of. ambiguous: share of the judged integers p that roundings may change.
    """

    output_error: float
    worst: tuple[int, int, int, int]
    errors: Floats
    nonfinite: int
    rows: int
    rows_of: int
    ambiguous: float


@dataclass(frozen=True)
class CodeIntervals:
    """Integers of the codes of [rows, K], how far float32 may move each, the scale [rows] of one unit of value, and the
    relative error of the scale beyond its own roundings."""

    integers: Floats
    reach: Floats
    scale: Floats
    slack: Floats


def check_attention(probe: AttentionProbe, numbers: AttentionNumbers, most_scores: int | None = None) -> AttentionCheck:
    """Compare an engine's output with the oracle of its own inputs, head by head.

    most_scores: how many scores may be computed; of a longer attention every head is looked at, but not every query.
    """
    samples, heads, queries, _ = probe.q.shape
    keys = probe.k.shape[2]
    mask = np.broadcast_to(probe.mask, (samples, heads, queries, keys))
    scores = samples * heads * queries * keys
    stride = 1 if most_scores is None else max(1, math.ceil(scores / most_scores))
    place, ambiguous, rows = (0, 0, 0, 0), 0, 0
    largest = np.zeros((samples, heads))
    for sample, head in np.ndindex(samples, heads):
        chosen = np.arange((sample * heads + head) % min(stride, queries), queries, stride)
        head_oracle = HeadOracle(probe.k[sample, head], probe.v[sample, head], numbers)
        for part in row_blocks(len(chosen), keys):
            some = chosen[part]
            expected, bound, changeable = head_oracle.outputs(probe.q[sample, head][some], mask[sample, head][some])
            errors = _errors(probe.output[sample, head][some], expected, bound)
            ambiguous, rows = ambiguous + changeable, rows + len(some)
            row, channel = np.unravel_index(int(errors.argmax()), errors.shape)
            if errors[row, channel] > largest.max():
                place = (sample, head, int(some[row]), int(channel))
            largest[sample, head] = max(largest[sample, head], errors[row, channel])
    return AttentionCheck(
        output_error=float(largest.max(initial=0)),
        worst=place,
        errors=largest,
        nonfinite=_nonfinite(probe),
        rows=rows,
        rows_of=samples * heads * queries,
        ambiguous=ambiguous / max(1, rows * keys),
    )


def _errors(output: Array, expected: Floats, bound: Floats) -> Floats:
    """|output - expected| / bound; where NaN is expected 0 for NaN, else inf."""
    difference = np.abs(np.nan_to_num(output - expected, nan=np.inf))
    errors = ratio(difference, np.nan_to_num(bound, nan=0.0))
    undefined = np.isnan(expected)
    errors[undefined] = np.where(np.isnan(output[undefined]), 0.0, np.inf)
    return np.asarray(errors, np.float64)


def _nonfinite(probe: AttentionProbe) -> int:
    """Rows all of whose keys are masked away have no weights, and NaN is right there."""
    gone = np.isneginf(probe.mask).reshape((1,) * (4 - probe.mask.ndim) + probe.mask.shape).all(axis=-1)
    undefined = np.broadcast_to(gone, probe.output.shape[:-1])
    output = np.count_nonzero(~np.isfinite(probe.output[~undefined]))
    inputs = sum(np.count_nonzero(~np.isfinite(tensor)) for tensor in (probe.q, probe.k, probe.v))
    return int(output + inputs + np.count_nonzero(np.isnan(probe.mask) | np.isposinf(probe.mask)))


class HeadOracle:
    """One head of one sample: its keys and values, whose codes all queries share."""

    def __init__(self, k: Array, v: Array, numbers: AttentionNumbers) -> None:
        """k, v: [Tk, D]."""
        self._numbers = numbers
        self._format, self._value_format = get_format(numbers.qk_format), get_format(numbers.pv_format)
        self._keys = token_codes(self._format, *centred(np.nan_to_num(k)))
        values = token_codes(self._value_format, np.nan_to_num(np.asarray(v, np.float64)).T)
        self._values, self._value_reach, self._value_scale = values.integers.T, values.reach.T, values.scale
        self._moving_keys = np.flatnonzero(self._keys.reach.any(axis=1))

    def outputs(self, q: Array, mask: Array) -> tuple[Floats, Floats, int]:
        """(output [R, D], bound [R, D], how many integers p roundings may change) for q [R, D] and mask [R, Tk]."""
        score, reach = self._scores(token_codes(self._format, np.nan_to_num(np.asarray(q, np.float64))), mask)
        undefined = np.asarray(np.isneginf(score).all(axis=1))
        score[undefined] = 0
        p, change = _weights(score, reach)
        return *self._mixed(p, change, undefined), int(np.count_nonzero(change))

    def _scores(self, queries: CodeIntervals, mask: Array) -> tuple[Floats, Floats]:
        """Masked scores [R, Tk], and how far a float32 score may be from each."""
        keys, format_unit = self._keys, 2.0**-self._format.fraction_bits
        of_query = queries.scale[:, None] * (format_unit**2 * self._numbers.scale)
        largest = float(self._format.kmax) ** 2 * keys.integers.shape[1]
        score = _exact_product(queries.integers, keys.integers.T, largest) * of_query * keys.scale
        reach = np.abs(score) * (SCORE_ROUNDINGS * ROUNDING * FIRST_ORDER + keys.slack)
        if len(self._moving_keys):
            chosen, magnitudes = self._moving_keys, np.abs(queries.integers)
            moved = magnitudes @ keys.reach[chosen].T
            reach[:, chosen] += FIRST_ORDER * moved * np.abs(of_query) * (keys.scale * (1 + keys.slack))[chosen]
        moving = np.flatnonzero(queries.reach.any(axis=1))
        if len(moving):
            moved = queries.reach[moving] @ (np.abs(keys.integers) + keys.reach).T
            reach[moving] += FIRST_ORDER * moved * np.abs(of_query[moving]) * (keys.scale * (1 + keys.slack))
        score = score + mask
        gone = np.isneginf(score)
        reach = reach + ROUNDING * FIRST_ORDER * (np.abs(score) + reach) + SMALLEST
        if gone.any():
            reach[gone] = 0
        return score, reach

    def _mixed(self, p: Floats, change: Floats, undefined: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """Outputs and bounds [R, D] of the integers p [R, Tk] and what each may change by."""
        values = self._values
        largest = WEIGHT_MAX * float(np.abs(values).sum(axis=0).max(initial=0))
        # Of the key with the largest score p is WEIGHT_MAX, so that no sum is less.
        total = np.maximum(p.sum(axis=1, keepdims=True), WEIGHT_MAX)
        least = np.maximum(np.maximum(p - change, 0).sum(axis=1, keepdims=True), WEIGHT_MAX)
        most = np.minimum(p + change, WEIGHT_MAX)
        mixed = _exact_product(p, values, largest) / total
        bound = np.zeros_like(mixed)
        rows = np.flatnonzero(change.any(axis=1))
        if len(rows):
            bound[rows] = _moved(change[rows], values, mixed[rows])
        if self._value_reach.any():
            bound += most @ self._value_reach
        bound /= least
        bound += OUTPUT_ROUNDINGS * ROUNDING * (np.abs(mixed) + bound)
        unit = self._value_scale * 2.0**-self._value_format.fraction_bits
        mixed[undefined] = np.nan
        return mixed * unit, FIRST_ORDER * bound * unit + SMALLEST


def centred(k: Array) -> tuple[Floats, Floats]:
    """k [Tk, D] less the mean of its channels, and by how much float32 may be off, both [Tk, D]."""
    rows = np.asarray(k, np.float64)
    mean = rows.mean(axis=0)
    # Twice: the mean here is of float64, too.
    added = 2 * (len(rows) + 2) * DOUBLE_ROUNDING * np.abs(rows).mean(axis=0)
    difference = rows - mean
    return difference, FIRST_ORDER * (added + ROUNDING * (np.abs(mean) + np.abs(difference))) + SMALLEST


def token_codes(fmt: Format, rows: Floats, error: Floats | None = None) -> CodeIntervals:
    """Codes of rows [M, K] with a scale for each row. error: by how much each number may be off beforehand.

    A scale that is off by a part `slack` moves a quotient by slack / (1 - slack) of itself. From a half on (all tokens
    are equal, and what is left of them is the mean's rounding) nothing is known of the codes of a row.
    """
    absmax = np.maximum(np.abs(rows).max(axis=1), ABSMAX_FLOOR)
    slack = np.zeros(len(rows))
    moved = None
    if error is not None:
        slack = error.max(axis=1) / absmax
        known = np.minimum(slack, 0.5)[:, None]
        moved = np.where(slack[:, None] < 0.5, (error + known * np.abs(rows)) / (1 - known), np.inf)
    scale = absmax / fmt.max_value
    nearest, lowest, highest = code_intervals(fmt, rows, scale[:, None], moved)
    reach = np.maximum(highest - nearest, nearest - lowest)
    return CodeIntervals(nearest.astype(np.float64), reach.astype(np.float64), scale, slack)


def _weights(score: Floats, reach: Floats) -> tuple[Floats, Floats]:
    """Integers p [R, Tk] of masked scores, and by how much each may differ where a score is off by up to `reach`.

    With x the score less the row's largest, itself anywhere between the largest of all lower and of all upper ends:
    exp(x + d) lies between exp(x) (1 - d) and exp(x) (1 + d + d^2), the latter for d up to 1.
    """
    largest = score.max(axis=1, keepdims=True)
    below = score - largest
    x = np.maximum(below, LOWEST_EXPONENT)
    up = reach + (largest - (score - reach).max(axis=1, keepdims=True))
    down = reach + ((score + reach).max(axis=1, keepdims=True) - largest)
    rounding = (EXP_ROUNDINGS - x + down) * (ROUNDING * FIRST_ORDER)
    up += rounding
    down += rounding
    exponential = WEIGHT_MAX * np.exp(x)
    p = np.rint(exponential)
    lowest = np.rint(exponential * np.maximum(1 - down, 0))
    highest = np.rint(exponential * (1 + up + up * up))
    far = up > 1
    if far.any():
        highest[far] = np.rint(WEIGHT_MAX * np.exp(np.minimum(below + up, 0)[far]))
    highest = np.minimum(highest, WEIGHT_MAX)
    return p, np.maximum(highest - p, p - lowest)


def _moved(change: Floats, values: Floats, mixed: Floats) -> Floats:
    """At least sum_j change_ij |values_jd - mixed_id|, [R, D], by two products of matrices.

    By Cauchy and Schwarz: at most sqrt(sum_j change_ij * sum_j change_ij (values_jd - mixed_id)^2), a quarter more for
    normal numbers. The last term is for what cancels in float64.
    """
    total = change.sum(axis=1, keepdims=True)
    squares = change @ np.square(values) - 2 * mixed * (change @ values) + np.square(mixed) * total
    return np.sqrt(np.maximum(total * squares, 0)) + ROUNDING * total * np.abs(mixed)


def _exact_product(left: Floats, right: Floats, largest: float) -> Floats:
    """left @ right of integers whose sums of magnitudes stay below `largest`."""
    if largest < EXACT_IN_FLOAT:
        return (left.astype(np.float32) @ right.astype(np.float32)).astype(np.float64)
    return left @ right
