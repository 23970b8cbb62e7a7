"""Exact embedding: the published table is computed, and every product of two codes is exact where it says so."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from export.errors import RecipeError
from export.formats.format import FORMATS, decode, encode, get_format, to_integers
from export.formats.operands import embeds, exact_multipliers, exact_sum_limit

# format: (f, kmax, INT8, E4M3, FP16)
TABLE = {
    "E2M1": (1, 12, True, True, True),
    "E1M2": (1, 7, True, True, True),
    "E3M0": (2, 64, True, True, True),
    "E2M3": (3, 60, True, True, True),
    "E3M2": (4, 448, False, True, True),
    "E3M4": (6, 1984, False, False, True),
    "INT4": (0, 7, True, True, True),
    "INT6": (0, 31, True, False, True),
    "INT8": (0, 127, True, False, True),
    # The 4-bit unsigned formats; their codes 8..15 need the fourth bit that a signed format gives to the sign.
    "UE2M2": (2, 28, True, True, True),
    "UE1M3": (2, 15, True, True, True),
    "UE3M1": (3, 192, False, True, True),
    "UE4M0": (6, 16384, False, True, True),
    # Wide unsigned ones.
    "UE2M4": (4, 124, True, False, True),
    "UE3M3": (5, 960, False, True, True),
}


@pytest.mark.parametrize("name", TABLE)
def test_row_of_the_table(name: str) -> None:
    fmt = get_format(name)
    embedded = tuple(embeds(name, target) for target in ("INT8", "E4M3", "FP16"))
    assert (fmt.fraction_bits, fmt.kmax, *embedded) == TABLE[name]


def brute_force(name: str, target: np.dtype, multiplier: int = 1) -> bool:
    """Some power of two puts all values on the type: tried through the type's own conversions, ml_dtypes or NumPy."""
    fmt = get_format(name)
    values = np.unique(np.abs(fmt.values[np.isfinite(fmt.values)]))
    values = values[values <= fmt.max_value] * multiplier
    for exponent in range(-40, 41):
        # Values and powers of two are exact in float32, which ml_dtypes converts from without a second rounding.
        scaled = np.ldexp(values, exponent).astype(np.float32)
        with np.errstate(over="ignore"):
            if (scaled.astype(target).astype(np.float32) == scaled).all():
                return True
    return False


FLOAT_TYPES = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


@pytest.mark.parametrize("target", FLOAT_TYPES)
def test_float_targets_equal_brute_force(target: str) -> None:
    for name in (name for name, row in FORMATS.items() if row.specials == "none"):
        assert embeds(name, target) == brute_force(name, np.dtype(FLOAT_TYPES[target])), name


@pytest.mark.parametrize("target", FLOAT_TYPES)
@pytest.mark.parametrize("name", ["INT8", "E2M3", "E3M4", "INT6", "E4M3", "UE4M2"])
def test_float_targets_with_multipliers_equal_brute_force(name: str, target: str) -> None:
    """Products with up to 13 significant bits: on both sides of every type's precision."""
    for multiplier in range(1, 33):
        assert embeds(name, target, multiplier) == brute_force(name, np.dtype(FLOAT_TYPES[target]), multiplier)


def test_fp32_holds_every_format() -> None:
    assert all(embeds(name, "FP32") for name, row in FORMATS.items() if row.specials == "none")


MULTIPLIERS = {
    ("E2M1", ("INT8", "E4M3")): (1, 2, 3, 4, 5, 6, 8, 10),
    ("E2M1", ("INT8",)): tuple(range(1, 11)),
    ("E1M2", ("INT8",)): tuple(range(1, 19)),
    ("E3M0", ("INT8",)): (1,),
    ("INT4", ("INT8",)): tuple(range(1, 19)),
    ("E3M4", ("INT8",)): (),
    ("E2M1", ("E4M3",)): (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32),
    # 1..15 have four significant bits; above, their multiples by two.
    ("E3M0", ("E4M3",)): (*range(1, 16), *range(16, 31, 2), 32),
}


@pytest.mark.parametrize(("name", "targets"), MULTIPLIERS)
def test_exact_multiplier_sets(name: str, targets: tuple[str, ...]) -> None:
    assert exact_multipliers(name, targets) == MULTIPLIERS[name, targets]


