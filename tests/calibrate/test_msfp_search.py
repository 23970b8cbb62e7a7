"""MSFP's search against brute force: every candidate quantized and measured number by number."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from export.dialect.reference import dequantize_activation, quantize_activation
from export.errors import ModelError, RecipeError
from export.formats.format import (
    decode,
    encode,
    get_format,
    quantize,
)
from export.formats.operands import INT16_MAX
from pipeline.calibrate.methods.msfp_search import (
    CLIPS,
    SPANS,
    ZEROS,
    search_range,
    search_token_format,
    search_weight,
    splits,
)
from pipeline.calibrate.plan import LayerPlan, group_multipliers
from pipeline.calibrate.scales import REACHES

RNG = np.random.default_rng(3)


def gelu_like(count=600):
    x = RNG.standard_normal(count) * 1.5
    return np.where(x > 0, x, -0.17 * np.exp(-np.abs(x)) * np.abs(x) * 2.7)


def brute_force(x, formats):
    """(error, format name) of the best candidate, each rounded by the codec."""
    candidates = []
    absmax, low, high = np.abs(x).max(), min(x.min(), 0.0), x.max()
    for fmt in formats:
        if fmt.sign_bits:
            for share in CLIPS:
                scale = np.float64(np.float32(share * absmax / fmt.max_value))
                candidates.append((np.square(decode(fmt, quantize(fmt, x / scale)) * scale - x).sum(), fmt.name))
        else:
            for zero, share in product(np.linspace(low, 0, ZEROS).astype(np.float32).astype(float), SPANS):
                scale = np.float64(np.float32(share * (high - low) / fmt.max_value))
                codes = encode(fmt, np.clip(x - zero, 0, scale * fmt.max_value) / scale)
                candidates.append((np.square(zero + decode(fmt, codes) * scale - x).sum(), fmt.name))
    return min(candidates)


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("values", [gelu_like(), RNG.standard_t(4, 500), RNG.uniform(-1, 1, 400)])
def test_activation_search_finds_what_brute_force_finds(bits, values):
    formats = splits(bits, signed=True) + splits(bits, signed=False, embedded=True)
    chosen, error = search_range([values[:100], values[100:].reshape(-1, 4)], formats, "layer")
    expected, name = brute_force(values, formats)
    assert chosen.format.name == name
    np.testing.assert_allclose(error, expected, rtol=1e-9)


def test_one_sided_values_take_an_unsigned_format_and_symmetric_ones_a_signed():
    both = splits(4, signed=True) + splits(4, signed=False, embedded=True)
    one_sided, symmetric = gelu_like(4000), RNG.standard_t(3, 4000)  # as activations are: a few far out
    unsigned, mixed_error = search_range([one_sided], both, "layer")
    _, signed_error = search_range([one_sided], splits(4, signed=True), "layer")
    assert not unsigned.format.sign_bits and unsigned.zero is not None and unsigned.zero[0] <= 0
    assert mixed_error < 0.6 * signed_error  # the sign's bit doubles the codes: up to 4 times less
    assert search_range([symmetric], both, "layer")[0].format.sign_bits


def test_splits_are_different_grids_and_embedded_ones_are_8_bit_operands():
    names = [fmt.name for fmt in splits(8, signed=True)]
    assert {"E3M4", "E4M3", "E5M2", "INT8"} == set(names)
    for bits, signed in product((4, 6, 8), (True, False)):
        assert all(fmt.kmax <= (127 if signed else 255) for fmt in splits(bits, signed, embedded=True))
    assert "INT4" not in [fmt.name for fmt in splits(4, signed=True)]  # the grid of E1M2


def make_plan(weight, weight_format="E2M1", activation="E2M1", granularity="per_channel", group_size=0):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(torch.from_numpy(weight.astype(np.float32)), requires_grad=False)
    multipliers = group_multipliers(weight_format, activation) if granularity == "exact_group" else (1,)
    ref = SimpleNamespace(name="layer", kind="ff.out", module=linear)
    return LayerPlan(ref, weight_format, activation, granularity, group_size, multipliers)


def weight_error(row, fmt):
    """Least squared error of one channel over all clips, rounded by the codec."""
    scales = [np.float64(np.float32(np.abs(row).max() / fmt.max_value) * np.float32(reach)) for reach in REACHES]
    return min(np.square(decode(fmt, quantize(fmt, row / scale)) * scale - row).sum() for scale in scales)


@pytest.mark.parametrize("seed", range(3))
def test_weight_search_finds_the_format_and_error_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((5, 48)) if seed else rng.uniform(-1, 1, (5, 48))).astype(np.float32)
    errors = {fmt.name: sum(weight_error(row.astype(float), fmt) for row in weight) for fmt in splits(4, True, True)}
    layer = search_weight(make_plan(weight))
    assert layer.weight_format == min(errors, key=errors.get)
    error = np.square(layer.dequantized() - weight).sum()
    # The search rounds each squared error in float32: 48 terms, each some 2^-22 off.
    np.testing.assert_allclose(error, errors[layer.weight_format], rtol=48 * 2.0**-22)


@pytest.mark.parametrize("name", ["E2M1", "E1M2", "E3M0"])
def test_a_weight_on_a_grid_is_found_exactly(name):
    fmt = get_format(name)
    codes = RNG.integers(0, fmt.max_code + 1, (4, 64))
    codes[:, 0] = fmt.max_code
    weight = decode(fmt, codes.astype(np.uint8)) * 0.25
    layer = search_weight(make_plan(weight, "E2M1"))
    assert layer.weight_format == name
    np.testing.assert_array_equal(layer.dequantized(), weight)


def test_the_searched_format_brings_its_own_group_multipliers():
    weight = RNG.standard_normal((4, 64)).astype(np.float32) * np.repeat([1.0, 0.1], 32)
    plan = make_plan(weight, granularity="exact_group", group_size=32)
    grouped = search_weight(replace(plan, activation_format="UE3M1"))
    assert grouped.granularity == "exact_group"
    largest = int(np.abs(grouped.integers()).max())
    assert 2 * get_format("UE3M1").kmax * largest <= INT16_MAX
    kept = search_weight(replace(plan, weight_format="E3M0"), search_format=False)
    assert (kept.weight_format, kept.granularity) == ("E3M0", "per_channel")  # no multipliers but 1


def test_token_format_is_the_best_of_all_by_the_ops():
    x = RNG.standard_t(3, (40, 32)).astype(np.float32)
    errors = {}
    for fmt in splits(4, signed=True):
        (rounded,) = dequantize_activation(*quantize_activation(x, format=fmt.name), format=fmt.name)
        errors[fmt.name] = np.square(rounded.astype(float) - x).sum()
    chosen, error = search_token_format([torch.from_numpy(x)], splits(4, signed=True), "layer")
    assert chosen.name == min(errors, key=errors.get)
    # Differences of float32 numbers: each squared error is off by some 2^-22 of itself.
    np.testing.assert_allclose(error, errors[chosen.name], rtol=1e-5)


def test_bad_inputs_are_told():
    with pytest.raises(ModelError, match=r"blocks.3.ff: 1 of 3 calibration values are NaN"):
        search_range([np.array([1.0, np.nan, 2.0])], splits(4, True), "blocks.3.ff")
    with pytest.raises(RecipeError, match="no number format is left"):
        search_range([np.ones(3)], (), "blocks.3.ff")
    with pytest.raises(RecipeError, match="no number format is left"):
        search_token_format([torch.ones(3, 4)], (), "blocks.3.ff")


def test_a_tensor_of_zeros_gets_a_scale_above_zero():
    for formats in (splits(4, True), splits(4, False, embedded=True)):
        chosen, error = search_range([np.zeros((3, 4))], formats, "layer")
        assert chosen.scale[0] > 0 and error == 0
        assert encode(chosen.format, np.zeros(1))[0] == 0
