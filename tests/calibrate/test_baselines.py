"""The methods that papers compare with: each learned quantity against a slow computation of the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.errors import RecipeError
from export.formats.format import FORMATS, get_format
from pipeline.backends.reference import FakeQuantLinear
from pipeline.calibrate.learn.reconstruct import output_loss
from pipeline.calibrate.methods import ptq4dit, repq_vit, vidit_q
from pipeline.calibrate.methods.ptq4dm import skewed_shares, thinned
from pipeline.calibrate.static_activations import TAILS
from tests.support import observed

pytestmark = pytest.mark.torch

METHODS = ("ptq4dm", "repq_vit", "tfmq_dm", "ptq4dit", "vidit_q")
FEW = "calibrate.options.iterations=30"
LEARNING = {"tfmq_dm": (FEW,), "ptq4dit": (FEW,)}
FLOATS = ("formats.weight=E2M1", "formats.activation=E2M3")
WIDE = ("formats.weight=INT8", "formats.activation=INT8")


def short(name):
    return name.removeprefix("blocks.0.")


def layers_of(method, *settings, **kwargs):
    calibrator, unit = observed.make(method, *LEARNING.get(method, ()), *settings, **kwargs)
    return {short(layer.name): layer for layer in calibrator.quantize(unit)}, unit


def floats(unit, name):
    """Float weight [N, K] float64 of a layer."""
    return unit.observed.block.get_submodule(name).weight.numpy().astype(np.float64)


# --- all of them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("formats", [(), FLOATS])
def test_every_method_gives_whole_layers_of_its_kind(method, formats):
    layers, unit = layers_of(method, *formats)
    assert [f"blocks.0.{name}" for name in layers] == [plan.name for plan in unit.plans]
    dynamic, asymmetric = method == "vidit_q", not formats
    for layer in layers.values():
        assert layer.granularity == "per_channel" and layer.weight_format == ("E2M1" if formats else "INT4")
        assert layer.activation_scaling == ("per_token" if dynamic else "per_tensor")
        assert (layer.activation_zero is None) == (dynamic or not asymmetric)
        expected = "E2M3" if formats else "INT8" if dynamic else "UE1M7"
        assert layer.activation_format == expected


@pytest.mark.parametrize("method", METHODS)
def test_the_same_context_gives_the_same_bytes(method):
    once, twice = (layers_of(method)[0] for _ in range(2))
    for name, layer in once.items():
        for key in ("codes", "scales", "bias", "activation_scale", "activation_zero", "input_multiplier"):
            np.testing.assert_array_equal(getattr(layer, key), getattr(twice[name], key))


@pytest.mark.parametrize("method", METHODS)
def test_wide_formats_reproduce_the_layer_and_a_dropped_input_map_does_not(method):
    layers, unit = layers_of(method, *WIDE)
    mapped = {"ptq4dm": 0, "tfmq_dm": 0, "repq_vit": 4, "ptq4dit": 5, "vidit_q": 6}[method]
    assert sum(layer.input_multiplier is not None for layer in layers.values()) == mapped
    for name, layer in layers.items():
        x = torch.cat(unit.observed.layer_inputs(f"blocks.0.{name}"))
        y = unit.observed.block.get_submodule(name)(x)
        error = (FakeQuantLinear(layer, torch.float32)(x) - y).norm() / y.norm()
        # INT8 has 127 steps to a row's or tensor's reach. Of Gaussian values that is 3 to 5 deviations: the noise of a
        # rounding is reach / 127 / sqrt(12), below 0.02 of the deviation even at twice that reach, on either side.
        assert error < 0.03
        if layer.input_multiplier is not None:
            bare = replace(layer, input_multiplier=None, input_offset=None)
            assert (FakeQuantLinear(bare, torch.float32)(x) - y).norm() / y.norm() > 10 * error


@pytest.mark.parametrize("method", [method for method in METHODS if method != "repq_vit"])
def test_the_recipes_groups_are_used_on_request(method):
    layers, _ = layers_of(method, 'calibrate.options.granularity="recipe"')
    assert {layer.granularity for layer in layers.values()} == {"exact_group"}


def test_refusals():
    with pytest.raises(RecipeError, match="granularity 'group'; use one of per_channel, recipe"):
        observed.make("ptq4dm", 'calibrate.options.granularity="group"')
    with pytest.raises(RecipeError, match="rows 0 must be positive"):
        layers_of("ptq4dm", "calibrate.options.rows=0")
    with pytest.raises(RecipeError, match=r"alpha 1.5 of vidit_q must be between 0 and 1"):
        layers_of("vidit_q", "calibrate.options.alpha=1.5")
    with pytest.raises(RecipeError, match="layer kind 'qkv' is unknown"):
        layers_of("ptq4dit", 'calibrate.options.kinds="qkv"')
    with pytest.raises(RecipeError, match="range search 'best' is unknown"):
        layers_of("ptq4dm", 'calibrate.options.search="best"')
    with pytest.raises(RecipeError, match="repq_vit has no option 'granularity'"):
        layers_of("repq_vit", 'calibrate.options.granularity="recipe"')
    with pytest.raises(RecipeError, match=r"iterations -1 must not be negative"):
        layers_of("tfmq_dm", "calibrate.options.iterations=-1")
    with pytest.raises(RecipeError, match=r"deviation 0.0 of ptq4dm must be above 0"):
        layers_of("ptq4dm", "calibrate.options.deviation=0.0")


# --- PTQ4DM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "deviation"), [(0.4, 0.4), (0.0, 0.1), (0.9, 2.0)])
def test_shares_are_those_of_clamped_draws(mean, deviation):
    steps, n_steps, draws = [0, 3, 4, 9], 10, 200_000
    t = np.clip(np.random.default_rng(0).normal(mean, deviation, draws), 0, 1)
    places = np.array([1 - step / (n_steps - 1) for step in steps])
    nearest = np.abs(t[:, None] - places).argmin(axis=1)
    shares = skewed_shares([*steps, 3, 3], n_steps, mean, deviation)
    assert sum(shares.values()) == pytest.approx(1)
    for i, step in enumerate(steps):
        # five deviations of a binomial share
        assert shares[step] == pytest.approx((nearest == i).mean(), abs=5 * 0.5 / np.sqrt(draws))


def test_thinning_keeps_a_spread_share_of_each_part():
    parts = [thinned(torch.arange(10), share) for share in (1.0, 0.3)]
    assert [part.tolist() for part in parts] == [list(range(10)), [0, 4, 9]]
    assert len(thinned(torch.arange(4), 0.01)) == 1


def test_ptq4dm_sees_more_of_the_clean_end_and_settles_the_least_squared_error():
    method, unit = observed.make("ptq4dm")
    rows = method.rows(unit, "blocks.0.up")
    counts = {step: len(x) for step, x in zip([call.step for call in method.context.data.calls], rows, strict=True)}
    shares = skewed_shares(list(counts), observed.STEPS, 0.4, 0.4)
    most = max(shares.values())
    assert counts == {step: max(1, round(24 * share / most)) for step, share in shares.items()}
    assert counts[observed.STEPS - 1] > counts[0]
    layer = {short(layer.name): layer for layer in method.quantize(unit)}["up"]
    x = torch.cat(rows).numpy().ravel().astype(np.float64)
    errors = []
    for share in np.linspace(1, 0.01, 100):
        low, high = x.min() * share, x.max() * share
        step = (high - low) / 255
        grid = (np.arange(256) + np.round(low / step)) * step
        errors.append(((x - grid[np.abs(x[:, None] - grid).argmin(1)]) ** 2).sum())
    scale, zero = float(layer.activation_scale[0]), float(layer.activation_zero[0])
    grid = zero + np.arange(256) / 64 * scale
    error = ((x - grid[np.abs(x[:, None] - grid).argmin(1)]) ** 2).sum()
    assert error == pytest.approx(min(errors), rel=1e-4)  # scale and zero are float32: 6e-8 of 255 steps


# --- RepQ-ViT ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["INT4", "INT8", "E2M1", "E2M3", "UE1M3", "UE1M7"])
def test_percentile_ranges_are_the_best_of_three(name):
    fmt, rng = get_format(name), np.random.default_rng(0)
    x = (rng.standard_t(3, (4000, 3)) * [1, 5, 0.01] + [0, 20, -0.3]).astype(np.float32)
    ranges = repq_vit.percentile_ranges(x, fmt)
    values = np.unique(fmt.values[np.abs(fmt.values) <= fmt.max_value])
    for c in range(3):
        column, candidates = x[:, c].astype(np.float64), []
        for tail in TAILS:
            if fmt.sign_bits:
                scale, zero = np.quantile(np.abs(column), 1 - tail) / fmt.max_value, 0.0
            else:
                low, high = np.quantile(column, [tail, 1 - tail])
                step = (high - low) / (len(values) - 1)
                scale, zero = step * (len(values) - 1) / fmt.max_value, round(low / step) * step
            grid = values * scale + zero
            error = ((column - grid[np.abs(column[:, None] - grid).argmin(1)]) ** 2).sum()
            candidates.append((error, scale, zero))
        _, scale, zero = min(candidates)
        assert ranges.scale[c] == pytest.approx(scale, rel=1e-6)  # the quantiles of float32 values are interpolated
        assert ranges.zero[c] == pytest.approx(zero, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["INT8", "E2M3", "UE1M7", "UE1M3"])
def test_refolding_is_the_quantizer_per_channel(name):
    fmt, rng = get_format(name), np.random.default_rng(1)
    x = (rng.standard_normal((500, 6)) * [1, 5, 0.01, 3, 3, 40] + [0, 20, -0.3, 1, -50, 3]).astype(np.float32)
    ranges = repq_vit.percentile_ranges(x, fmt)
    to, scale, zero = repq_vit.refold(ranges)
    for value in fmt.values[np.abs(fmt.values) <= fmt.max_value]:
        per_channel = ranges.zero + value * ranges.scale
        offset = 0.0 if to.offset is None else to.offset.astype(np.float64)
        folded = (zero + value * scale - offset) / to.multiplier
        # multiplier and offset are float32: a roundoff of every term, relative to the channel's reach
        reach = np.abs(ranges.zero) + fmt.max_value * ranges.scale + abs(zero) / to.multiplier
        assert (np.abs(folded - per_channel) <= 4 * 2.0**-24 * reach).all()
    assert (to.offset is None) == bool(fmt.sign_bits)
    assert scale == pytest.approx(ranges.scale.mean())


def test_repq_gives_readers_of_one_tensor_one_quantizer_and_the_bias_the_offset():
    layers, unit = layers_of("repq_vit")
    for key in ("input_multiplier", "input_offset", "activation_scale", "activation_zero"):
        values = [getattr(layers[name], key).tolist() for name in ("to_q", "to_k", "to_v")]
        assert values[0] == values[1] == values[2]
    layer, bias = layers["up"], unit.observed.block.up.bias.numpy()
    expected = bias - (floats(unit, "up") / layer.input_multiplier) @ layer.input_offset
    np.testing.assert_allclose(layer.bias, expected, rtol=1e-5, atol=1e-5)
    assert layers["down"].input_multiplier is None


# --- PTQ4DiT -------------------------------------------------------------------------------------------------------


def slow_ranks(values):
    return [sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def slow_spearman(one, other):
    return np.corrcoef(slow_ranks(one), slow_ranks(other))[0, 1]


def test_rank_correlation():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 40).astype(float), rng.standard_normal(40)
    assert ptq4dit.ranks(one).tolist() == slow_ranks(one)
    assert ptq4dit.spearman(one, other) == pytest.approx(slow_spearman(one, other), abs=1e-12)
    assert ptq4dit.spearman(other, np.exp(other)) == pytest.approx(1)
    assert ptq4dit.spearman(other, -other) == pytest.approx(-1)
    assert ptq4dit.spearman(np.ones(40), other) == 0


def test_salience_prefers_steps_where_weight_and_activation_disagree():
    w = np.arange(1.0, 9)
    agree, disagree = w.copy(), w[::-1].copy()
    salience = ptq4dit.salience(np.stack([agree, disagree]), w)
    a, b = np.exp(-1), np.exp(1)
    np.testing.assert_allclose(salience, (a * agree + b * disagree) / (a + b))


def test_ptq4dit_balances_with_the_joint_salience_of_all_readers():
    layers, unit = layers_of("ptq4dit")
    names = ["to_q", "to_k", "to_v"]
    w = np.abs(np.concatenate([floats(unit, name) for name in names])).max(axis=0)
    by_time: dict[float, list] = {}
    for x, t in zip(unit.observed.layer_inputs("blocks.0.to_q"), unit.observed.timesteps, strict=True):
        by_time.setdefault(t, []).append(np.abs(x.numpy().astype(np.float64)).max(axis=0))
    peaks = [np.max(parts, axis=0) for parts in by_time.values()]
    weights = [np.exp(-slow_spearman(peak, w)) for peak in peaks]
    x = sum(weight * peak for weight, peak in zip(weights, peaks, strict=True)) / sum(weights)
    for name in names:
        np.testing.assert_allclose(layers[name].input_multiplier, np.sqrt(w / x), rtol=1e-6)
    assert layers["to_out"].input_multiplier is not None and layers["down"].input_multiplier is None


def test_balance_evens_out_the_reach_of_input_channels():
    layers, unit = layers_of("ptq4dit", "calibrate.options.iterations=0")
    x = torch.cat(unit.observed.layer_inputs("blocks.0.up")).abs().amax(0).numpy()
    after = x * layers["up"].input_multiplier
    assert after.max() / after.min() < 0.3 * x.max() / x.min()


# --- TFMQ-DM and learning ------------------------------------------------------------------------------------------


def test_tfmq_learns_temporal_layers_apart_and_scales_them_per_token():
    layers, unit = layers_of("tfmq_dm", adaln=True)
    assert layers["adaln"].activation_scaling == "per_token" and layers["adaln"].activation_format == "INT8"
    assert {layers[name].activation_scaling for name in observed.KINDS} == {"per_tensor"}
    # The row's absmax is the range of its timestep: per-token codes are those of a table with one entry for each row.
    x = unit.observed.layer_inputs("blocks.0.adaln")[0]
    table = (x.abs().amax(1, keepdim=True) / 127).numpy()
    rounded = np.rint(x.numpy() / table) * table
    output = FakeQuantLinear(layers["adaln"], torch.float32)(x)
    weight, bias = layers["adaln"].dequantized(), layers["adaln"].bias
    np.testing.assert_allclose(output.numpy(), rounded @ weight.T + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["tfmq_dm", "ptq4dit"])
def test_learned_rounding_is_better_than_nearest_and_stays_on_neighbours(method):
    nearest, unit = layers_of(method, "calibrate.options.iterations=0")
    learned, _ = layers_of(method, "calibrate.options.iterations=300", "calibrate.options.lr=0.03")
    losses = [output_loss(unit.observed, list(layers.values())) for layers in (learned, nearest)]
    assert losses[0] < losses[1]
    for name, layer in learned.items():
        weight = floats(unit, name)
        if layer.input_multiplier is not None:
            weight = weight / layer.input_multiplier
        reach = layer.scales * FORMATS["INT4"].max_value
        away = np.abs(layer.dequantized() - np.clip(weight, -reach, reach)) / layer.scales
        assert away.max() < 1 + 1e-5 and away.max() > 0.5


# --- ViDiT-Q -------------------------------------------------------------------------------------------------------


def test_running_mean_and_sample_peaks():
    values = np.random.default_rng(0).standard_normal((4, 3))
    expected = 0.9**3 * values[0] + 0.1 * (0.9**2 * values[1] + 0.9 * values[2] + values[3])
    np.testing.assert_allclose(vidit_q.running_mean(values, 0.9), expected)
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = [np.mean([max(abs(float(v)) for v in x[b, :, c]) for b in range(2)]) for c in range(3)]
    np.testing.assert_allclose(vidit_q.sample_peaks(x).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(vidit_q.sample_peaks(x[:, 0]).numpy(), x[:, 0].abs().mean(0).numpy(), rtol=1e-6)


def test_vidit_balances_by_the_running_mean_over_calls_in_order():
    layers, unit = layers_of("vidit_q", "calibrate.options.alpha=0.4", "calibrate.options.momentum=0.5")
    names = ["to_q", "to_k", "to_v"]
    w = np.abs(np.concatenate([floats(unit, name) for name in names])).max(axis=0)
    mean = None
    for x in unit.observed.layer_inputs("blocks.0.to_q"):
        peak = np.abs(x.numpy().reshape(observed.SAMPLES, observed.TOKENS, -1)).max(1).mean(0)
        mean = peak if mean is None else 0.5 * mean + 0.5 * peak
    for name in names:
        np.testing.assert_allclose(layers[name].input_multiplier, w**0.6 / mean**0.4, rtol=1e-5)


def test_kinds_choose_what_is_balanced():
    layers, _ = layers_of("vidit_q", 'calibrate.options.kinds="ff.in"')
    assert [name for name, layer in layers.items() if layer.input_multiplier is not None] == ["up"]