@pytest.mark.parametrize("name", ["E2M1", "E1M2", "E3M0", "INT4"])
def test_multipliers_equal_brute_force(name: str) -> None:
    multipliers = tuple(m for m in range(1, 33) if brute_force(name, np.dtype(ml_dtypes.float8_e4m3fn), m))
    assert exact_multipliers(name, ("E4M3",)) == multipliers
    assert exact_multipliers(name, ("INT8",)) == tuple(m for m in range(1, 33) if get_format(name).kmax * m <= 127)


def test_kmax_limit_bounds_the_set() -> None:
    assert exact_multipliers("E2M1", ("INT8", "E4M3"), kmax_limit=64) == (1, 2, 3, 4, 5)


def finite_codes(name: str) -> np.ndarray:
    """Codes that a quantizer emits: within +-max_value."""
    fmt = get_format(name)
    return np.flatnonzero(np.abs(fmt.values) <= fmt.max_value).astype(np.uint8)


PAIRS = list(itertools.product(("E2M3", "E2M1", "INT6", "UE2M2"), ("E2M1", "E1M2", "E3M0", "INT4")))


@pytest.mark.parametrize(("activation", "weight"), PAIRS)
def test_every_product_is_exact_in_int8(activation: str, weight: str) -> None:
    """All codes x all codes x all multipliers: int8 operands, int32 product = product of values times 2^(fa + fw)."""
    a_fmt, w_fmt = get_format(activation), get_format(weight)
    a, w = finite_codes(activation), finite_codes(weight)
    for m in exact_multipliers(weight, ("INT8",)):
        a_image, w_image = to_integers(a_fmt, a), to_integers(w_fmt, w) * m
        assert (a_image.astype(np.int8) == a_image).all()
        assert (w_image.astype(np.int8) == w_image).all()
        product = a_image.astype(np.int8)[:, None].astype(np.int32) * w_image.astype(np.int8)[None, :]
        exact = np.outer(decode(a_fmt, a), decode(w_fmt, w)) * m * 2.0 ** (a_fmt.fraction_bits + w_fmt.fraction_bits)
        assert (product == exact).all()


@pytest.mark.parametrize(("activation", "weight"), [p for p in PAIRS if "INT6" not in p])
def test_every_product_is_exact_in_fp8(activation: str, weight: str) -> None:
    """The same with E4M3 operands and ONE power of two for all multipliers of a weight: its rows share one scale."""
    e4m3 = ml_dtypes.float8_e4m3fn
    a, w = (get_format(name).values[finite_codes(name)].astype(np.float32) for name in (activation, weight))
    multipliers = np.array(exact_multipliers(weight, ("E4M3",)), np.float32)
    w_all = np.outer(multipliers, w)
    shift = next(e for e in range(8, -30, -1) if (np.ldexp(w_all, e).astype(e4m3) == np.ldexp(w_all, e)).all())
    operands = np.ldexp(w_all, shift).astype(e4m3).astype(np.float32)
    assert (a.astype(e4m3).astype(np.float32) == a).all()
    product = a[:, None, None] * operands
    exact = a.astype(np.float64)[:, None, None] * np.ldexp(w_all.astype(np.float64), shift)
    assert (product == exact).all()


def test_e2m3_is_the_bottom_of_e4m3() -> None:
    """u * 2^-6 rounded to E4M3 is the E2M3 quantizer of u, ties included, over the whole range."""
    fmt, e4m3 = get_format("E2M3"), get_format("E4M3")
    grid = fmt.values[: fmt.max_code + 1]
    middle = (grid[1:] + grid[:-1]) / 2
    u = np.concatenate([grid, middle, np.nextafter(middle, 0), np.nextafter(middle, 9), np.linspace(0, 7.5, 100001)])
    u = np.concatenate([u, -u])
    assert (decode(e4m3, encode(e4m3, u / 64)) * 64 == decode(fmt, encode(fmt, u))).all()


def test_sums_are_exact_up_to_the_limit() -> None:
    assert exact_sum_limit(60, 12) == 23301
    assert exact_sum_limit(60, 120) == 2330
    assert 23301 * 60 * 12 <= 2**24 < 23302 * 60 * 12
    # The worst sum at the limit, added up in float32 in the worst order (one at a time), is the integer itself.
    assert np.cumsum(np.full(23301, 720, np.float32), dtype=np.float32)[-1] == 23301 * 720


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match="number format 'E0M9' is unknown"):
        embeds("E0M9", "INT8")
    with pytest.raises(RecipeError, match="'INT9' is no embedding type"):
        embeds("E2M1", "INT9")
