"""Ops of activations with a constant scale or a scale per group: reference = function body in every runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from export.dialect.ops import OPS, attributes
from export.errors import ContractError
from export.formats.format import decode, encode, get_format, quantize, unpack
from tests.export.test_ops import full_scale, gemm_case, tokens
from tests.support.op_models import F32_EPS, FORMATS, model_of, run_everywhere, session_of

ONE, NONE = np.ones(1, np.float32), np.zeros(1, np.float32)


# --- a constant scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_static_codes_are_the_nearest(name: str) -> None:
    """Of random numbers, ties, zeros of both signs, numbers beyond the range, and NaN, which has the code 0."""
    fmt, x = get_format(name), tokens(get_format(name), 37)
    scale, zero = np.float32([0.3]), np.float32([-0.25 if not fmt.sign_bits else 0])
    (codes,) = run_everywhere("QuantizeStatic", x, scale, zero, format=name)
    quotient = ((x - zero) / scale).astype(np.float32)  # two float32 operations, as the op has them
    np.testing.assert_array_equal(codes, quantize(fmt, quotient))
    broken = np.array([[np.nan, np.inf, -np.inf]], np.float32)
    (codes,) = run_everywhere("QuantizeStatic", broken, scale, zero, format=name)
    lowest = quantize(fmt, -fmt.max_value if fmt.sign_bits else 0.0)
    assert codes.tolist() == [[0, fmt.max_code, int(lowest)]]


@pytest.mark.parametrize("name", FORMATS)
def test_static_ties_go_to_even(name: str) -> None:
    grid = get_format(name).values[: get_format(name).max_code + 1]
    x = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)[None]
    (codes,) = run_everywhere("QuantizeStatic", x, ONE, NONE, format=name)
    np.testing.assert_array_equal(codes, encode(get_format(name), x))


@pytest.mark.parametrize("name", FORMATS)
def test_every_static_code_dequantizes(name: str) -> None:
    fmt, scale, zero = get_format(name), np.float32([0.3]), np.float32([-0.25])
    codes = np.arange(2**fmt.bits).astype(np.uint8)[None]
    (x,) = run_everywhere("DequantizeStatic", codes, scale, zero, format=name)
    product = (fmt.values * np.float64(scale)).astype(np.float32)
    np.testing.assert_array_equal(x[0], product + zero)


def test_uniform_unsigned_formats_are_asymmetric_integers() -> None:
    """UE1M3, UE1M5 and UE1M7 are k / 15, k / 63 and k / 255 of their range: codes k, value zero + k * step."""
    for name, top in (("UE1M3", 15), ("UE1M5", 63), ("UE1M7", 255)):
        fmt, low, high = get_format(name), -0.5, 2.0
        step = (high - low) / top
        scale = np.float32([(high - low) / fmt.max_value])
        x = np.float32([[low + k * step for k in range(top + 1)]])
        (codes,) = run_everywhere("QuantizeStatic", x, scale, np.float32([low]), format=name)
        assert codes[0].tolist() == list(range(top + 1))


STATIC = {
    name: session_of(model_of("QuantizeStatic", [(None,), (1,), (1,)], format=name)) for name in ("E2M3", "UE2M2")
}


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(STATIC)),
    hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(width=32)),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.floats(-4, 4, width=32),
)
def test_any_numbers_at_any_static_scale(name: str, x: np.ndarray, scale: float, zero: float) -> None:
    feeds = (x, np.float32([scale]), np.float32([zero]))
    (codes,) = STATIC[name].run(None, dict(zip(("x", "scale", "zero"), feeds, strict=True)))
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(codes, OPS["QuantizeStatic"].numpy(*feeds, format=name)[0])


# --- a scale per token and group -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "group"), [(8, 8), (24, 8), (66, 22), (5, 1)])
@pytest.mark.parametrize("name", ["E2M3", "INT8", "E4M3"])
def test_groups_are_quantized_like_tokens(name: str, k: int, group: int) -> None:
    x = tokens(get_format(name), k)
    choices = {"format": name, "in_features": k, "group_size": group}
    codes, scale = run_everywhere("QuantizeGroups", x, **choices)
    assert (codes.shape, scale.shape) == (x.shape, (8, k // group))
    for j in range(k // group):
        part = slice(j * group, (j + 1) * group)
        own_codes, own_scale = OPS["QuantizeActivation"].numpy(x[:, part], format=name)
        np.testing.assert_array_equal(codes[:, part], own_codes)
        np.testing.assert_array_equal(scale[:, j : j + 1], own_scale)
    (back,) = run_everywhere("DequantizeGroups", codes, scale, **choices)
    np.testing.assert_array_equal(back, (decode(get_format(name), codes) * np.repeat(scale, group, 1)).astype("f4"))


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
def test_groups_under_any_leading_axes(lead: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=(*lead, 12)).astype(np.float32)
    choices = {"format": "E2M3", "in_features": 12, "group_size": 4}
    codes, scale = run_everywhere("QuantizeGroups", x, **choices)
    assert (codes.shape, scale.shape) == ((*lead, 12), (*lead, 3))
    run_everywhere("DequantizeGroups", codes, scale, **choices)


def test_a_broken_group_leaves_the_others_alone() -> None:
    x = np.random.default_rng(2).normal(size=(2, 12)).astype(np.float32)
    x[1, 5] = np.nan
    _, scale = run_everywhere("QuantizeGroups", x, format="E2M3", in_features=12, group_size=4)
    assert np.isnan(scale).tolist() == [[False, False, False], [False, True, False]]


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ContractError, match="in_features 12 is not a multiple of group_size 5"):
        attributes("QuantizeGroups", format="E2M3", in_features=12, group_size=5)


# (granularity, K, group_size, activation_group): equal groups, one inside the other both ways, and neither.
GROUP_CASES = [
    ("per_channel", 48, 0, 16),
    ("exact_group", 48, 8, 16),
    ("group", 48, 16, 16),
    ("group", 48, 8, 16),
    ("group", 48, 24, 8),
    ("group", 48, 16, 24),
    ("group", 66, 22, 33),
]


@pytest.mark.parametrize(("granularity", "k", "group_size", "activation_group"), GROUP_CASES)
@pytest.mark.parametrize(("activation", "weight"), [("E2M3", "E2M1"), ("INT8", "INT4")])
def test_packed_group_gemm(
    activation: str, weight: str, granularity: str, k: int, group_size: int, activation_group: int
) -> None:
    """Group sums are exact here; then token scale and channel scale round once each, the S sums S times, the bias."""
    (_, _, w_codes, scales, multiplier_codes, bias), choices = gemm_case(activation, weight, k, group_size, granularity)
    x = np.random.default_rng(8).normal(size=(2, 3, k)).astype(np.float32)
    grouping: Any = {"format": activation, "in_features": k, "group_size": activation_group}
    a_codes, a_scale = OPS["QuantizeGroups"].numpy(x, **grouping)
    choices |= {"activation_group": activation_group, "scale_groups": scales.shape[1]}
    arrays = (a_codes, a_scale, w_codes, scales, multiplier_codes, bias)
    (y,) = run_everywhere("PackedGroupGemm", *arrays, exact=False, **choices)
    (reference,) = OPS["PackedGroupGemm"].numpy(*arrays, **attributes("PackedGroupGemm", **choices))
    a = decode(get_format(activation), a_codes) * np.repeat(a_scale.astype(np.float64), activation_group, axis=-1)
    own = {key: choices[key] for key in ("in_features", "group_size", "multipliers") if key in choices}
    w = decode(get_format(weight), unpack(w_codes, get_format(weight).bits, k))
    w = w * full_scale(scales, multiplier_codes, **own)
    sums = np.lcm(k // activation_group, scales.shape[1])
    bound = (3 + sums) * F32_EPS * (np.abs(a) @ np.abs(w).T + np.abs(bias))
    for product in (y, reference):
        assert (np.abs(product - (a @ w.T + bias)) <= bound).all()
