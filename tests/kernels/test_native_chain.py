"""TokenChain, the native op: every stage against NumPy, codes and scales bit for bit."""

import numpy as np
import pytest

from export.dialect.reference import quantize_activation
from export.formats.format import FORMATS, get_format, to_integers
from pipeline.backends.cpu.token_chain import Activation, In, Out
from tests.backends.cpu.test_cpu_quantizers import EIGHT_BITS, assert_images, image_and_scale, on_the_grid
from tests.support import native
from tests.support.portable import activations

pytestmark = pytest.mark.kernels

ROUNDING = 2.0**-24
CODED = [Out.CODES, Out.SCALE]


def image_and_scale_of(name, x, flags=()):
    codes, scale = native.chain({In.X: x}, CODED, flags, **native.quantizer(name))
    assert codes.dtype == np.uint8
    return codes.astype(np.int64) - native.quantizer(name)["zero"], scale


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_every_value_midpoint_and_neighbour_is_coded_exactly(name):
    x = on_the_grid(name)
    image, scale = image_and_scale_of(name, x)
    codes, expected_scale = quantize_activation(x, format=name)
    np.testing.assert_array_equal(image, to_integers(get_format(name), codes))
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_random_rows_zeros_tiny_rows_and_outliers_are_coded_as_by_the_stock_ops(name):
    x = activations(np.random.default_rng(3), tokens=64, k=391)
    image, scale = image_and_scale_of(name, x)
    assert_images(name, x, image)
    stock_image, stock_scale = image_and_scale(name, x, 1)
    np.testing.assert_array_equal(image, stock_image)
    np.testing.assert_array_equal(scale, stock_scale)
    assert (image[0, 1] == 0).all()


@pytest.mark.parametrize("name", ["E2M3", "INT8"])
def test_a_token_with_nan_or_infinity_has_the_scale_nan_and_zeros_and_no_other_has(name):
    x = activations(np.random.default_rng(4), tokens=9, k=40)
    x[0, 4, 7], x[0, 5, 39], x[0, 6, 0], x[0, 7, 3:5] = np.nan, np.inf, -np.inf, (np.inf, np.nan)
    image, scale = image_and_scale_of(name, x)
    codes, expected_scale = quantize_activation(x, format=name)
    np.testing.assert_array_equal(image, to_integers(get_format(name), codes))
    np.testing.assert_array_equal(scale, expected_scale)
    assert np.isnan(scale[0, 4:8]).all() and np.isfinite(scale[0, [0, 1, 2, 3, 8]]).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (3, 17), (2, 3, 4, 31), (5, 1, 1153), (1, 300, 16), (2, 0, 8)])
def test_odd_shapes(shape):
    x = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    image, scale = image_and_scale_of("E2M3", x)
    assert image.shape == shape and scale.shape == (*shape[:-1], 1)
    if x.size:
        assert_images("E2M3", x, image)


def test_the_largest_floats_and_subnormal_ones():
    top = np.finfo(np.float32).max
    x = np.array([[top, -top, top / 3], [1e-42, -1e-44, 0], [1e-30, 7e-31, -2e-31]], np.float32)
    image, scale = image_and_scale_of("E2M3", x)
    codes, expected = quantize_activation(x, format="E2M3")
    np.testing.assert_array_equal(image, to_integers(get_format("E2M3"), codes))
    np.testing.assert_array_equal(scale, expected)


def stages(feeds):
    """linear, y in float32, one rounding for each operation, as the stock ops compute them."""
    linear = feeds[In.X]
    if In.TOKEN_SCALE in feeds:
        linear = linear * feeds[In.TOKEN_SCALE]
    if In.BIAS in feeds:
        linear = linear + feeds[In.BIAS]
    y = linear
    if In.GATE in feeds:
        y = y * feeds[In.GATE]
    if In.RESIDUAL in feeds:
        y = y + feeds[In.RESIDUAL]
    return linear, y


