"""TokenChain where an image takes two operands of 8 bits: quantizing into both limbs."""

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


ROW = {In.X: np.ones((2, 70), np.float32)}
WRONG = {
    "codes and limb_base": (ROW, [Out.CODES, Out.SCALE], native.quantizer("E3M4", limbs=2)),
    "low_codes come with": (ROW, LIMBS, native.quantizer("E2M3")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_an_error(message):
    feeds, outputs, attributes = WRONG[message]
    with pytest.raises(Exception, match=message) as caught:
        native.chain(feeds, outputs, **attributes)
    assert type(caught.value).__module__.startswith("onnxruntime")
