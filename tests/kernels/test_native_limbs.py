"""TokenChain where an image takes two operands of 8 bits: quantizing into both limbs, and joining their GEMMs' sums."""

import numpy as np
import pytest

from export.dialect.reference import quantize_activation
from export.formats.format import get_format, to_integers
from pipeline.backends.cpu.token_chain import In, Out
from tests.backends.cpu.test_cpu_quantizers import TWO_LIMBS, image_and_scale, on_the_grid
from tests.support import native
from tests.support.portable import activations

pytestmark = pytest.mark.kernels

LIMBS = [Out.CODES, Out.LOW_CODES, Out.SCALE]
SUMS = (In.HIGH_SUM, In.LOW_SUM, In.CHANNEL_SCALE)


def image_of(name, x, flags=()):
    """(integer image, scale, both limbs) of the native quantizer."""
    attributes = native.quantizer(name, limbs=2)
    high, low, scale = native.chain({In.X: x}, LIMBS, flags, **attributes)
    parts = [codes.astype(np.int64) - attributes["zero"] for codes in (high, low)]
    return attributes["limb_base"] * parts[0] + parts[1], scale, (high, low)


@pytest.mark.parametrize("name", TWO_LIMBS)
def test_every_value_midpoint_and_neighbour_is_coded_exactly(name):
    x = on_the_grid(name)
    image, scale, _ = image_of(name, x)
    codes, expected_scale = quantize_activation(x, format=name)
    np.testing.assert_array_equal(image, to_integers(get_format(name), codes))
    np.testing.assert_array_equal(scale, expected_scale)


@pytest.mark.parametrize("name", TWO_LIMBS)
@pytest.mark.parametrize("flags", [(), ("-DFPQ_ONE_VARIANT",)], ids=["best", "plain"])
def test_random_rows_zeros_tiny_rows_and_outliers_are_coded_as_by_the_stock_ops(name, flags):
    x = activations(np.random.default_rng(3), tokens=64, k=391)
    image, scale, limbs = image_of(name, x, flags)
    expected_image, expected_scale = image_and_scale(name, x, 2)
    np.testing.assert_array_equal(image, expected_image)
    np.testing.assert_array_equal(scale, expected_scale)
    assert all(codes.dtype == np.uint8 and codes.max() < 128 for codes in limbs)


def test_a_token_with_nan_has_the_scale_nan_and_zeros_in_both_limbs():
    x = activations(np.random.default_rng(4), tokens=5, k=40)
    x[0, 2, 7] = np.nan
    image, scale, _ = image_of("E3M4", x)
    assert (image[0, 2] == 0).all() and image[0, 3].any()
    np.testing.assert_array_equal(np.isnan(scale[0, :, 0]), np.arange(x.shape[1]) == 2)


def sums(batch=2, tokens=5, n=70, seed=8):
    """Sums of the size that 1,152 products of a limb and a weight's image reach, and the channels' scales."""
    rng = np.random.default_rng(seed)
    high, low = rng.integers(-5_000_000, 5_000_000, (2, batch, tokens, n), dtype=np.int32)
    return dict(zip(SUMS, (high, low, rng.uniform(1e-5, 1e-2, n).astype(np.float32)), strict=True))


def joined(feeds, weight):
    """float32 of the int32 sum, times the channel's scale: one rounding each, as the stock ops compute it."""
    total = feeds[In.HIGH_SUM].astype(np.int64) * weight + feeds[In.LOW_SUM]
    assert np.abs(total).max() < 2**31 and (np.abs(total) > 2**24).any()
    return total.astype(np.float32) * feeds[In.CHANNEL_SCALE]


@pytest.mark.parametrize("kept", [[], [Out.PRODUCT]], ids=["product unread", "product kept"])
@pytest.mark.parametrize("n", [1, 16, 70, 1153])
def test_sums_are_joined_bit_for_bit_as_by_the_stock_ops(n, kept):
    feeds = sums(n=n)
    rng = np.random.default_rng(9)
    after = {In.TOKEN_SCALE: rng.uniform(0.1, 2, (2, 5, 1)), In.BIAS: rng.standard_normal(n)}
    after = {place: array.astype(np.float32) for place, array in after.items()}
    linear, y, *product = native.chain(feeds | after, [Out.LINEAR, Out.Y, *kept], limb_weight=32)
    expected = joined(feeds, 32)
    for result in product:
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(linear, expected * after[In.TOKEN_SCALE] + after[In.BIAS])
    np.testing.assert_array_equal(y, linear)


def test_sums_in_and_limbs_out_are_the_stages_in_turn():
    feeds, attributes = sums(n=129), native.quantizer("E3M4", limbs=2)
    high, low, scale = native.chain(feeds, LIMBS, limb_weight=32, gelu=1, **attributes)
    (y,) = native.chain({In.X: joined(feeds, 32)}, [Out.Y], gelu=1)
    for result, expected in zip((high, low, scale), native.chain({In.X: y}, LIMBS, **attributes), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_sums_are_written_in_heads():
    feeds = sums(n=70)
    (y,) = native.chain(feeds, [Out.Y], limb_weight=32, heads_out=5)
    np.testing.assert_array_equal(y, joined(feeds, 32).reshape(2, 5, 5, 14).swapaxes(1, 2))


def without(place):
    return {other: array for other, array in sums().items() if other is not place}


WRONG = {
    "come together": (without(In.LOW_SUM), [Out.Y], {}),
    "channel_scale come together": (without(In.CHANNEL_SCALE), [Out.Y], {}),
    "at least one dimension": (without(In.HIGH_SUM), [Out.Y], {}),
    "in the place of x": (sums() | {In.X: np.ones((2, 5, 70), np.float32)}, [Out.Y], {}),
    "stand in the place": (sums(), [Out.Y], {"heads_in": 5}),
    "shape of high_sum": (sums() | {In.LOW_SUM: np.ones((2, 5, 1), np.int32)}, [Out.Y], {}),
    "one number a channel": (sums() | {In.CHANNEL_SCALE: np.ones(71, np.float32)}, [Out.Y], {}),
    "product is that of": ({In.X: np.ones((2, 70), np.float32)}, [Out.PRODUCT], {}),
    "codes and limb_base": (sums(), [Out.CODES, Out.SCALE], native.quantizer("E3M4", limbs=2)),
    "low_codes come with": (sums(), LIMBS, native.quantizer("E2M3")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_an_error(message):
    feeds, outputs, attributes = WRONG[message]
    with pytest.raises(Exception, match=message) as caught:
        native.chain(feeds, outputs, **attributes)
    assert type(caught.value).__module__.startswith("onnxruntime")