def arrays(batch=2, tokens=5, n=70, seed=6):
    rng = np.random.default_rng(seed)
    shapes = {In.X: (batch, tokens, n), In.TOKEN_SCALE: (batch, tokens, 1), In.BIAS: (n,), In.GATE: (batch, 1, n)}
    shapes |= {In.RESIDUAL: (batch, tokens, n), In.NORM_SCALE: (batch, 1, n), In.NORM_SHIFT: (batch, 1, n)}
    return {place: rng.standard_normal(shape).astype(np.float32) for place, shape in shapes.items()}


SOME = [
    (In.TOKEN_SCALE,),
    (In.BIAS,),
    (In.GATE,),
    (In.RESIDUAL,),
    (In.TOKEN_SCALE, In.BIAS),
    (In.TOKEN_SCALE, In.BIAS, In.GATE, In.RESIDUAL),
    (In.TOKEN_SCALE, In.RESIDUAL),
    (In.BIAS, In.GATE),
    (),
]


@pytest.mark.parametrize("places", SOME, ids=lambda places: "+".join(place.name for place in places) or "none")
@pytest.mark.parametrize("outputs", [[Out.Y], [Out.LINEAR], [Out.Y, Out.LINEAR], [*CODED, Out.Y, Out.LINEAR]])
def test_scale_bias_gate_and_residual_are_bit_for_bit_those_of_the_stock_ops(places, outputs):
    feeds = {place: array for place, array in arrays().items() if place in (In.X, *places)}
    results = dict(zip(outputs, native.chain(feeds, outputs, **native.quantizer("E2M3")), strict=True))
    linear, y = stages(feeds)
    if Out.LINEAR in results:
        np.testing.assert_array_equal(results[Out.LINEAR], linear)
    if Out.Y in results:
        np.testing.assert_array_equal(results[Out.Y], y)
    if Out.CODES in results:
        np.testing.assert_array_equal(results[Out.SCALE], quantize_activation(y, format="E2M3")[1])


def wide_gelu(x):
    """x / (1 + exp(-2u)) in float64: no cancellation for negative x."""
    x = x.astype(np.float64)
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_gelu_is_right_to_two_units_of_its_argument():
    # s = 1 / (1 + exp(t)): t is 2^-22 off relative to itself (four roundings), exp as much; |t| s (1 - s) <= 0.224 and
    # s (1 - s) <= 0.25, so s is off by less than 2^-22 / 2, and the sum and the quotient add 2 * 2^-24.
    x = np.concatenate([np.linspace(-12, 12, 200_001), [-87, -1e4, 1e4, 3e38, -3e38, 0.0, 1e-40]]).astype(np.float32)
    (y,) = native.chain({In.X: x[None]}, [Out.Y], activation=Activation.GELU)
    with np.errstate(over="ignore"):
        expected = wide_gelu(x)
    assert (np.abs(y[0] - expected) <= 2.0**-22 * np.abs(x)).all()


def test_silu_is_right_to_two_units_of_itself():
    # s = 1 / (1 + exp(-x)): exp is 2^-23 off relative to itself, which is (1 - s) of the sum; the sum and the quotient
    # add 2^-24 each. Below -87, where s < 2^-125, it is that of -87; of a subnormal result the last unit is 2^-149.
    x = np.concatenate([np.linspace(-90, 90, 200_001), [-104, -1e4, 1e4, 3e38, -3e38, 0.0, 1e-40]]).astype(np.float32)
    (y,) = native.chain({In.X: x[None]}, [Out.Y], activation=Activation.SILU)
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = wide / (1 + np.exp(-wide))
    assert (np.abs(y[0] - expected) <= 2.0**-22 * np.abs(expected) + 2.0**-125 * np.abs(wide) + 2.0**-149).all()


ACTIVATIONS = (Activation.GELU, Activation.SILU)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_keeps_what_is_not_finite(activation):
    x = np.array([[np.nan, 1.0, np.inf, -np.inf]], np.float32)
    (y,) = native.chain({In.X: x}, [Out.Y], activation=activation)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(x))
    assert np.isnan(y[0, 0]) and y[0, 2] == np.inf


