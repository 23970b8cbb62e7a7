"""Custom ops: NumPy reference = function body in unmodified onnxruntime = onnx.reference, many formats and shapes."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from export.dialect.ops import ABSMAX_FLOOR, DOMAIN, OPS, VERSION, attributes, no_multipliers
from export.formats.format import Format, decode, encode, get_format, pack, packed_size, quantize, unpack
from export.formats.operands import exact_multipliers, exact_sum_limit
from tests.support.op_models import (
    F32_EPS,
    FORMATS,
    LEVELS,
    Arrays,
    make_node,
    model_of,
    run_everywhere,
    session_of,
)

# --- activations ---------------------------------------------------------------------------------------------------


def tokens(fmt: Format, k: int, seed: int = 0) -> np.ndarray:
    """[8, k]: normal, zero, negative zero, huge, below the floor, subnormal, one outlier, and all ties of the grid."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8, k)).astype(np.float32)
    x[1], x[2] = 0.0, -0.0
    x[3] *= np.float32(3e37)
    x[4] *= np.float32(1e-32)
    x[5] *= np.float32(1e-41)
    x[6, k // 2] = 1e4
    grid = fmt.values[: fmt.max_code + 1]
    ties = np.concatenate([[fmt.max_value], (grid[1:] + grid[:-1]) / 2])
    x[7] = np.resize(ties, k) * np.resize([1, 1, -1], k)  # the first makes the token's scale exactly 1
    return x


@pytest.mark.parametrize("k", [1, 5, 37, 130])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_activation(name: str, k: int) -> None:
    fmt = get_format(name)
    x = tokens(fmt, k)
    codes, scale = run_everywhere("QuantizeActivation", x, format=name)
    absmax = np.maximum(np.abs(x).max(axis=-1, keepdims=True).astype(np.float64), np.float32(ABSMAX_FLOOR))
    # float64 division and a rounding to float32 give the correctly rounded float32 quotient (53 >= 2 * 24 + 2).
    np.testing.assert_array_equal(scale, (absmax / fmt.max_value).astype(np.float32))
    assert_nearest(fmt, codes, x.astype(np.float64) / scale, 2 * F32_EPS)
    assert (codes[1:3] == 0).all() and (codes[5] == 0).all()
    if fmt.sign_bits:  # neither -0 nor the lowest integer, which have the same code
        assert not (codes == 2 ** (fmt.bits - 1)).any()


def assert_nearest(fmt: Format, codes: np.ndarray, quotient: np.ndarray, relative: float) -> None:
    """Codes are those of the float64 quotient, but where it is within `relative` of a midpoint they may be its other
    neighbour: the op divides in float32, so its quotient is off by a rounding."""
    expected = quantize(fmt, quotient)
    off = codes != expected
    if off.any():
        chosen, nearest = decode(fmt, codes[off]), decode(fmt, expected[off])
        distance = np.abs(quotient[off] - (chosen + nearest) / 2)
        assert (distance <= relative * np.abs(quotient[off])).all()


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_even(name: str) -> None:
    fmt = get_format(name)
    grid = fmt.values[: fmt.max_code + 1]
    x = np.concatenate([[fmt.max_value], (grid[1:] + grid[:-1]) / 2]).astype(np.float32)[None]
    codes, scale = run_everywhere("QuantizeActivation", x, format=name)
    assert scale == 1.0
    assert (codes == encode(fmt, x)).all()


def test_scale_of_a_zero_token() -> None:
    """The floor is part of the contract: kernels and engines must use the same number."""
    x = np.array([[0.0, 0.0], [1e-30, 0.0], [2e-30, 0.0]], np.float32)
    codes, scale = run_everywhere("QuantizeActivation", x, format="E2M3")
    assert (scale[:2] == np.float32(1e-30) / np.float32(7.5)).all()
    assert codes.tolist() == [[0, 0], [31, 0], [31, 0]]
    assert scale[2] == np.float32(2e-30) / np.float32(7.5)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (1, 1)])
