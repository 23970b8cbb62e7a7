"""Tiles and promotion of the GPU GEMMs: legal for every shape, and what is promised of sums holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.errors import RecipeError
from export.formats.format import decode, get_format, quantize
from export.formats.operands import FP32_BITS
from plugins.gpu.compile import SHARED_KIB, TARGETS
from plugins.gpu.promotion import (
    SHORT_BITS,
    Promotion,
    accumulator_bits,
    largest_product,
    promotion_of,
)
from plugins.gpu.spec import GemmSpec, PackSpec
from plugins.gpu.tile_table import TABLE
from plugins.gpu.tiles import (
    EXPANDED,
    INTERPRETED,
    PACKED,
    architecture,
    band_grid,
    band_tile,
    clocks,
    expand_constants,
    expands_first,
    gemm_constants,
    gemm_grid,
    gemm_tile,
    packed_constants,
    packed_table,
    prefers_integers,
    product_type,
    scales_sums,
)

MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)
# Linear layers of PixArt-XL/2 and DiT-XL/2 (width 1152) and HunyuanDiT (1408): (K, N).
LAYERS = [(1152, 1152), (1152, 3456), (1152, 4608), (4608, 1152), (1408, 4224), (6144, 1408)]
ROWS = [1, 16, 120, 256, 1024, 4096, 8192]


# --- tiles -----------------------------------------------------------------------------------------------------------


def test_rows_of_the_table() -> None:
    """Powers of two as Triton wants them; whole instructions for every warp; a band of tiles."""
    for (unit, kind), rows in TABLE.items():
        assert rows, (unit, kind)
        for tile, share in rows:
            sizes = (tile.m, tile.n, tile.k, tile.num_warps)
            assert all(size > 0 and size & (size - 1) == 0 for size in sizes), (unit, kind, tile)
            assert min(tile.m, tile.n) >= 16 and tile.k >= 32 and tile.splits == 1 and 0 < share < 1
            assert unit.startswith(("mma", "tcgen05")) or tile.num_warps % 4 == 0, "wgmma needs four warps"
            assert max(tile.m, tile.n) >= 64 or not unit.startswith("wgmma"), "wgmma makes 64 rows"


@pytest.mark.parametrize("sm", [INTERPRETED, *TARGETS])
@pytest.mark.parametrize(("k", "n"), LAYERS)
def test_choice_for_real_layers(k: int, n: int, sm: int) -> None:
    """Loads in flight fit into shared memory; without leave nothing is split; splits leave each several steps."""
    limit = SHARED_KIB[sm or 90] * 1024
    for spec in (
        GemmSpec("E2M3", "E2M1", k, n),
        GemmSpec("E2M3", "E2M1", k, n, 64, MULTIPLIERS, epilogue="gate_residual"),
        GemmSpec("E3M2", "E2M1", k, n, 32, (1, 2), epilogue="gate_residual", output="fp32"),
        GemmSpec("INT8", "INT4", k, n, 128, real_groups=True, epilogue="gate_residual", output="fp32"),
    ):
        for rows in ROWS:
            for kernel, weight_bytes in ((PACKED, 0.5), (EXPANDED, 1.0)):
                tile = gemm_tile(kernel, spec, rows, sm)
                assert tile.splits == 1
                assert tile.num_stages * tile.k * (tile.m + weight_bytes * tile.n) <= limit
                split = gemm_tile(kernel, spec, rows, sm, may_split=True)
                assert split.splits == 1 or -(-k // split.k) >= 4 * split.splits


def test_few_rows_are_split_and_many_are_not() -> None:
    spec = GemmSpec("E2M3", "E2M1", 4608, 1152)
    for sm in TARGETS:
        assert gemm_tile(PACKED, spec, 16, sm, may_split=True).splits > 1
        assert gemm_tile(PACKED, spec, 8192, sm, may_split=True).splits == 1


def test_many_rows_take_large_tiles() -> None:
    for sm in TARGETS:
        small, large = (gemm_tile(PACKED, GemmSpec("E2M3", "E2M1", 1152, 4608), rows, sm) for rows in (8, 8192))
        assert small.m * small.n < large.m * large.n


def test_a_step_stays_within_its_group() -> None:
    """By powers of two: a group of 48 is taken in steps of 16 with FP16; FP8's shortest step is 32, with a mask."""
    for group, fp16, fp8 in ((128, 32, 64), (48, 16, 32), (16, 16, 32), (32, 32, 32), (2304, 32, 64)):
        spec = GemmSpec("E2M3", "E2M1", 2304, 1152, group, real_groups=True)
        assert gemm_tile(PACKED, spec, 1024, 80).k == gemm_tile(EXPANDED, spec, 1024, 80).k == fp16
        assert gemm_tile(PACKED, spec, 1024, 90).k == fp8