@pytest.mark.parametrize("activation", [-1, len(Activation), 2**32])
def test_another_number_of_an_activation_is_an_error(activation):
    with pytest.raises(Exception, match=r"activation must be 0 \(none\), 1 \(GELU\) or 2 \(SiLU\)"):
        native.chain({In.X: np.ones((1, 4), np.float32)}, [Out.Y], activation=activation)


@pytest.mark.parametrize("n, rows", [(1, 3), (15, 4), (16, 4), (1152, 8), (1159, 3)])
def test_norm_against_float64(n, rows):
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((2, rows, n)) * 3 + rng.standard_normal((2, rows, 1)) * 20).astype(np.float32)
    scale, shift = rng.standard_normal((2, 2, 1, n)).astype(np.float32)
    feeds = {In.X: x, In.NORM_SCALE: scale, In.NORM_SHIFT: shift}
    (normed,) = native.chain(feeds, [Out.QUANTIZED], epsilon=1e-5)
    wide = x.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(-1, keepdims=True) + np.float32(1e-5))
    expected = (wide - wide.mean(-1, keepdims=True)) * inverse * scale + shift
    # Sums of n numbers in 16 lanes: L = n / 16 + 17 additions. The mean is L roundings of max|x| off; the variance
    # 2 L + 3 relative, and the inverse deviation half of that and 3; 6 more to the output. |x - mean| <= 2 max|x|.
    additions = n / 16 + 17
    size = np.abs(wide).max(-1, keepdims=True) * inverse * np.abs(scale)
    assert (np.abs(normed - expected) <= ROUNDING * ((3 * additions + 24) * size + np.abs(shift))).all()


def test_a_norm_may_have_one_scale_for_all_samples():
    feeds = {place: array for place, array in arrays().items() if place not in (In.TOKEN_SCALE, In.BIAS)}
    feeds[In.NORM_SCALE], feeds[In.NORM_SHIFT] = feeds[In.NORM_SCALE][0, 0], feeds[In.NORM_SHIFT][0, 0]
    repeated = feeds | {place: np.stack([feeds[place][None]] * 2) for place in (In.NORM_SCALE, In.NORM_SHIFT)}
    shared, same = (native.chain(inputs, [Out.QUANTIZED], epsilon=1e-5)[0] for inputs in (feeds, repeated))
    np.testing.assert_array_equal(shared, same)