def test_any_number_of_leading_axes(lead: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(size=(*lead, 7)).astype(np.float32)
    codes, scale = run_everywhere("QuantizeActivation", x, format="E2M3")
    assert (codes.shape, scale.shape) == ((*lead, 7), (*lead, 1))
    run_everywhere("DequantizeActivation", codes, scale, format="E2M3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 3, 18, 36])
def test_a_broken_token_stays_broken_and_alone(bad: float, position: int) -> None:
    """NaN or Inf anywhere gives a NaN scale (a maximum alone would lose NaN), and other tokens do not notice."""
    x = np.random.default_rng(2).normal(size=(3, 37)).astype(np.float32)
    healthy = OPS["QuantizeActivation"].numpy(x, format="E2M3")
    x[1, position] = bad
    codes, scale = run_everywhere("QuantizeActivation", x, format="E2M3")
    assert np.isnan(scale[1]) and (codes[1] == 0).all()
    for result, expected in zip((codes, scale), healthy, strict=True):
        assert (result[[0, 2]] == expected[[0, 2]]).all()
    (back,) = run_everywhere("DequantizeActivation", codes, scale, format="E2M3")
    assert np.isnan(back[1]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_dequantizes(name: str) -> None:
    fmt = get_format(name)
    codes = np.arange(2**fmt.bits).astype(np.uint8)[None]
    (x,) = run_everywhere("DequantizeActivation", codes, np.array([[0.75]], np.float32), format=name)
    np.testing.assert_array_equal(x[0], (fmt.values * 0.75).astype(np.float32))


SESSIONS = {name: session_of(model_of("QuantizeActivation", [(None, None)], format=name)) for name in ("E2M3", "INT8")}


@pytest.mark.torch
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SESSIONS)),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
)
def test_any_finite_numbers(name: str, x: np.ndarray) -> None:
    codes, scale = SESSIONS[name].run(None, {"x": x})
    expected_codes, expected_scale = OPS["QuantizeActivation"].numpy(x, format=name)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(codes, expected_codes)


# --- weights -------------------------------------------------------------------------------------------------------

# (granularity, K, group_size): odd lengths, one group, an odd number of groups (a half-used multiplier byte), many.
WEIGHT_CASES = [
    ("per_channel", 1, 0),
    ("per_channel", 37, 0),
    ("per_channel", 48, 16),
    ("exact_group", 5, 0),
    ("exact_group", 66, 22),
    ("exact_group", 128, 8),
    ("group", 12, 4),
    ("group", 66, 22),
]


