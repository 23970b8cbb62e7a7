"""Weight scales against a slow and obvious search, and against what is known of them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.dialect.reference import quantize_weight
from export.formats.format import FORMATS, decode, encode, get_format
from export.formats.operands import embeds, pair_limit
from pipeline import machine
from pipeline.calibrate import scales as scales_module
from pipeline.calibrate.plan import group_multipliers
from pipeline.calibrate.scales import REACHES, RoundingErrors, find_scales, round_to_codes
from plugins.cpu import library, rounding_errors

E2M1 = (1, 2, 3, 4, 5, 6, 8, 10)
WEIGHT_FORMATS = ("E2M1", "E1M2", "E3M0", "E2M3", "E3M2", "E4M3", "INT4", "INT6", "INT8")
ROUNDING = 2.0**-24  # largest relative error of one float32 operation


def exact_error(fmt, values, step):
    """Squared error of the nearest codes of `values` at scale `step`, by the codec in float64."""
    bounded = np.clip(np.asarray(values, np.float64) / step, -fmt.max_value, fmt.max_value)
    return float(((decode(fmt, encode(fmt, bounded)) * step - values) ** 2).sum())


def brute_force(fmt, row, multipliers):
    """Least error of one row [G, g] over every reach and every choice of multipliers."""
    widest = np.abs(row).max() / (fmt.max_value * max(multipliers))
    totals = [
        sum(min(exact_error(fmt, group, widest * reach * m) for m in multipliers) for group in row) for reach in REACHES
    ]
    return min(totals)


def sqnr_db(weight, fmt, blocks, scales, multipliers):
    codes = round_to_codes(blocks, fmt, scales, multipliers)
    step = (scales[:, None].astype(np.float64) * multipliers)[..., None]
    error = decode(fmt, codes) * step - blocks
    return 10 * np.log10((weight.astype(np.float64) ** 2).sum() / (error**2).sum())


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 3, 5)])
def test_mse_search_finds_what_brute_force_finds(name, multipliers):
    fmt, rng = get_format(name), np.random.default_rng(1)
    blocks = (rng.standard_t(4, (5, 3, 8)) * 0.03).astype(np.float32)
    scales, chosen = find_scales(blocks, fmt, multipliers, "mse")
    for row, scale, factors in zip(blocks, scales, chosen, strict=True):
        error = sum(exact_error(fmt, group, float(scale) * int(m)) for group, m in zip(row, factors, strict=True))
        # Two candidates are told apart by float32 sums: each squared error is off by the error of a value of up to
        # max_value (one multiplication, one addition, one subtraction) against a remainder of half a step or less.
        slack = 3 * ROUNDING * 2 * np.abs(row).max() * np.sqrt(row.size * brute_force(fmt, row, multipliers))
        assert error <= brute_force(fmt, row, multipliers) * (1 + 1e-5) + slack


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_rounding_by_addition_makes_the_errors_of_the_codec(name):
    fmt, rng = get_format(name), np.random.default_rng(2)
    blocks = np.abs(rng.standard_normal((4, 3, 16))).astype(np.float32)
    scale = np.array([1e-3, 0.07, 0.3, 2.0], np.float32)
    errors = RoundingErrors(blocks, fmt).at(scale[:, None])[:, 0]
    expected = [[exact_error(fmt, group, float(s)) for group in row] for row, s in zip(blocks, scale, strict=True)]
    # An error e of a value v <= clip + e is computed to within 3 roundings of v, so e^2 to within 6 v e roundings.
    bound = 6 * ROUNDING * 16 * np.abs(blocks).max() * np.sqrt(np.array(expected)) + 1e-5 * np.array(expected) + 1e-12
    assert (np.abs(errors - expected) <= bound).all()


@pytest.fixture(scope="module", params=["gcc", "clang"])
def function(request):
    """Of the C source, by one compiler."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "COMPILERS", (request.param,))
        compiled = rounding_errors.compiled.__wrapped__()
    assert compiled is not None
    return compiled


