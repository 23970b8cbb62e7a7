"""GPTQ against Optimal Brain Quantization written out, one input channel after the other with a fresh inverse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ModelError
from export.formats.format import FORMATS, get_format, quantize
from pipeline.calibrate.learn.gptq import Grid, gptq, hessian, inverse_factor
from pipeline.calibrate.scales import find_scales, round_to_codes

N, K = 6, 48
MULTIPLIERS = (1, 2, 3, 4, 5, 6, 8, 10)


def layer(seed=0, n=N, k=K, rows=200):
    """Weight [n, k] float32 and correlated inputs [rows, k] with channels of unequal size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) * 0.3 + np.eye(k)
    inputs = rng.standard_normal((rows, k)) @ mixing * rng.lognormal(0, 1, k)
    return rng.standard_normal((n, k)).astype(np.float32), inputs.astype(np.float32)


def fitted(grid, part, channel_scale):
    """Step [N] of a group whose weights are now part [N, g], and its multipliers."""
    if grid.granularity == "group":
        return find_scales(part[:, None].astype(np.float32), grid.format, (1,), grid.search)[0], None
    errors = []
    for m in grid.multipliers:
        step = channel_scale[:, None].astype(np.float64) * m
        rounded = grid.format.values[quantize(grid.format, part / step)] * step
        errors.append(((rounded - part) ** 2).sum(axis=1))
    multiplier = np.array(grid.multipliers)[np.argmin(errors, axis=0)]
    return channel_scale * multiplier.astype(np.float64), multiplier


def brain_quantization(weight, matrix, grid, damping=0.01):
    """What the method says, with no block, no Cholesky factor: round channel j, move the later ones by the inverse of
    what is left of H. Returns codes, steps [N, groups]."""
    n, k = weight.shape
    group = grid.group_size or k
    h = matrix + damping * np.mean(np.diag(matrix)) * np.eye(k)
    w, codes, steps = weight.astype(np.float64), np.zeros((n, k), np.uint8), []
    blocks = weight.reshape(n, -1, k if grid.granularity == "per_channel" else group)
    channel_scale = find_scales(blocks, grid.format, grid.multipliers, grid.search)[0]
    for j in range(k):
        if j % group == 0:
            part = w[:, j : j + group]
            steps.append(channel_scale if grid.granularity == "per_channel" else fitted(grid, part, channel_scale)[0])
        step = steps[-1].astype(np.float64)
        codes[:, j] = quantize(grid.format, w[:, j] / step)
        inverse = np.linalg.inv(h[j:, j:])
        error = (w[:, j] - grid.format.values[codes[:, j]] * step) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return codes, np.stack(steps, axis=1)