def weight_case(name: str, k: int, group_size: int, granularity: str, n: int = 5) -> tuple[Arrays, dict[str, Any]]:
    """(w [K, N], scales, multiplier_codes) and the ops' choices, with planted outliers and a zero channel."""
    rng = np.random.default_rng(k * 100 + group_size)
    fmt, groups = get_format(name), k // group_size if group_size else 1
    w = rng.normal(size=(k, n)).astype(np.float32)
    w[:, 0] = 0.0
    w[k // 2, 1] = 50.0
    scales = rng.uniform(0.5, 2.0, (n, groups if granularity == "group" else 1)).astype(np.float32) / fmt.max_value
    choices = {"format": name, "in_features": k, "group_size": group_size}
    if granularity != "exact_group":
        return (w, scales.astype(np.float32), no_multipliers(k, group_size)), choices
    table = exact_multipliers(name, ("INT8",)) or (1, 2, 3)
    table = table[:16]
    indices = rng.integers(0, len(table), (n, groups)).astype(np.uint8)
    return (w, scales.astype(np.float32), pack(indices, 4)), {**choices, "multipliers": table}


# Every format with three of the cases, every case with some five formats.
BOTH_WAYS = list(zip([name for name in FORMATS for _ in range(3)], cycle(WEIGHT_CASES), strict=False))


@pytest.mark.parametrize(("name", "case"), BOTH_WAYS, ids=str)
def test_weights_both_ways(name: str, case: tuple[str, int, int]) -> None:
    granularity, k, group_size = case
    fmt = get_format(name)
    (w, scales, multiplier_codes), choices = weight_case(name, k, group_size, granularity)
    (codes,) = run_everywhere("QuantizeWeight", w, scales, multiplier_codes, **choices)
    assert codes.shape == (5, packed_size(fmt.bits, k))
    (back,) = run_everywhere("DequantizeWeight", codes, scales, multiplier_codes, **choices)
    assert back.shape == (k, 5)
    step = full_scale(scales, multiplier_codes, **choices)
    values = decode(fmt, unpack(codes, fmt.bits, k))
    # Value times multiplier is exact, so only the product with the scale rounds: float64 rounded once is the same.
    np.testing.assert_array_equal(back.T, (values * step).astype(np.float32))
    # w / step rounds the step (the multiplier's product) and the quotient: two roundings.
    assert_nearest(fmt, unpack(codes, fmt.bits, k), w.T / step, 3 * F32_EPS)
    # Quantizing what was dequantized gives the codes back: grid points are far from midpoints.
    (again,) = run_everywhere("QuantizeWeight", back, scales, multiplier_codes, **choices)
    assert (again == codes).all()


def full_scale(
    scales: np.ndarray,
    multiplier_codes: np.ndarray,
    *,
    in_features: int,
    group_size: int,
    multipliers: tuple[int, ...] = (1,),
    **_: Any,
) -> np.ndarray:
    """[N, K] float64: scale times multiplier of every weight, written with explicit loops (an oracle of its own)."""
    full = np.empty((len(scales), in_features))
    for n in range(len(scales)):
        row = multiplier_codes[n % len(multiplier_codes)]
        for k in range(in_features):
            group = k // group_size if group_size else 0
            index = (row[group // 2] >> (4 * (group % 2))) & 15
            full[n, k] = float(scales[n, min(group, scales.shape[1] - 1)]) * multipliers[index]
    return full


def test_golden_weight() -> None:
    """Two rows of E2M1 by hand: the low nibble is element 2i, and groups of two with the multipliers 1 and 3."""
    codes = np.array([[0x21, 0xF7], [0x98, 0x00]], np.uint8)  # 0.5 1 | 6 -6 and -0 -0.5 | 0 0
    scales = np.array([[2.0], [0.5]], np.float32)
    multiplier_codes = np.array([[0x10], [0x01]], np.uint8)  # indices 0, 1 and 1, 0
    choices = {"format": "E2M1", "in_features": 4, "group_size": 2, "multipliers": (1, 3)}
    (w,) = run_everywhere("DequantizeWeight", codes, scales, multiplier_codes, **choices)
    assert w.T.tolist() == [[1.0, 2.0, 36.0, -36.0], [-0.0, -0.75, 0.0, 0.0]]


# --- the packed GEMM -----------------------------------------------------------------------------------------------


def gemm_case(activation: str, weight: str, k: int, group_size: int, granularity: str) -> tuple[Arrays, dict[str, Any]]:
    rng = np.random.default_rng(7)
    (w, scales, multiplier_codes), choices = weight_case(weight, k, group_size, granularity, n=6)
    (w_codes,) = OPS["QuantizeWeight"].numpy(w, scales, multiplier_codes, **attributes("QuantizeWeight", **choices))
    x = rng.normal(size=(2, 3, k)).astype(np.float32)
    a_codes, a_scale = OPS["QuantizeActivation"].numpy(x, format=activation)
    bias = rng.normal(size=6).astype(np.float32)
    choices["weight_format"] = choices.pop("format")
    choices |= {"layer": "blocks.0.to_q", "activation_format": activation}
    return (a_codes, a_scale, w_codes, scales, multiplier_codes, bias), choices


PAIRS = [("E2M3", "E2M1"), ("E3M4", "E3M0"), ("INT8", "INT4"), ("E4M3", "E1M2"), ("INT8", "INT6")]


@pytest.mark.parametrize(("case", "pair"), list(zip(WEIGHT_CASES * 2, cycle(PAIRS), strict=False)), ids=str)
def test_packed_gemm(case: tuple[str, int, int], pair: tuple[str, str]) -> None:
    """Where sums are exact and a row has one scale, every runtime gives the same bits.

    Else: a scale per group adds G scaled sums in float32 in the runtime's order, and sums beyond the exact limit
    round up to K times; each rounding is at most 2^-24 of the sum of absolute products.
    """
    (granularity, k, group_size), (activation, weight) = case, pair
    arrays, choices = gemm_case(activation, weight, k, group_size, granularity)
    a_codes, a_scale, w_codes, scales, multiplier_codes, bias = arrays
    a_fmt, w_fmt = get_format(activation), get_format(weight)
    exact_sums = k <= exact_sum_limit(a_fmt.kmax, w_fmt.kmax * max(choices.get("multipliers", (1,))))
    scale_groups = scales.shape[1]
    (y,) = run_everywhere("PackedGemm", *arrays, exact=exact_sums and scale_groups == 1, **choices)
    a = decode(a_fmt, a_codes) * a_scale.astype(np.float64)
    grouping = {key: choices[key] for key in ("in_features", "group_size", "multipliers") if key in choices}
    w = decode(w_fmt, unpack(w_codes, w_fmt.bits, k)) * full_scale(scales, multiplier_codes, **grouping)
    # Rounded besides the sums: w_scale, a_scale, bias.
    roundings = 3 + scale_groups + (0 if exact_sums else k)
    size = np.abs(a) @ np.abs(w).T + np.abs(bias)
    assert (np.abs(y - (a @ w.T + bias)) <= roundings * F32_EPS * size).all()


def test_packed_gemm_equals_the_unfused_ops() -> None:
    """PackedGemm stands for DequantizeActivation, MatMul with DequantizeWeight, Add: same numbers up to rounding.

    The unfused form rounds every operand and product: K + 4 roundings of the sum of absolute products.
    """
    arrays, choices = gemm_case("E2M3", "E2M1", 48, 16, "exact_group")
    a_codes, a_scale, w_codes, scales, multiplier_codes, bias = arrays
    (fused,) = run_everywhere("PackedGemm", *arrays, **choices)
    grouping = {key: choices[key] for key in ("in_features", "group_size", "multipliers")}
    (a,) = run_everywhere("DequantizeActivation", a_codes, a_scale, format="E2M3")
    (w,) = run_everywhere("DequantizeWeight", w_codes, scales, multiplier_codes, format="E2M1", **grouping)
    size = np.abs(a).astype(np.float64) @ np.abs(w) + np.abs(bias)
    assert (np.abs(fused - (a @ w + bias)) <= (48 + 8) * F32_EPS * size).all()


# --- normalize, modulate, quantize ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 5, 64), (3, 7, 33)])
@pytest.mark.parametrize("name", ["E2M3", "E3M4", "INT8", "E4M3"])
def test_norm_modulate_quantize(name: str, shape: tuple[int, int, int]) -> None:
    """Against the norm in float64.

    float32 mean, variance, square root, quotient, product and sum: the mean of C numbers has a relative error of at
    most C eps of their mean size, which the division by the deviation magnifies to C eps * max|x| / deviation; the
    others add a few eps. With 4 (C + 8) eps of the token's largest value times that magnification as bound on y, the
    scale has the same relative error, and a code may differ only where y lies so near to a midpoint.
    """
    rng = np.random.default_rng(3)
    batch, _, channels = shape
    fmt = get_format(name)
    x = (rng.normal(size=shape) * rng.uniform(0.1, 30, (*shape[:2], 1)) + 0.3).astype(np.float32)
    shift, scale = (rng.normal(0, 0.5, (batch, 1, channels)).astype(np.float32) for _ in range(2))
    feed = (x, shift, scale)
    codes, a_scale = run_everywhere("NormModulateQuantize", *feed, exact=False, format=name, epsilon=1e-6)
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=-1, keepdims=True) + 1e-6)
    y = (wide - wide.mean(axis=-1, keepdims=True)) / deviation * (1 + scale.astype(np.float64)) + shift
    magnified = np.abs(wide).max(axis=-1, keepdims=True) / deviation
    error = 4 * (channels + 8) * F32_EPS * magnified * (1 + np.abs(scale).max())
    exact_scale = np.abs(y).max(axis=-1, keepdims=True) / fmt.max_value
    assert (np.abs(a_scale - exact_scale) <= error / fmt.max_value + F32_EPS * exact_scale).all()
    # y / scale: the errors of y and of the scale, in units of the scale.
    moved = 2 * error / exact_scale + 4 * F32_EPS * fmt.max_value
    low, high = quantize(fmt, y / exact_scale - moved), quantize(fmt, y / exact_scale + moved)
    value = decode(fmt, codes)
    assert ((decode(fmt, low) <= value) & (value <= decode(fmt, high))).all()
    assert (codes == quantize(fmt, y / exact_scale)).mean() > 0.99


def test_norm_modulate_quantize_is_its_parts() -> None:
    """Given the same normalized numbers, the quantizer part is QuantizeActivation, bit for bit, zero tokens too."""
    x = np.zeros((1, 4, 16), np.float32)  # a constant token normalizes to exact zeros in any order of summation
    shift = np.random.default_rng(4).normal(size=(1, 1, 16)).astype(np.float32)
    scale = np.full((1, 1, 16), 0.25, np.float32)
    codes, a_scale = run_everywhere("NormModulateQuantize", x, shift, scale, format="E2M3", epsilon=1e-6)
    expected_codes, expected_scale = OPS["QuantizeActivation"].numpy(shift, format="E2M3")
    assert (codes == expected_codes).all() and (a_scale == expected_scale).all()


# --- a whole quantized linear --------------------------------------------------------------------------------------


def test_quantized_linear_in_one_model() -> None:
    """QuantizeActivation -> DequantizeActivation -> MatMul with DequantizeWeight -> Add, weights as initializers."""
    arrays, choices = gemm_case("E2M3", "E2M1", 48, 16, "exact_group")
    _, _, w_codes, scales, multiplier_codes, bias = arrays
    grouping = {key: choices[key] for key in ("in_features", "group_size", "multipliers")}
    nodes = [
        make_node("QuantizeActivation", ["x"], ["c", "s"], name="l/quantize", format="E2M3"),
        make_node("DequantizeActivation", ["c", "s"], ["a"], name="l/dequantize", format="E2M3"),
        make_node("DequantizeWeight", ["l.codes", "l.scales", "l.multipliers"], ["w"], format="E2M1", **grouping),
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Add", ["m", "l.bias"], ["y"]),
    ]
    stored = {"l.codes": w_codes, "l.scales": scales, "l.multipliers": multiplier_codes, "l.bias": bias}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 6])],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [OPS[node.op_type].function() for node in nodes[:3]]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(5).normal(size=(4, 48)).astype(np.float32)
    a_codes, a_scale = OPS["QuantizeActivation"].numpy(x, format="E2M3")
    exact = decode(get_format("E2M3"), a_codes) * a_scale.astype(np.float64)
    values = decode(get_format("E2M1"), unpack(w_codes, 4, 48)) * full_scale(scales, multiplier_codes, **grouping)
    size = np.abs(exact) @ np.abs(values).T + np.abs(bias)
    for level in LEVELS:
        (y,) = session_of(model, level).run(None, {"x": x})
        # Each of the K products has two rounded operands; K roundings of the sum and one of the bias follow.
        assert (np.abs(y - (exact @ values.T + bias)) <= (48 + 4) * F32_EPS * size).all(), level
