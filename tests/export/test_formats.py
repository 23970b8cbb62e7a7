"""Number formats: every code, every midpoint and its neighbours, special values and packing."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import RecipeError
from export.formats.format import (
    FORMATS,
    Format,
    decode,
    encode,
    fold_negative_zero,
    get_format,
    looked_up,
    pack,
    packed_size,
    quantize,
    to_integers,
    unpack,
)

ALL = list(FORMATS.values())
FLOATS = [row for row in ALL if not row.is_integer]
UNSIGNED = [row for row in ALL if not row.sign_bits]
by_name = pytest.mark.parametrize("fmt", ALL, ids=lambda fmt: fmt.name)
floats_by_name = pytest.mark.parametrize("fmt", FLOATS, ids=lambda fmt: fmt.name)

# Non-negative values written by hand: OCP MX 1.0 tables 4 and 5 (E2M1, E2M3, E3M2), FP4DiT (E1M2, E3M0).
GRIDS = {
    "E2M1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "E1M2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    "E3M0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    "E2M3": [i / 8 for i in range(16)] + [2 + i / 4 for i in range(8)] + [4 + i / 2 for i in range(8)],
    "E3M2": [i / 16 for i in range(8)] + [m * 2.0**e for e in range(-1, 5) for m in (1, 1.25, 1.5, 1.75)],
    "UE2M2": [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7],
    "UE1M3": [i / 4 for i in range(16)],
    "UE4M0": [0, *(2.0**e for e in range(-6, 9))],
}
# Largest finite value, smallest positive value, bias: OCP FP8 1.0 table 1, OCP MX 1.0 section 5.3.1, FP4DiT (E3M4).
RANGES = {
    "E2M1": (6.0, 0.5, 1),
    "E2M3": (7.5, 0.125, 1),
    "E3M2": (28.0, 0.0625, 3),
    "E3M4": (31.0, 2.0**-6, 3),
    "E4M3": (448.0, 2.0**-9, 7),
    "E5M2": (57344.0, 2.0**-16, 15),
}


def non_negative(fmt: Format) -> np.ndarray:
    """Values of the codes 0 .. max_code, ascending."""
    return fmt.values[: fmt.max_code + 1]


def interesting(fmt: Format) -> np.ndarray:
    """Every value, every midpoint, the float64 neighbours of both, points beyond the range; with both signs."""
    grid = non_negative(fmt)
    exact = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    beyond = fmt.max_value * np.array([1.0 + 2**-30, 1.01, 1.03, 1.0625, 1.125, 1.25, 1.5, 2, 1e3])
    points = np.concatenate([exact, np.nextafter(exact, -np.inf), np.nextafter(exact, np.inf), beyond])
    return np.concatenate([points, -points])


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_grid_written_by_hand(name: str) -> None:
    assert non_negative(FORMATS[name]).tolist() == GRIDS[name]


@pytest.mark.parametrize("name", RANGES)
def test_range_written_by_hand(name: str) -> None:
    fmt = FORMATS[name]
    assert (fmt.max_value, float(fmt.values[1]), fmt.bias) == RANGES[name]


@pytest.mark.parametrize(("name", "bits"), [("INT4", 4), ("INT6", 6), ("INT8", 8)])
def test_integers_are_twos_complement(name: str, bits: int) -> None:
    fmt, half = FORMATS[name], 2 ** (bits - 1)
    assert fmt.values.tolist() == [*range(half), *range(-half, 0)]
    assert (fmt.max_value, fmt.max_code, fmt.kmax) == (half - 1, half - 1, half - 1)


def test_special_codes() -> None:
    e4m3, e5m2 = FORMATS["E4M3"], FORMATS["E5M2"]
    assert np.flatnonzero(np.isnan(e4m3.values)).tolist() == [0x7F, 0xFF]
    assert not np.isinf(e4m3.values).any()
    assert np.flatnonzero(np.isinf(e5m2.values)).tolist() == [0x7C, 0xFC]
    assert np.flatnonzero(np.isnan(e5m2.values)).tolist() == [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]
    plain = [fmt for fmt in ALL if fmt.specials == "none"]
    assert all(np.isfinite(fmt.values).all() for fmt in plain)


@by_name
def test_image_is_value_times_power_of_two(fmt: Format) -> None:
    finite = np.isfinite(fmt.values)
    codes = np.flatnonzero(finite).astype(np.uint8)
    assert (to_integers(fmt, codes) == decode(fmt, codes) * 2.0**fmt.fraction_bits).all()
    assert (fmt.integers[~finite] == 0).all()
    assert fmt.kmax == to_integers(fmt, np.array([fmt.max_code], np.uint8))[0]


@floats_by_name
def test_codes_ascend_and_signs_mirror(fmt: Format) -> None:
    grid = non_negative(fmt)
    assert (np.diff(grid) > 0).all()
    if fmt.sign_bits:
        half = 2 ** (fmt.bits - 1)
        np.testing.assert_array_equal(fmt.values[half:], -fmt.values[:half])


@floats_by_name
def test_binade_starts_are_where_the_step_doubles(fmt: Format) -> None:
    steps = np.diff(non_negative(fmt))
    doubles = np.flatnonzero(steps[1:] == 2 * steps[:-1]) + 1
    assert set(fmt.binade_starts.tolist()) >= set(non_negative(fmt)[doubles].tolist())
    assert set(steps[1:] / steps[:-1]) <= {1.0, 2.0}


# --- encoding ------------------------------------------------------------------------------------------------------


@by_name
def test_every_code_survives(fmt: Format) -> None:
    codes = np.arange(2**fmt.bits).astype(np.uint8)
    back = encode(fmt, decode(fmt, codes))
    nan, number = np.isnan(fmt.values), np.isfinite(fmt.values)
    assert (back[number] == codes[number]).all()
    assert np.isnan(decode(fmt, back[nan])).all()


def tie_goes_up(fmt: Format, lower_code: int) -> bool:
    """To the even code; without mantissa bits to the even multiple of the local step, so up except from zero."""
    return lower_code % 2 == 1 if fmt.mantissa_bits or fmt.is_integer else lower_code > 0


@by_name
def test_every_midpoint_and_its_neighbours(fmt: Format) -> None:
    grid = non_negative(fmt)
    lower = np.arange(len(grid) - 1)
    middle = (grid[1:] + grid[:-1]) / 2
    tie = lower + np.array([tie_goes_up(fmt, i) for i in lower])
    assert encode(fmt, middle).tolist() == tie.tolist()
    assert encode(fmt, np.nextafter(middle, -np.inf)).tolist() == lower.tolist()
    assert encode(fmt, np.nextafter(middle, np.inf)).tolist() == (lower + 1).tolist()


@by_name
def test_negative_numbers_mirror_positive_ones(fmt: Format) -> None:
    x = np.abs(interesting(fmt))
    x = x[x <= fmt.max_value]
    expected = -decode(fmt, encode(fmt, x)) if fmt.sign_bits else np.zeros_like(x)
    np.testing.assert_array_equal(decode(fmt, encode(fmt, -x)), expected)


@by_name
def test_too_large_numbers_saturate(fmt: Format) -> None:
    x = np.array([fmt.max_value * 1.0001, fmt.max_value * 10, 1e300, np.inf])
    assert (encode(fmt, x) == fmt.max_code).all()
    lowest = fmt.values[np.isfinite(fmt.values)].min()
    assert (decode(fmt, encode(fmt, -fmt.max_value - x)) == lowest).all()


@by_name
def test_negative_zero(fmt: Format) -> None:
    code = encode(fmt, -0.0)
    assert code == (2 ** (fmt.bits - 1) if fmt.sign_bits and not fmt.is_integer else 0)
    assert fold_negative_zero(fmt, code) == 0
    assert quantize(fmt, np.array([-0.0, 0.0, -1e-9, -5e-324])).tolist() == [0, 0, 0, 0]


@by_name
def test_nan_and_inf(fmt: Format) -> None:
    if np.isnan(fmt.values).any():
        assert np.isnan(decode(fmt, encode(fmt, [np.nan, -np.nan]))).all()
    else:
        with pytest.raises(ValueError, match=f"{fmt.name} has no code for NaN"):
            encode(fmt, [1.0, np.nan])
    high, low = decode(fmt, encode(fmt, [np.inf, -np.inf]))
    assert (high, low) == (fmt.max_value, fmt.values[np.isfinite(fmt.values)].min())


@by_name
def test_quantize_is_symmetric(fmt: Format) -> None:
    x = interesting(fmt)
    codes = quantize(fmt, x)
    assert (np.abs(decode(fmt, codes)) <= fmt.max_value).all()
    differs = codes != encode(fmt, x)
    at_limits = (decode(fmt, codes) == 0) | (x < -fmt.max_value)
    assert at_limits[differs].all()


@by_name
def test_float32_is_quantized_to_the_codes_of_float64(fmt: Format) -> None:
    points = interesting(fmt).astype(np.float32)
    tiny = np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-30, np.inf, -np.inf, 3e38])
    near = np.concatenate([tiny, points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, -points)])
    assert (quantize(fmt, near) == quantize(fmt, near.astype(np.float64))).all()
    assert quantize(fmt, near).dtype == np.uint8


# --- packing -------------------------------------------------------------------------------------------------------


def test_golden_bytes() -> None:
    """Element 2i is the low nibble; four 6-bit codes fill three bytes from the lowest bits up."""
    assert pack(np.array([1, 2, 3, 15], np.uint8), 4).tolist() == [0x21, 0xF3]
    assert pack(np.array([5, 9, 7], np.uint8), 4).tolist() == [0x95, 0x07]
    codes = np.array([0b000001, 0b100010, 0b111100, 0b010111], np.uint8)
    assert pack(codes, 6).tolist() == [0b10_000001, 0b1100_1000, 0b010111_11]
    assert pack(codes[:2], 6).tolist() == [0b10_000001, 0b0000_1000]
    assert pack(np.array([0, 200, 255], np.uint8), 8).tolist() == [0, 200, 255]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.float64])
def test_numbers_of_packed_codes_are_looked_up(bits: int, dtype: type[np.generic]) -> None:
    rng = np.random.default_rng(bits)
    of_code = rng.integers(-100, 100, 2**bits).astype(dtype)
    for count in (1, 7, 16):
        codes = rng.integers(0, 2**bits, (3, count)).astype(np.uint8)
        numbers = looked_up(of_code, pack(codes, bits), count)
        assert numbers.dtype == dtype and numbers.flags.c_contiguous and np.array_equal(numbers, of_code[codes])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packing_equals_the_bit_string(bits: int) -> None:
    """Oracle: all codes as one string of bits, lowest first."""
    rng = np.random.default_rng(bits)
    for count in range(1, 18):
        codes = rng.integers(0, 2**bits, (3, count)).astype(np.uint8)
        as_bits = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(3, -1)
        assert (pack(codes, bits) == np.packbits(as_bits, axis=-1, bitorder="little")).all()
        assert pack(codes, bits).shape == (3, packed_size(bits, count))
        assert (unpack(pack(codes, bits), bits, count) == codes).all()


@pytest.mark.parametrize("bits", [4, 6])
def test_packing_of_arrays_that_are_not_contiguous(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (12, 5, 3)).astype(np.uint8)
    turned = codes.T
    assert (unpack(pack(turned, bits), bits, 12) == turned).all()
    packed = np.asfortranarray(pack(turned, bits))
    assert (unpack(packed, bits, 12) == turned).all()


def test_unpack_checks_the_row_length() -> None:
    with pytest.raises(ValueError, match="4 bytes per row; 10 codes of 4 bits take 5"):
        unpack(np.zeros((2, 4), np.uint8), 4, 10)


# --- the table itself ----------------------------------------------------------------------------------------------


def test_unsigned_formats_of_every_width() -> None:
    widths = {fmt.name: fmt.bits for fmt in UNSIGNED}
    assert {name for name, bits in widths.items() if bits == 4} == {"UE1M3", "UE2M2", "UE3M1", "UE4M0"}
    assert {"UE2M4", "UE3M3", "UE2M6", "UE3M5", "UE4M4"} <= set(widths)


def test_unknown_and_impossible_formats() -> None:
    with pytest.raises(RecipeError, match="number format 'E9M9' is unknown; use one of E2M1"):
        get_format("E9M9")
    with pytest.raises(ValueError, match="5 bits; only 4, 6 and 8 can be packed"):
        Format("E2M2", 1, 2, 2)
    with pytest.raises(ValueError, match="sign_bits must be 0 or 1"):
        Format("odd", 2, 2, 2)