def stored(rounded, grid, k=K):
    """[N, K] weight that the codes stand for."""
    step = rounded.scales * rounded.multipliers
    return grid.format.values[rounded.codes] * np.repeat(step, k // step.shape[1], axis=1)


def rounded_to_nearest(weight, grid):
    n, k = weight.shape
    group = grid.group_size or k
    blocks = weight.reshape(n * (k // group) if grid.granularity == "group" else n, -1, group)
    scales, multipliers = find_scales(blocks, grid.format, grid.multipliers, grid.search)
    codes = round_to_codes(blocks, grid.format, scales, multipliers)
    steps = (scales[:, None].astype(np.float64) * multipliers)[..., None]
    return (grid.format.values[codes] * steps).reshape(n, k)


GRIDS = [("per_channel", 0, (1,)), ("group", 8, (1,)), ("group", 24, (1,)), ("exact_group", 16, MULTIPLIERS)]


@pytest.mark.parametrize("name", ["INT4", "INT6", "E2M1", "E3M0", "E2M3"])
@pytest.mark.parametrize(("granularity", "group", "multipliers"), GRIDS)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_it_is_optimal_brain_quantization(name, granularity, group, multipliers, search):
    weight, inputs = layer()
    matrix, grid = hessian([inputs], K), Grid(get_format(name), granularity, group, multipliers, search)
    rounded = gptq(weight, matrix, grid)
    codes, steps = brain_quantization(weight, matrix, grid)
    np.testing.assert_array_equal(rounded.codes, codes)
    own = rounded.scales * rounded.multipliers.astype(np.float64)
    np.testing.assert_array_equal(np.broadcast_to(own, (N, steps.shape[1])) if own.shape[1] == 1 else own, steps)


@pytest.mark.parametrize("group", [0, 16, 32, 96, 160])
def test_blocks_change_nothing(group, monkeypatch):
    """Groups shorter and longer than a block, and blocks of one channel: the same codes."""
    weight, inputs = layer(1, 4, 480, 700)
    matrix = hessian([inputs], 480)
    grid = Grid(get_format("INT4"), "group" if group else "per_channel", group)
    whole = gptq(weight, matrix, grid)
    monkeypatch.setattr("pipeline.calibrate.learn.gptq.BLOCK", 1)
    single = gptq(weight, matrix, grid)
    np.testing.assert_array_equal(whole.codes, single.codes)
    np.testing.assert_array_equal(whole.scales, single.scales)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["INT4", "E2M1", "INT6"]), case=st.sampled_from(GRIDS))
def test_output_error_is_below_that_of_rounding_to_nearest(seed, name, case):
    """Large inputs first, it always is here: at most 0.45 times that of 1,920 layers measured."""
    weight, inputs = layer(seed, 32)
    assert relative_error(weight, inputs, name, case, act_order=True) < 1


@pytest.mark.parametrize("case", GRIDS)
def test_output_error_in_the_order_of_channels_is_lower_on_the_whole(case):
    """Single layers may lose (up to 1.4 times has been seen), as late channels have to make up for early ones at the
    bounds of the grid. The mean over 40 seeds was 0.45 to 0.64."""
    errors = [relative_error(*layer(seed, 32), "E2M1", case, act_order=False) for seed in range(12)]
    assert np.exp(np.mean(np.log(errors))) < 0.8


def output_error(error, inputs):
    """Squared error of the output on inputs [rows, k], of the weight error [n, k]."""
    return float(np.square(inputs.astype(np.float64) @ error.T).sum())


def relative_error(weight, inputs, name, case, act_order):
    granularity, group, multipliers = case
    matrix, grid = hessian([inputs], K), Grid(get_format(name), granularity, group, multipliers, "mse")
    learned = stored(gptq(weight, matrix, grid, act_order=act_order), grid) - weight
    nearest = rounded_to_nearest(weight, grid) - weight
    return output_error(learned, inputs) / output_error(nearest, inputs)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight, _ = layer()
    grid = Grid(get_format("E2M1"), "exact_group", 16, MULTIPLIERS, "mse")
    for matrix in (np.eye(K), np.zeros((K, K)), np.diag(np.arange(1.0, K + 1))):
        np.testing.assert_allclose(stored(gptq(weight, matrix, grid), grid), rounded_to_nearest(weight, grid))


def test_act_order_keeps_codes_in_their_places_and_scales_of_the_float_weight():
    weight, inputs = layer(3)
    matrix, grid = hessian([inputs], K), Grid(get_format("INT4"), "group", 16)
    order = np.argsort(-np.diag(matrix), kind="stable")
    rounded = gptq(weight, matrix, grid, act_order=True)
    scales = np.abs(weight.reshape(N, -1, 16)).max(axis=2) / np.float32(7)
    np.testing.assert_array_equal(rounded.scales, scales)
    w, h = weight[:, order].astype(np.float64), matrix[np.ix_(order, order)]
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(K)
    for j, channel in enumerate(order):
        step = scales[:, channel // 16].astype(np.float64)
        np.testing.assert_array_equal(rounded.codes[:, channel], quantize(grid.format, w[:, j] / step))
        inverse = np.linalg.inv(h[j:, j:])
        w[:, j:] -= ((w[:, j] - grid.format.values[rounded.codes[:, channel]] * step) / inverse[0, 0])[
            :, None
        ] * inverse[0]


@pytest.mark.torch
def test_the_factor_is_that_of_the_damped_inverse():
    _, inputs = layer(4)
    matrix = hessian([inputs[:90], inputs[90:]], K)
    np.testing.assert_allclose(matrix, inputs.astype(np.float64).T @ inputs, rtol=1e-4, atol=1e-3 * matrix.max())
    upper = inverse_factor(matrix, 0.01, "layer")
    mean = np.trace(matrix) / K
    assert np.allclose(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ (matrix / mean + 0.01 * np.eye(K)), np.eye(K), atol=1e-10)


def test_broken_inputs_are_refused_by_name():
    weight, inputs = layer()
    inputs[3, 4] = np.nan
    with pytest.raises(ModelError, match=r"blocks\.2\.ff: calibration gave it inputs that are NaN or Inf"):
        gptq(weight, hessian([inputs], K), Grid(FORMATS["INT4"]), name="blocks.2.ff")