@pytest.mark.parametrize(("group", "sm", "factor"), [(64, 90, "multiplier"), (128, 89, "multiplier"), (32, 90, "none")])
def test_where_multipliers_go(group: int, sm: int, factor: str) -> None:
    spec = GemmSpec("E2M3", "E2M1", 1152, 1152, group, MULTIPLIERS)
    tile = gemm_tile(PACKED, spec, 1024, sm)
    assert factor == packed_constants(spec, tile, sm)["OPERANDS"].FACTOR
    assert scales_sums(spec, tile.k, sm) == (factor == "multiplier")
    assert gemm_constants(spec, tile, sm)["OPERANDS"].FACTOR == "none", "expanded weights have theirs"
    assert packed_constants(spec, gemm_tile(PACKED, spec, 1024, 80), 80)["OPERANDS"].FACTOR == "none", (
        "FP16 multiplies weights"
    )


@pytest.mark.parametrize("sm", TARGETS)
def test_only_many_tokens_expand_their_weight_first(sm: int) -> None:
    """With groups every GPU does at 8192 tokens, none at 256; what is chosen at some number stays chosen above it."""
    spec = GemmSpec("E2M3", "E2M1", 1152, 4608, 64, MULTIPLIERS)
    chosen = [expands_first(spec, 2**i, sm) for i in range(3, 15)]
    assert not any(chosen[:6]) and chosen[10] and chosen == sorted(chosen)


def test_more_work_takes_longer() -> None:
    spec = GemmSpec("E2M3", "E2M1", 1152, 1152)
    tile = gemm_tile(PACKED, spec, 4096, 90)
    assert clocks(spec, 8192, 90, tile, 0.8) > clocks(spec, 4096, 90, tile, 0.8) > clocks(spec, 4096, 90, tile, 0.9)


