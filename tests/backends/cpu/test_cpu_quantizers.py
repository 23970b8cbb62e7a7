"""The CPU's activation quantizers: codes and scales against the ops' reference and float64, for every format."""

import numpy as np
import onnx_ir as ir
import pytest

from export.dialect.graph import GraphBuilder
from export.dialect.reference import quantize_activation
from export.formats.format import FORMATS, encode, get_format, to_integers
from export.formats.operands import (
    INT16_MAX,
    LARGE_ZERO,
    SMALL_ZERO,
    fits_byte,
    largest_code,
    limb_base,
    pair_limit,
    pair_sum,
    zero_point,
)
from pipeline.backends.cpu.quantizers import quantize, rounded_integers, unsupported
from tests.support.portable import HEADER, activations, run

EIGHT_BITS = [name for name, row in FORMATS.items() if row.sign_bits and row.kmax < 128]
TWO_LIMBS = ["E3M2", "E3M4", "INT8", "E2M3"]
FLOATS = [name for name, row in FORMATS.items() if not unsupported(row)]
# v = x * (kmax / absmax): two float32 roundings; the reference's x / (absmax / max): two more. Each is at most 2^-24.
SLACK = 4 * 2.0**-24


def emitted(fill):
    """A model x [B, S, K] -> what `fill(emit, x)` returns."""
    model = ir.from_onnx_text(f"{HEADER} g (float[B,S,K] x) => (float[B,S,K] unused) {{ unused = Identity(x) }}")
    emit = GraphBuilder(model.graph, model.graph[0], "q")
    outputs = fill(emit, model.graph.inputs[0])
    model.graph.outputs[:] = outputs
    return model


def image_and_scale(name, x, limbs):
    """(integer image int64, scale) that the emitted quantizer computes."""
    operands = {}

    def fill(emit, value):
        operands["operand"] = quantize(emit, value, get_format(name), limbs)
        return [*operands["operand"].codes, operands["operand"].scale]

    *codes, scale = run(emitted(fill), {"x": x})
    assert all(code.dtype == np.uint8 for code in codes)
    operand = operands["operand"]
    parts = (w * (c.astype(np.int64) - operand.zero) for w, c in zip(operand.weights, codes, strict=True))
    return sum(parts), scale


def assert_images(name, x, image):
    """Every image is the nearest grid point of x / scale in float64, within rounding of the quotient at midpoints."""
    fmt, wide = get_format(name), x.astype(np.float64)
    quotient = wide / (np.maximum(np.abs(wide).max(-1, keepdims=True), 1e-30) / fmt.max_value)
    low, high = (to_integers(fmt, encode(fmt, np.clip(quotient * (1 + s), -fmt.max_value, fmt.max_value)))
                 for s in (-SLACK, SLACK))  # fmt: skip
    low, high = np.minimum(low, high), np.maximum(low, high)
    assert ((low <= image) & (image <= high)).all()


def on_the_grid(name):
    """Rows whose quotients are exact in float32: all values, midpoints, and their next floats, absmax = max_value."""
    fmt = get_format(name)
    values = np.unique(np.abs(fmt.values[np.isfinite(fmt.values)]))
    values = values[values <= fmt.max_value]
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    near = [points]
    for _ in range(3):
        near += [np.nextafter(near[-1], np.float32(np.inf))]
    for _ in range(3):
        near += [np.nextafter(near[0], np.float32(-np.inf))]
        near[0], near[-1] = near[-1], near[0]
    row = np.unique(np.clip(np.concatenate(near), 0, fmt.max_value))
    return np.concatenate([row, -row, [fmt.max_value]])[None, None].astype(np.float32)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_every_value_midpoint_and_neighbour_is_coded_exactly(name):
    x = on_the_grid(name)
    image, scale = image_and_scale(name, x, 1)
    codes, expected_scale = quantize_activation(x, format=name)
    np.testing.assert_array_equal(image, to_integers(get_format(name), codes))
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("name", TWO_LIMBS)
def test_two_limbs_code_every_value_midpoint_and_neighbour_exactly(name):
    x = on_the_grid(name)
    image, _ = image_and_scale(name, x, 2)
    np.testing.assert_array_equal(image, to_integers(get_format(name), quantize_activation(x, format=name)[0]))


