"""Which hardware numbers stand for a format's codes: compared with ml_dtypes' E4M3 over every code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from export.formats.format import encode, get_format
from export.formats.operands import activation_number, decoding_lines, float32_sums, magnitudes, weight_exponent

E4M3 = ml_dtypes.float8_e4m3fn


def all_images(name: str) -> np.ndarray:
    positive = magnitudes(get_format(name))
    return np.concatenate([-positive[::-1], [0], positive])


@pytest.mark.parametrize("name", ["E2M3", "E4M3", "E1M2", "INT4"])
def test_a_cast_to_e4m3_rounds_as_the_format_at_every_midpoint_and_around_it(name: str) -> None:
    number, fmt = activation_number(name, "E4M3", 1), get_format(name)
    assert number is not None and number.rounds_itself
    values = all_images(name) * 2.0**-fmt.fraction_bits
    midpoints = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(midpoints, np.float32(-np.inf)), midpoints, np.nextafter(midpoints, np.float32(np.inf))]
    # A quotient may exceed the largest value by one float32 rounding.
    probes = np.concatenate([values.astype(np.float32), *near, np.float32([fmt.max_value * (1 + 2.0**-23)])])
    rounded = (probes * np.float32(number.gain)).astype(E4M3).astype(np.float64) * 2.0**-number.exponent
    codes = encode(fmt, np.clip(probes, -fmt.max_value, fmt.max_value))
    assert np.array_equal(rounded, fmt.integers[codes])


@pytest.mark.parametrize(
    ("name", "limbs"), [("E3M2", 1), ("E2M1", 1), ("E3M0", 1), ("E3M4", 2), ("INT6", 2), ("INT8", 2)]
)
def test_e4m3_limbs_add_up_to_every_image(name: str, limbs: int) -> None:
    number = activation_number(name, "E4M3", 2)
    assert number is not None and number.limbs == limbs
    numbers = all_images(name) * 2.0**number.exponent
    high = numbers.astype(E4M3).astype(np.float64)
    low = (numbers - high).astype(E4M3).astype(np.float64)
    assert np.array_equal(high + low, numbers)
    assert limbs == 2 or not low.any()


@pytest.mark.parametrize(("name", "limbs"), [("E2M3", 1), ("INT8", 1), ("INT6", 1), ("E3M2", 2), ("E3M4", 2)])
def test_int8_limbs_add_up_to_every_image(name: str, limbs: int) -> None:
    number = activation_number(name, "INT8", 2)
    assert number is not None and number.limbs == limbs
    images = all_images(name)
    high = np.rint(images / number.limb_weights[0])
    low = images - high * number.limb_weights[0]
    assert np.abs(high).max() <= 127 and np.abs(low).max() <= 127
    assert limbs == 2 or not low.any()


@pytest.mark.parametrize(("name", "kind", "limbs"), [("E4M3", "INT8", 2), ("E3M4", "E4M3", 1), ("E5M2", "E4M3", 2)])
def test_formats_too_wide_for_a_type_are_refused(name: str, kind: str, limbs: int) -> None:
    assert activation_number(name, kind, limbs) is None


def test_weights_with_a_multiplier_of_seven_are_not_e4m3_numbers() -> None:
    assert weight_exponent("E2M1", "E4M3", (1, 7)) is None
    assert weight_exponent("E2M1", "INT8", (1, 7)) == 0
    assert weight_exponent("E2M1", "INT8", (1, 11)) is None


@pytest.mark.parametrize("name", ["E2M1", "E1M2", "E3M0", "INT4"])
def test_decoding_lines_give_every_magnitude(name: str) -> None:
    images = np.concatenate([[0], magnitudes(get_format(name))])
    index = np.arange(len(images))
    lines = decoding_lines(name)
    assert np.array_equal(np.max([slope * index + intercept for slope, intercept in lines], axis=0), images)


def test_sums_are_cut_where_float32_would_round() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-120, 121, (5, 1000)).astype(np.int8)
    for largest in (1, 127, 1000):
        cuts = float32_sums(integers, largest)
        assert cuts is not None
        assert np.concatenate([np.arange(1000)[cut] for cut in cuts]).tolist() == list(range(1000))
        sums = [int(np.abs(integers[:, cut].astype(np.int64)).sum(1).max()) * largest for cut in cuts]
        assert max(sums) < 2**24 and (len(cuts) > 1) == (largest == 1000)
    assert float32_sums(integers, 2.0**20) is None