@pytest.mark.parametrize("activation", Activation)
def test_all_stages_at_once_are_the_stages_in_turn(activation):
    feeds, outputs = arrays(batch=3, tokens=40, n=129), [*CODED, Out.Y, Out.LINEAR, Out.QUANTIZED]
    attributes = native.quantizer("E2M3") | {"epsilon": 1e-6, "activation": activation}
    codes, scale, y, linear, quantized = native.chain(feeds, outputs, **attributes)
    first = {place: feeds[place] for place in (In.X, In.TOKEN_SCALE, In.BIAS)}
    (expected_linear,) = native.chain(first, [Out.LINEAR])
    second = {In.X: expected_linear, In.GATE: feeds[In.GATE], In.RESIDUAL: feeds[In.RESIDUAL]}
    (expected_y,) = native.chain(second, [Out.Y], activation=activation)
    third = {In.X: expected_y, In.NORM_SCALE: feeds[In.NORM_SCALE], In.NORM_SHIFT: feeds[In.NORM_SHIFT]}
    (expected_quantized,) = native.chain(third, [Out.QUANTIZED], epsilon=1e-6)
    image, expected_scale = image_and_scale_of("E2M3", expected_quantized)
    for result, expected in ((linear, expected_linear), (y, expected_y), (quantized, expected_quantized)):
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(codes.astype(np.int64) - 64, image)
    np.testing.assert_array_equal(scale, expected_scale)
    (alone,) = native.chain(feeds, [Out.CODES, Out.SCALE], **attributes)[:1]
    np.testing.assert_array_equal(alone, codes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_instruction_sets_give_the_same_bits(activation):
    feeds, outputs = arrays(batch=2, tokens=33, n=1153), [*CODED, Out.Y, Out.LINEAR, Out.QUANTIZED]
    attributes = native.quantizer("E2M3") | {"epsilon": 1e-6, "activation": activation}
    best, plain = (native.chain(feeds, outputs, flags, **attributes) for flags in ((), ("-DFPQ_ONE_VARIANT",)))
    for result, expected in zip(best, plain, strict=True):
        np.testing.assert_array_equal(result, expected)


WRONG = {
    "one number a row": {In.TOKEN_SCALE: (2, 4)},
    "one number a channel": {In.BIAS: (71,)},
    "shape of x": {In.RESIDUAL: (2, 1, 70)},
    "gate must be": {In.GATE: (3, 1, 70)},
    "norm_scale must be": {In.NORM_SCALE: (3, 1, 70), In.NORM_SHIFT: (3, 1, 70)},
    "shape of norm_scale": {In.NORM_SCALE: (2, 1, 70), In.NORM_SHIFT: (1, 1, 70)},
    "both its scale and its shift": {In.NORM_SCALE: (2, 1, 70)},
}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_that_do_not_fit_are_an_error(message):
    shapes = {In.X: (2, 5, 70)} | WRONG[message]
    with pytest.raises(Exception, match=message) as caught:
        native.chain({place: np.ones(shape, np.float32) for place, shape in shapes.items()}, [Out.Y])
    assert type(caught.value).__module__.startswith("onnxruntime")


def test_a_quantizer_has_both_outputs():
    with pytest.raises(Exception, match="come together"):
        native.chain({In.X: np.ones((1, 4), np.float32)}, [Out.CODES], **native.quantizer("E2M3"))


def test_formats_with_one_operand_are_covered():
    assert {"E2M3", "INT8", "INT6", "E2M1"} <= set(EIGHT_BITS) <= set(FORMATS)


def in_heads(rows, heads):
    """[batch, tokens, n] -> [batch, heads, tokens, n / heads]."""
    return np.ascontiguousarray(rows.reshape(*rows.shape[:2], heads, -1).swapaxes(1, 2))


@pytest.mark.parametrize("heads", [1, 2, 5, 70])
def test_rows_in_heads_are_read_and_written(heads):
    feeds, outputs = arrays(batch=3, tokens=40, n=70), [*CODED, Out.Y, Out.LINEAR, Out.QUANTIZED]
    attributes = native.quantizer("E2M3") | {"epsilon": 1e-6, "activation": Activation.GELU}
    expected = dict(zip(outputs, native.chain(feeds, outputs, **attributes), strict=True))
    feeds[In.X] = in_heads(feeds[In.X], heads)
    results = native.chain(feeds, outputs, **attributes, heads_in=heads, heads_out=heads)
    expected[Out.Y] = in_heads(expected[Out.Y], heads)
    for place, array in zip(outputs, results, strict=True):
        np.testing.assert_array_equal(array, expected[place], err_msg=place.name)


@pytest.mark.parametrize("heads", [{"heads_in": 5}, {"heads_out": 5}, {"heads_in": 2, "heads_out": 7}, {}])
def test_a_chain_without_stages_only_moves_rows(heads):
    rows = arrays()[In.X]
    x = in_heads(rows, heads["heads_in"]) if "heads_in" in heads else rows
    expected = in_heads(rows, heads["heads_out"]) if "heads_out" in heads else rows
    moved, plain = native.chain({In.X: x}, [Out.Y, Out.QUANTIZED], **heads)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(plain, rows)


@pytest.mark.parametrize(
    "shape, heads, message",
    [
        ((2, 5, 70), {"heads_in": 2}, "batch, heads, tokens, size"),
        ((2, 3, 5, 14), {"heads_in": 5}, "with heads_in heads"),
        ((2, 5, 70), {"heads_out": 3}, "must divide"),
        ((2, 70), {"heads_out": 2}, "must divide"),
    ],
)
def test_heads_that_do_not_fit_are_an_error(shape, heads, message):
    with pytest.raises(Exception, match=message):
        native.chain({In.X: np.ones(shape, np.float32)}, [Out.Y], **heads)