def test_grids_cover_everything() -> None:
    spec = GemmSpec("E2M3", "E2M1", 64, 130)
    tile = gemm_tile(PACKED, spec, 33, 90)
    assert gemm_grid(spec, tile, 33) == (-(-33 // tile.m) * -(-130 // tile.n), 1, 1)
    assert band_grid(PackSpec(64), band_tile(PackSpec(64), 9, 80), 9) == (3, 1, 1)


def test_old_and_new_gpus() -> None:
    with pytest.raises(
        RecipeError, match="compute capability 75 is below 80; the GPU kernels need a GPU of 80 or above"
    ):
        gemm_tile(PACKED, GemmSpec("E2M3", "E2M1", 64, 64), 64, 75)
    assert [architecture(sm) for sm in (0, 80, 87, 89, 90, 103, 121)] == [90, 80, 86, 89, 90, 100, 120]
    plain = GemmSpec("E2M3", "E2M1", 64, 64)
    assert [product_type(plain, sm) for sm in (80, 86, 89, 90)] == ["fp16", "fp16", "fp8", "fp8"]
    for spec in (replace(plain, integers=True), replace(plain, activation="INT8")):
        assert [product_type(spec, sm) for sm in (80, 90, 120)] == ["int8"] * 3
    assert product_type(GemmSpec("INT8", "UE3M1", 64, 64), 90) == "fp16", "its image, up to 192, does not fit"
    assert product_type(GemmSpec("E3M4", "E2M1", 64, 64), 90) == "fp16"


def test_int8_is_preferred_where_its_rate_is_the_higher() -> None:
    """On every GPU named, and nowhere where one of them is as quick with FP8, too old, or not there."""
    assert [prefers_integers([sm]) for sm in (0, 75, 80, 86, 89, 90, 100, 120, 121)] == [
        *(False, False), *(True, True, True), *(False, False), *(True, True),
    ]  # fmt: skip
    assert prefers_integers((80, 89, 120)) and not prefers_integers((89, 90)) and not prefers_integers((0, 89))


# --- constants -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 32), min_size=1, max_size=16))
def test_packed_table(multipliers: list[int]) -> None:
    low, high = packed_table(tuple(multipliers))
    assert [((low, high)[i // 8] >> (8 * (i % 8))) & 255 for i in range(len(multipliers))] == multipliers


def test_formats_without_a_kernel_are_refused() -> None:
    spec = GemmSpec("UE5M3", "E2M1", 64, 64)
    with pytest.raises(RecipeError, match="UE5M3: its top binade has the bits of FP16's Inf"):
        packed_constants(spec, gemm_tile(PACKED, spec, 16, 90), 90)


def test_words_are_as_wide_as_rows_allow() -> None:
    tile = band_tile(PackSpec(64), 8, 90)
    widths = [
        expand_constants(GemmSpec("E2M3", "E2M1", k, 8, g), tile, 90)["OPERANDS"].WIDTH
        for k, g in ((64, 0), (66, 0), (60, 6))
    ]
    assert widths == [4, 2, 2]


# --- promotion -------------------------------------------------------------------------------------------------------


def test_accumulators() -> None:
    assert {accumulator_bits(True, sm) for sm in (89, 90)} == {SHORT_BITS}
    assert {accumulator_bits(fp8, sm) for fp8, sm in ((True, 100), (True, 120), (False, 90), (False, 80))} == {
        FP32_BITS
    }


@given(
    st.sampled_from(["E2M1", "E2M3", "E3M2", "E4M3", "E3M4", "INT8"]),
    st.sampled_from(["E2M1", "E1M2", "E3M0", "INT4"]),
    st.integers(1, 5000),
    st.booleans(),
)
def test_exact_means_that_no_data_passes_the_bound(activation: str, weight: str, pairs: int, short: bool) -> None:
    spec = GemmSpec(activation, weight, 2 * pairs, 16)
    promotion = promotion_of(spec, fp8=short, architecture=90)
    largest = np.abs(get_format(activation).integers).max() * np.abs(get_format(weight).integers).max() * 2 * pairs
    bits = 31 if spec.multiplies_integers else SHORT_BITS if short else FP32_BITS
    assert (promotion.holds == "exact") == (largest <= 2**bits)


def test_promotion_of_the_recipes() -> None:
    """E2M1 x E2M3 needs none at the DiT sizes, E3M2 every 128; multipliers shorten it, or follow the sums of groups."""

    def promotion(activation: str, k: int, multipliers: tuple[int, ...] = (1,), by_group: bool = False) -> Promotion:
        spec = GemmSpec(activation, "E2M1", k, 64, 64 if len(multipliers) > 1 else 0, multipliers)
        return promotion_of(spec, fp8=True, architecture=90, by_group=by_group)

    assert promotion("E2M3", 1152) == promotion("E2M3", 4608) == Promotion(0, "expected")
    assert promotion("E3M2", 1152) == Promotion(128, "expected")
    assert promotion("E4M3", 1152) == Promotion(128, "rounded")
    assert promotion("E2M3", 1152, MULTIPLIERS) == Promotion(64, "expected")
    assert promotion("E2M3", 1152, MULTIPLIERS, by_group=True) == Promotion(0, "expected")
    assert promotion_of(GemmSpec("E2M3", "E2M1", 4608, 64), fp8=False, architecture=80) == Promotion(0, "exact")
    assert promotion_of(GemmSpec("E3M4", "E2M1", 1152, 64), fp8=False, architecture=90).holds == "expected"


def test_steps_go_no_further_than_promotion_allows() -> None:
    spec = GemmSpec("E2M3", "E2M1", 1152, 1152, 32, MULTIPLIERS)
    for sm in (89, 90):
        for tile in (gemm_tile(PACKED, spec, 4096, sm), gemm_tile(EXPANDED, spec, 4096, sm)):
            assert tile.k == gemm_constants(spec, tile, sm)["OPERANDS"].PROMOTE == 64
    assert gemm_tile(EXPANDED, GemmSpec("E3M2", "E2M1", 1152, 1152), 4096, 90).k == 128
    assert gemm_constants(spec, gemm_tile(EXPANDED, spec, 4096, 100), 100)["OPERANDS"].PROMOTE == 0


# --- promotion against a model of the short accumulator --------------------------------------------------------------

FRACTION = SHORT_BITS - 1


def cut(value: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Bits below 2^(exponent - FRACTION) dropped."""
    unit = np.ldexp(1.0, exponent - FRACTION)
    return np.trunc(value / unit) * unit


def exponent_of(value: np.ndarray) -> np.ndarray:
    return np.frexp(np.maximum(np.abs(value), 2.0**-100))[1] - 1


def short_sums(a: np.ndarray, w: np.ndarray, every: int) -> np.ndarray:
    """a [M, K], w [N, K] -> [M, N]: 32 products at a time, aligned to the largest with the accumulator and cut, then
    the sum cut; after `every` products added to a float32. The published model of Hopper's FP8 tensor core."""
    total = np.zeros((len(a), len(w)), np.float32)
    short = np.zeros((len(a), len(w)))
    for k in range(0, a.shape[1], 32):
        products = a[:, None, k : k + 32] * w[None, :, k : k + 32]
        top = exponent_of(np.maximum(np.abs(products).max(axis=-1), np.abs(short)))
        added = cut(products, top[..., None]).sum(axis=-1) + cut(short, top)
        short = cut(added, exponent_of(added))
        if every and (k + 32) % every == 0:
            total, short = total + short.astype(np.float32), np.zeros_like(short)
    return total + short


def rows_of(name: str, count: int, k: int, seed: int) -> np.ndarray:
    """Normal rows, each scaled to the format's largest value and rounded."""
    fmt = get_format(name)
    x = np.random.default_rng(seed).normal(size=(count, k))
    return decode(fmt, quantize(fmt, x / np.abs(x).max(axis=1, keepdims=True) * fmt.max_value))


@pytest.mark.parametrize(("activation", "k"), [("E2M3", 1152), ("E2M3", 4608), ("E3M2", 1152), ("E2M1", 4608)])
def test_expected_exact_sums_are_exact_in_the_model(activation: str, k: int) -> None:
    """DEVIATIONS = 3 leaves 0.3 % of partial sums above the bound, and each of those is cut."""
    promotion = promotion_of(GemmSpec(activation, "E2M1", k, 16), fp8=True, architecture=90)
    assert promotion.holds == "expected"
    a, w = rows_of(activation, 8, k, 1), rows_of("E2M1", 16, k, 2)
    inexact = (short_sums(a, w, promotion.every) != a @ w.T).mean()
    assert inexact <= 0.003 * (k / promotion.every if promotion.every else 1)
    if promotion.every:
        assert (short_sums(a, w, 0) != a @ w.T).mean() > 0.3, "promotion is needed"


def test_exact_sums_are_exact_in_the_model_for_the_worst_data() -> None:
    spec = GemmSpec("E2M1", "E1M2", 194, 16)
    assert promotion_of(spec, fp8=True, architecture=90) == Promotion(0, "exact")
    assert largest_product(spec, with_multipliers=False) == 12 * 7
    a, w = np.full((1, 194), 6.0), np.full((1, 194), 3.5)
    assert short_sums(a, w, 0) == 194 * 21
