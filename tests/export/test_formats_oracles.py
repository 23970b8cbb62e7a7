"""Number formats against independent oracles: ml_dtypes, onnx.reference, onnxruntime and the formula of FP4DiT."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.formats.format import FORMATS, Format, decode, encode

FLOATS = [row for row in FORMATS.values() if not row.is_integer]


def non_negative(fmt: Format) -> np.ndarray:
    """Values of the codes 0 .. max_code, ascending."""
    return fmt.values[: fmt.max_code + 1]


def in_float32(fmt: Format) -> np.ndarray:
    """Interesting points that are float32: values, midpoints and their float32 neighbours, and random ones.

    The oracles below get these, because ml_dtypes rounds a float64 to float32 first and so loses which side of a
    midpoint it was on.
    """
    grid = non_negative(fmt)
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    near = [exact, np.nextafter(exact, np.float32(-1e30)), np.nextafter(exact, np.float32(1e30))]
    random = np.abs(np.random.default_rng(0).normal(0, fmt.max_value / 3, 20000)).astype(np.float32)
    points = np.concatenate([*near, random, np.array([1.001, 1.2, 2, 100], np.float32) * np.float32(fmt.max_value)])
    return np.concatenate([points, -points])


ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_floats_equal_ml_dtypes(name: str) -> None:
    fmt, oracle = FORMATS[name], ML_DTYPES[name]
    codes = np.arange(2**fmt.bits).astype(np.uint8)
    np.testing.assert_array_equal(decode(fmt, codes), codes.view(oracle).astype(np.float64))
    x = np.concatenate([in_float32(fmt), np.array([np.inf, -np.inf, 0.0, -0.0], np.float32)])
    theirs = np.clip(x, -fmt.max_value, fmt.max_value).astype(oracle)  # ours saturates
    np.testing.assert_array_equal(encode(fmt, x), theirs.view(np.uint8))


def test_e3m4_equals_ml_dtypes_below_its_special_exponent() -> None:
    """ml_dtypes' float8_e3m4 spends the top exponent on Inf and NaN, FP4DiT's format does not: both agree below 16."""
    fmt, oracle = FORMATS["E3M4"], ml_dtypes.float8_e3m4
    codes = np.arange(256).astype(np.uint8)
    below = codes % 128 < 0x70
    np.testing.assert_array_equal(decode(fmt, codes[below]), codes[below].view(oracle).astype(np.float64))
    x = in_float32(fmt)
    x = x[np.abs(x) < 15.75]  # 15.75 is the midpoint of their largest number 15.5 and 16
    assert (encode(fmt, x) == x.astype(oracle).view(np.uint8)).all()
    assert (decode(fmt, codes[0x70:0x80]) == 16 + np.arange(16)).all()


ONNX_TYPES = {
    "E2M1": TensorProto.FLOAT4E2M1,
    "E4M3": TensorProto.FLOAT8E4M3FN,
    "E5M2": TensorProto.FLOAT8E5M2,
    "E2M3": TensorProto.FLOAT6E2M3,
    "E3M2": TensorProto.FLOAT6E3M2,
}
# onnxruntime has kernels of its own for FP8 only.
ONNXRUNTIME_NAMES = ("E4M3", "E5M2")


def cast_model(element_type: int, opset: int, ir_version: int):  # type: ignore[no-untyped-def]
    """x f32 -> Cast to the type -> Cast to f32."""
    there = helper.make_node("Cast", ["x"], ["c"], to=element_type)
    back = helper.make_node("Cast", ["c"], ["y"], to=TensorProto.FLOAT)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([there, back], "cast", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.mark.parametrize("name", ONNX_TYPES)
def test_floats_equal_onnx_cast(name: str) -> None:
    fmt = FORMATS[name]
    x = in_float32(fmt)
    (y,) = ReferenceEvaluator(cast_model(ONNX_TYPES[name], 28, 14)).run(None, {"x": x})
    np.testing.assert_array_equal(decode(fmt, encode(fmt, x)), y)


@pytest.mark.parametrize("name", ONNXRUNTIME_NAMES)
def test_floats_equal_onnxruntime_cast(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fmt = FORMATS[name]
    x = in_float32(fmt)
    session = onnxruntime.InferenceSession(cast_model(ONNX_TYPES[name], 21, 10).SerializeToString())
    (y,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(decode(fmt, encode(fmt, x)), y)


def fp4dit(x: np.ndarray, bits: int, mantissa_bits: int, sign_bits: int, clip: float) -> np.ndarray:
    """The quantizer of FP4DiT (arXiv 2503.15465) with its real-valued bias, written as in the paper."""
    exponent_bits = bits - sign_bits - mantissa_bits
    bias = 2**exponent_bits - 1 - math.log2(clip) + math.log2(2 - 2.0**-mantissa_bits)
    xc = np.clip(x, -clip if sign_bits else 0.0, clip)
    with np.errstate(divide="ignore"):
        p = np.maximum(1, np.floor(np.log2(np.abs(xc)) + bias))
    scale = 2.0 ** (p - mantissa_bits - bias)
    return scale * np.round(xc / scale)


PAPER_FORMATS = [f for f in FLOATS if f.specials == "none"]


@pytest.mark.parametrize("fmt", PAPER_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("clip", [1.0, 0.0371, 5.3, 1e-4])
def test_real_valued_clip_is_scale_times_grid(fmt: Format, clip: float) -> None:
    """FP4DiT's grid with a real bias is our grid times clip / max_value.

    Its scale carries the roundings of two logarithms: log2 of at most 2^9 has an error below 2^-44, which is a
    relative error below 2^-44 in the scale. So values may differ by 2^-42 of themselves, and points closer than
    2^-40 (relative) to a midpoint are left out, where such an error decides; ties have a test of their own.
    """
    scale = clip / fmt.max_value
    grid = non_negative(fmt) * scale
    middle = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, middle * (1 - 2**-40), middle * (1 + 2**-40), np.linspace(0, 1.5 * clip, 3001)])
    x = np.concatenate([x, -x])
    nearest = np.abs(np.abs(x)[:, None] - middle).min(axis=1)
    x = x[nearest > 2**-41 * np.abs(x)]
    ours = decode(fmt, encode(fmt, x / scale)) * scale
    np.testing.assert_allclose(ours, fp4dit(x, fmt.bits, fmt.mantissa_bits, fmt.sign_bits, clip), rtol=2**-42, atol=0)


@pytest.mark.parametrize("fmt", PAPER_FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("exponent", [-6, 0, 3])
def test_ties_of_the_real_valued_clip(fmt: Format, exponent: int) -> None:
    """With a clip of max_value times a power of two the paper's bias is an integer. The formula is then exact when the
    binade is taken from the number's own exponent instead of a rounded logarithm, and every tie goes the same way."""
    scale = 2.0**exponent
    grid = non_negative(fmt) * scale
    x = np.concatenate([(grid[1:] + grid[:-1]) / 2, grid])
    bias = fmt.bias - exponent
    p = np.maximum(1, np.frexp(np.maximum(x, 1e-300))[1] - 1 + bias)
    step = 2.0 ** (p - fmt.mantissa_bits - bias)
    assert (decode(fmt, encode(fmt, x / scale)) * scale == step * np.round(x / step)).all()
