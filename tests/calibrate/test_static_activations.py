"""Static activation ranges against plain rounding of every value at every candidate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ModelError, RecipeError
from export.formats.format import decode, encode, get_format, quantize
from pipeline.calibrate.static_activations import (
    METHODS,
    SHARES,
    TAILS,
    Samples,
    find_range,
    levels,
    unsigned_format,
)

FORMATS = ["INT8", "INT4", "E2M3", "E3M4", "UE1M7", "UE1M3", "UE2M2", "UE4M4"]


def values(seed=0, count=2000):
    """GELU-like values: mostly near zero, few large, hardly negative."""
    x = np.random.default_rng(seed).standard_normal((4, count // 4)) * 3
    return (x / (1 + np.exp(-1.7 * x))).astype(np.float32)


def rounded(activation_range, x):
    scale, fmt = float(activation_range.scale[0]), activation_range.format
    if activation_range.zero is None:
        return decode(fmt, quantize(fmt, x / scale)) * scale
    zero = float(activation_range.zero[0])
    return decode(fmt, encode(fmt, np.clip((x - zero) / scale, 0, fmt.max_value))) * scale + zero


def squared_error(activation_range, x):
    return float(((rounded(activation_range, x.astype(np.float64)) - x) ** 2).sum())


def candidate(fmt, low, high):
    """The documented rule, once more."""
    if fmt.sign_bits:
        return np.float32(max(-low, high) / fmt.max_value), None
    scale = np.float32((max(high, 0) - min(low, 0)) / fmt.max_value)
    return scale, -np.float32(decode(fmt, encode(fmt, -min(low, 0) / scale))) * scale


@pytest.mark.parametrize("name", FORMATS)
def test_squared_error_is_that_of_rounding_every_value(name):
    x = values()
    for method in METHODS:
        activation_range = find_range([x[:2], x[2:]], get_format(name), method, "layer")
        error = Samples.of([x], "layer").squared_error(levels(activation_range))
        assert error == pytest.approx(squared_error(activation_range, x), rel=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", ["mse", "percentile"])
def test_the_best_candidate_is_taken(name, method):
    x, fmt = values(1), get_format(name)
    low, high = float(x.min()), float(x.max())
    ends = [(low * share, high * share) for share in SHARES]
    if method == "percentile":
        ends = [tuple(np.quantile(x.astype(np.float64), (tail, 1 - tail))) for tail in TAILS]
    errors = []
    for end in ends:
        scale, zero = candidate(fmt, *end)
        activation_range = type(find_range([x], fmt, "minmax", "layer"))(
            fmt, np.array([scale]), None if zero is None else np.array([zero])
        )
        errors.append(squared_error(activation_range, x))
    assert squared_error(find_range([x], fmt, method, "layer"), x) == pytest.approx(min(errors), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    name=st.sampled_from(FORMATS),
)
def test_minmax_reaches_all_that_was_seen_and_zero_is_exact(x, name):
    array = np.array(x, np.float32)
    activation_range = find_range([array], get_format(name), "minmax", "layer")
    reach = levels(activation_range)
    assert (
        activation_range.scale.dtype == np.float32
        and activation_range.scale.shape == (1,)
        and activation_range.scale[0] > 0
    )
    assert np.abs(reach).min() <= 1e-6 * np.abs(reach).max()  # level * scale is float32 in the zero only
    # float32 scales, and half the widest step by which the zero moves to a value of the format
    slack = 1e-6 * np.abs(reach).max() + (
        0 if activation_range.zero is None else 0.5 * np.diff(reach).max() * (1 + 1e-5)
    )
    assert reach[0] - slack <= min(array.min(), 0) and max(array.max(), 0) <= reach[-1] + slack


def test_wide_tails_are_clipped_by_the_searches_only():
    x = values(2)
    x[0, 0] = 100.0
    ranges = {method: find_range([x], get_format("UE1M3"), method, "layer") for method in METHODS}
    errors = {method: squared_error(activation_range, x) for method, activation_range in ranges.items()}
    assert levels(ranges["minmax"])[-1] > 99 > levels(ranges["percentile"])[-1]
    assert errors["mse"] <= errors["minmax"] and errors["mse"] < errors["percentile"] + errors["minmax"]


def test_one_sided_values_gain_from_an_unsigned_format():
    x = values(3)
    error = {name: squared_error(find_range([x], get_format(name), "mse", "layer"), x) for name in ("INT8", "UE1M7")}
    assert error["UE1M7"] < 0.4 * error["INT8"]


def test_fields_are_those_of_a_quantized_linear():
    fields = find_range([values()], unsigned_format("INT8"), "mse", "layer").fields
    assert fields["activation_format"] == "UE1M7" and fields["activation_scaling"] == "per_tensor"
    assert fields["activation_zero"].shape == (1,) and fields["activation_zero"][0] < 0


def test_refusals():
    with pytest.raises(ModelError, match=r"blocks\.1\.ff: 1 of 3 calibration values are NaN or Inf"):
        find_range([np.array([1, np.nan, 2])], get_format("INT8"), "mse", "blocks.1.ff")
    with pytest.raises(ModelError, match=r"blocks\.1\.ff: no calibration value"):
        find_range([], get_format("INT8"), "mse", "blocks.1.ff")
    with pytest.raises(RecipeError, match="range search 'best' is unknown; use one of minmax, percentile, mse"):
        find_range([np.ones(3)], get_format("INT8"), "best", "layer")
    with pytest.raises(RecipeError, match="asymmetric activations of E2M3: only integers"):
        unsigned_format("E2M3")


def test_a_layer_that_only_saw_zeros_gets_a_scale():
    for name in ("INT8", "UE1M7"):
        assert find_range([np.zeros(5)], get_format(name), "mse", "layer").scale[0] > 0