@pytest.mark.parametrize("name", FLOATS)
def test_the_float_path_rounds_every_value_midpoint_and_neighbour_exactly(name):
    x = on_the_grid(name)
    model = emitted(lambda emit, value: list(rounded_integers(emit, value, get_format(name))))
    image, _ = run(model, {"x": x})
    np.testing.assert_array_equal(image, to_integers(get_format(name), quantize_activation(x, format=name)[0]))


@pytest.mark.parametrize("name, limbs", [(n, 1) for n in EIGHT_BITS] + [(n, 2) for n in TWO_LIMBS])
def test_random_rows_zeros_tiny_rows_and_outliers(name, limbs):
    x = activations(np.random.default_rng(3), tokens=64, k=384)
    image, scale = image_and_scale(name, x, limbs)
    assert_images(name, x, image)
    assert (image[0, 1] == 0).all()
    np.testing.assert_array_equal(scale, quantize_activation(x, format=name)[1])


def test_just_below_a_binade_nothing_is_lost():
    # v slightly below 16 and slightly above 16.25: where v + c passes a power of two before c does.
    steps = np.arange(-400, 400) * 2.0**-20
    row = np.concatenate([16 + steps, 16.25 + steps, 32 + 2 * steps, 32.5 + 2 * steps, [60.0]])
    x = np.concatenate([row, -row])[None, None].astype(np.float32)
    image, _ = image_and_scale("E2M3", x, 1)
    np.testing.assert_array_equal(image, to_integers(get_format("E2M3"), quantize_activation(x, format="E2M3")[0]))


@pytest.mark.parametrize("name", FLOATS)
def test_around_a_binade_nothing_is_lost_at_any_scale(name):
    # Where v is within 2^(M - 18) of a binade's start, c and v + c may lie on two sides of a power of two.
    fmt, rng = get_format(name), np.random.default_rng(5)
    starts = np.ldexp(fmt.binade_starts[fmt.binade_starts <= fmt.max_value], fmt.fraction_bits)
    near = 1 + np.arange(-40, 40)[:, None] * 2.0 ** (fmt.mantissa_bits - 23)
    row = np.concatenate([(starts * near).ravel(), [fmt.kmax]])
    absmax = 2.0 ** rng.uniform(-3, 3, (1, 400, 1))
    x = (np.clip(row, 0, fmt.kmax) * (absmax / fmt.kmax) * rng.choice([-1, 1], (1, 400, len(row)))).astype(np.float32)
    image, _ = run(emitted(lambda emit, value: list(rounded_integers(emit, value, fmt))), {"x": x})
    assert_images(name, x, image)


def test_zero_points_keep_codes_in_range():
    assert zero_point(60) == SMALL_ZERO and zero_point(64) == LARGE_ZERO
    for name, limbs in (("E2M3", 1), ("INT8", 1), ("UE2M2", 1), ("E3M2", 2), ("E3M4", 2), ("INT8", 2)):
        assert 0 < largest_code(get_format(name), limbs) <= 255, (name, limbs)
    assert limb_base(1984, 2) == 32 and limb_base(448, 2) == 8


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fits_byte(fmt)])
def test_a_weight_at_the_limit_of_pairs_is_safe_and_a_larger_one_is_not(name):
    """Also beside E3M0, whose 64 needs the larger zero point."""
    fmt, limit = get_format(name), pair_limit(name)
    assert pair_sum(fmt, 1, limit) <= INT16_MAX < pair_sum(fmt, 1, limit + 1)


@pytest.mark.parametrize("name", ["E3M2", "E3M4"])
def test_limbs_are_safe_beside_every_weight_in_int8(name):
    assert pair_sum(get_format(name), 2, 127) <= INT16_MAX and pair_limit(name) >= 127


@pytest.mark.parametrize("name, part", [("UE2M2", "no sign"), ("E5M2", "too wide")])
def test_formats_without_a_quantizer_say_why(name, part):
    assert part in unsupported(get_format(name))