@pytest.mark.parametrize("shape", [(5, 3, 8), (7, 2, 64), (3, 1, 1152), (4, 5, 100), (2, 3, 1), (3, 4, 17)])
def test_c_and_numpy_give_the_same_bits(shape, function):
    rng = np.random.default_rng(4)
    blocks = np.abs(rng.standard_t(3, shape)).astype(np.float32)
    blocks[0] = 0
    scale = rng.uniform(0.01, 2, (len(blocks), 19)).astype(np.float32)
    for name in WEIGHT_FORMATS:
        errors = RoundingErrors(blocks, get_format(name))
        errors.function = function
        fast, errors.function = errors.at(scale), None
        np.testing.assert_array_equal(fast, errors.at(scale), err_msg=name)


def test_scales_do_not_depend_on_a_compiler(monkeypatch):
    blocks = np.random.default_rng(5).standard_normal((40, 6, 32)).astype(np.float32)
    fast = find_scales(blocks, get_format("E2M1"), E2M1, "mse")
    monkeypatch.setattr(rounding_errors, "compiled", lambda: None)
    for one, other in zip(fast, find_scales(blocks, get_format("E2M1"), E2M1, "mse"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_a_compiler_numpy_is_taken_and_told(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(library.shutil, "which", lambda _: None)
    assert rounding_errors.compiled.__wrapped__() is None
    assert "searched by NumPy, some times slower: cpu.path fused needs one of cc" in caplog.text


@pytest.mark.parametrize("multipliers", [(1,), E2M1])
def test_absmax_clips_nothing_and_takes_the_smallest_multiplier(multipliers):
    fmt, blocks = get_format("E2M1"), np.random.default_rng(3).standard_normal((6, 5, 8)).astype(np.float32)
    scales, chosen = find_scales(blocks, fmt, multipliers, "absmax")
    reach = scales[:, None].astype(np.float64) * fmt.max_value
    absmax = np.abs(blocks).max(axis=2)
    assert (absmax <= reach * chosen * (1 + 2e-6)).all()
    smaller = np.array([max([m for m in multipliers if m < c], default=0) for c in chosen.ravel()]).reshape(
        chosen.shape
    )
    assert (absmax > reach * smaller).all()
    np.testing.assert_allclose(
        scales * fmt.max_value * max(multipliers), np.abs(blocks).max(axis=(1, 2)), rtol=3 * ROUNDING
    )


@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_rows_of_zeros_and_tiny_rows_have_normal_scales_and_zero_error(search):
    blocks = np.zeros((3, 2, 4), np.float32)
    blocks[1] = 1e-38
    blocks[2, 0, 0] = 1.0
    fmt = get_format("E2M1")
    scales, chosen = find_scales(blocks, fmt, E2M1, search)
    assert (scales >= np.finfo(np.float32).tiny).all() and (chosen >= 1).all()
    codes = round_to_codes(blocks, fmt, scales, chosen)
    assert (codes[:2] == 0).all() and (codes[2].ravel()[1:] == 0).all()


def test_neither_threads_nor_chunks_change_a_byte(monkeypatch):
    blocks = np.random.default_rng(4).standard_normal((64, 4, 32)).astype(np.float32)
    whole = find_scales(blocks, get_format("E2M1"), E2M1, "mse")
    for chunk, threads in ((1, 1), (500, 3)):
        monkeypatch.setattr(scales_module, "CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(machine, "threads", lambda threads=threads: threads)
        again = find_scales(blocks, get_format("E2M1"), E2M1, "mse")
        assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))


def test_no_more_threads_than_the_one_rule_allows(monkeypatch):
    thread_counts = []

    class Counted(ThreadPoolExecutor):
        def __init__(self, threads):
            thread_counts.append(threads)
            super().__init__(threads)

    monkeypatch.setattr(scales_module, "ThreadPoolExecutor", Counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    find_scales(np.ones((3, 2, 4), np.float32), get_format("E2M1"), E2M1, "absmax")
    assert thread_counts == [1]


@pytest.mark.parametrize(("name", "multipliers"), [("E2M1", E2M1), ("INT4", (1, 2, 3)), ("E3M0", (1,))])
def test_codes_are_those_of_the_op(name, multipliers):
    fmt, rng = get_format(name), np.random.default_rng(5)
    blocks = rng.standard_normal((4, 6, 8)).astype(np.float32)
    scales, chosen = find_scales(blocks, fmt, multipliers, "mse")
    codes = round_to_codes(blocks, fmt, scales, chosen)
    index = np.searchsorted(multipliers, chosen)
    packed = (index[:, ::2] | index[:, 1::2] << 4).astype(np.uint8)
    attributes = dict(format=name, in_features=48, group_size=8, multipliers=multipliers)
    (expected,) = quantize_weight(blocks.reshape(4, 48).T, scales[:, None], packed, **attributes)
    nibbles = codes.reshape(4, 48)
    assert np.array_equal(nibbles[:, ::2] | nibbles[:, 1::2] << 4, expected)


def outlier_columns():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((128, 1152))
    weight[:, rng.choice(1152, 12)] *= 8
    return weight.astype(np.float32)


def test_exact_groups_beat_one_scale_per_channel_on_outlier_columns():
    weight, fmt = outlier_columns(), get_format("E2M1")
    sqnr = {}
    for label, group, multipliers in (("channel", 1152, (1,)), ("g64", 64, E2M1), ("g32", 32, E2M1)):
        blocks = weight.reshape(128, -1, group)
        sqnr[label] = sqnr_db(weight, fmt, blocks, *find_scales(blocks, fmt, multipliers, "mse"))
    real = weight.reshape(-1, 1, 64)
    sqnr["real g64"] = sqnr_db(weight, fmt, real, *find_scales(real, fmt, (1,), "mse"))
    # Known for 256 rows of this kind: 12.16, 17.28, 18.65 and 17.78 dB.
    assert sqnr["g64"] > sqnr["channel"] + 4 and sqnr["g32"] > sqnr["g64"] + 0.8
    assert abs(sqnr["g64"] - sqnr["real g64"]) < 1


def test_mse_search_is_never_worse_than_absmax():
    blocks, fmt = outlier_columns().reshape(128, -1, 64), get_format("E2M1")
    sqnr = {s: sqnr_db(blocks, fmt, blocks, *find_scales(blocks, fmt, E2M1, s)) for s in ("absmax", "mse")}
    assert sqnr["mse"] > sqnr["absmax"]


@pytest.mark.parametrize("weight", [name for name in FORMATS if embeds(name, "INT8")])
@pytest.mark.parametrize("activation", ["E2M3", "E3M4", "INT8", "E2M1"])
def test_group_multipliers_keep_every_bound(weight, activation):
    multipliers = group_multipliers(weight, activation)
    assert multipliers[0] == 1 and len(multipliers) <= 16
    fmt, other = get_format(weight), get_format(activation)
    for m in multipliers[1:]:
        assert embeds(weight, "INT8", m) and fmt.kmax * m <= pair_limit(activation)
        assert embeds(weight, "E4M3", m) or not (embeds(weight, "E4M3") and embeds(activation, "E4M3"))
    if embeds(activation, "INT8") and len(multipliers) > 1:
        zero_point = 2 ** int(np.ceil(np.log2(other.kmax)))
        assert 2 * (other.kmax + zero_point) * fmt.kmax * max(multipliers) <= 32767


@pytest.mark.parametrize("exponent", [-90, -60, 60, 90])
def test_rows_of_any_size_are_searched_alike(exponent):
    """A row times a power of two has its scale times that, and the same multipliers."""
    blocks = np.random.default_rng(6).standard_normal((6, 4, 32)).astype(np.float32)
    scaled = blocks * np.where(np.arange(6) % 2, np.float32(2.0**exponent), np.float32(1))[:, None, None]
    usual, odd = (find_scales(rows, get_format("E2M1"), E2M1, "mse") for rows in (blocks, scaled))
    np.testing.assert_array_equal(odd[0] / np.where(np.arange(6) % 2, 2.0**exponent, 1), usual[0])
    np.testing.assert_array_equal(odd[1], usual[1])
