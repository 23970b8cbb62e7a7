"""The method "msfp" on tiny models: its ablation by options, tuning that helps, resume to the same bytes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from export import checkpoint
from export.checkpoint import shared_router
from export.errors import RecipeError, ResourceError
from export.formats.format import get_format
from export.models.load import denoiser, load
from pipeline.backends.reference import fake_quant
from pipeline.calibrate import calibrate
from pipeline.calibrate.data import calibration_data
from pipeline.calibrate.learn import tuning as talora_tuning
from pipeline.calibrate.learn.dfa import loss_weights, prediction_weights
from pipeline.calibrate.learn.talora import Branches
from pipeline.calibrate.learn.tuning import Tuner, TuningBatches, TuningSettings
from pipeline.generate.sampling import make_sampler
from pipeline.recipe import load as load_recipe
from pipeline.recipe import with_settings
from tests.support import tiny

pytestmark = pytest.mark.torch

SMALL = (
    "method=msfp",
    "formats.activation=E2M1",
    "calibrate.size=3",
    "calibrate.timesteps=2",
    "sampling.n_steps=4",
    "weights.group_size=32",
    "calibrate.options.iterations=6",
    "calibrate.options.batch=4",
    "calibrate.options.lora_rank=2",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DITC_CACHE", str(tmp_path / "cache"))


def model_and_recipe(tmp_path, *options, family="pixart"):
    model = load(str(tiny.folder(family, tmp_path / family)))
    settings = [*SMALL, *(f"calibrate.options.{option}" for option in options)]
    return model, replace(with_settings(load_recipe("pixart_w4a6"), settings), model=str(model.folder))


def digest(folder):
    files = (checkpoint.WEIGHTS_FILE, checkpoint.LAYERS_FILE)
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files]


def of_kind(layers, kind):
    return [layer for layer in layers if layer.kind == kind]


def test_base_is_signed_static_and_without_branches(tmp_path):
    layers = calibrate(*model_and_recipe(tmp_path, "mixed_sign=false", "use_lora=false"), tmp_path / "out")
    assert all(layer.activation_scaling == "per_tensor" and layer.granularity == "per_channel" for layer in layers)
    assert all(get_format(layer.activation_format).sign_bits and layer.lora_down is None for layer in layers)
    assert all(
        get_format(layer.activation_format).bits == get_format(layer.weight_format).bits == 4 for layer in layers
    )


def test_mixed_sign_reaches_the_anomalous_kinds_only(tmp_path):
    layers = calibrate(*model_and_recipe(tmp_path, "use_lora=false"), tmp_path / "out")
    unsigned = {layer.kind for layer in layers if not get_format(layer.activation_format).sign_bits}
    assert unsigned == {"ff.out"}
    assert all(layer.activation_zero[0] <= 0 for layer in of_kind(layers, "ff.out"))


def test_silu_fed_adaln_is_anomalous_too(tmp_path):
    layers = calibrate(*model_and_recipe(tmp_path, "use_lora=false", family="hunyuan"), tmp_path / "out")
    unsigned = {layer.kind for layer in layers if not get_format(layer.activation_format).sign_bits}
    assert "adaln" in unsigned and unsigned <= {"adaln", "ff.out"}


def test_per_token_keeps_zero_points_where_they_are_better(tmp_path):
    layers = calibrate(*model_and_recipe(tmp_path, "use_lora=false", "activations=per_token"), tmp_path / "out")
    for layer in layers:
        signed = bool(get_format(layer.activation_format).sign_bits)
        assert layer.activation_scaling == ("per_token" if signed else "per_tensor")
    assert all(layer.activation_scaling == "per_token" for layer in layers if layer.kind != "ff.out")


def test_branches_share_one_router_and_lower_the_error(tmp_path):
    model, recipe = model_and_recipe(tmp_path, "iterations=60", "lr=0.01")
    tuned = calibrate(model, recipe, tmp_path / "tuned")
    plain = calibrate(model, with_settings(recipe, ["calibrate.options.use_lora=false"]), tmp_path / "plain")
    assert shared_router(tuned).branches == 2
    data = calibration_data(model, recipe)

    def error(layers):
        module = fake_quant(model, layers, torch.float32)
        total = 0.0
        for call in data.calls:
            inputs = {key: torch.from_numpy(value) for key, value in call.inputs.items()}
            with torch.no_grad():
                total += float((module(**inputs) - denoiser(model)(**inputs))[:, :4].square().sum())
        return total

    assert error(tuned) < 0.8 * error(plain)
    for layer, before in zip(tuned, plain, strict=True):
        np.testing.assert_array_equal(layer.codes, before.codes)  # branches alone have learned


@pytest.mark.parametrize("use_dfa", ["true", "false"])
def test_tuning_is_given_the_weights_of_dfa_and_moves_the_router(use_dfa, tmp_path, monkeypatch):
    """Of DiT's ddim sampler, whose steps weigh differently, with guidance."""
    model, recipe = model_and_recipe(tmp_path, f"use_dfa={use_dfa}", "iterations=2", "router_lr=0.01", family="dit")
    tuner_weights, make = [], Tuner.__init__

    def kept(tuner, model, layers, calls, weights, *more):
        tuner_weights.extend(weights)
        make(tuner, model, layers, calls, weights, *more)

    monkeypatch.setattr(Tuner, "__init__", kept)
    router = shared_router(calibrate(model, recipe, tmp_path / "out"))
    data, guidance = calibration_data(model, recipe), recipe.sampling.guidance_scale
    steps = [call.step for call in data.calls]
    gamma = prediction_weights(make_sampler("ddim", data.n_steps))[steps]
    expected = np.outer(gamma, [guidance, guidance - 1]) if use_dfa == "true" else np.ones((len(steps), 2))
    assert len(set(gamma)) == 2 and guidance > 1
    np.testing.assert_allclose(tuner_weights, expected / expected.mean(), rtol=1e-5)  # float32
    before = talora_tuning._router(data.calls, Branches(2, 2), recipe.calibrate.seed).exported()
    moved = [np.abs(getattr(router, key) - getattr(before, key)).max() for key in ("w1", "b1", "w2", "b2")]
    assert min(moved) > 1e-3  # two steps of Adam, of 0.01 at first


def test_the_tuned_model_is_the_finished_one(tmp_path):
    """What tuning saw and what the checkpoint holds give one prediction, but for branches rounded to fp16."""
    model, recipe = model_and_recipe(tmp_path, "use_lora=false", "activations=per_token")
    tuner = make_tuner(model, recipe, tmp_path)
    tuner.step(0)
    inputs, target, _ = tuner.batches.draw(1)
    with torch.no_grad():
        prediction = tuner.predict(inputs, target.shape[1])
        expected = fake_quant(model, tuner.layers(), torch.float32)(**inputs)
    error = (prediction - expected[:, : target.shape[1]]).norm() / (prediction - target).norm()
    assert error < 0.1  # of the quantization error; a wrong branch or a missing zero costs all of it


def make_tuner(model, recipe, tmp_path):
    layers = calibrate(model, recipe, tmp_path / "layers")
    data = calibration_data(model, recipe)
    settings = TuningSettings(10, batch=4)
    return Tuner(model, layers, data.calls, [[1.0, 1.0]] * len(data.calls), Branches(2, 2), settings)


def test_batches_join_inputs_targets_and_weights(tmp_path):
    model, recipe = model_and_recipe(tmp_path)
    data = calibration_data(model, recipe)
    weights = loss_weights(make_sampler("ddim", 4), [call.step for call in data.calls], 2.0, True).tolist()
    batches = TuningBatches(model, data.calls, weights, TuningSettings(10, batch=5))
    inputs, target, weight = batches.draw(3)
    module = denoiser(model)
    with torch.no_grad():
        expected = module(**inputs)[:, :4]
    # One batch or another in float32: GEMMs may sum in another order.
    np.testing.assert_allclose(target.numpy(), expected.numpy(), atol=1e-5)
    times = {call.timestep: i for i, call in enumerate(data.calls)}
    for row, (time, hidden) in enumerate(zip(inputs["timestep"].tolist(), inputs["hidden_states"], strict=True)):
        call = data.calls[times[time]]
        places = [i for i in range(6) if np.array_equal(call.inputs["hidden_states"][i], hidden.numpy())]
        captions = call.inputs["encoder_hidden_states"]
        (place,) = (i for i in places if np.array_equal(captions[i], inputs["encoder_hidden_states"][row].numpy()))
        assert weight[row] == pytest.approx(weights[times[time]][place // 3])
    again = batches.draw(3)
    assert torch.equal(target, again[1]) and not torch.equal(target, batches.draw(4)[1])


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_tuning_resumes_to_the_same_bytes(tmp_path, monkeypatch, stop):
    model, recipe = model_and_recipe(tmp_path)
    calibrate(model, recipe, tmp_path / "whole")
    monkeypatch.setattr(talora_tuning, "SAVE_EVERY_S", -1.0)
    step = Tuner.step

    def interrupted(tuner, iteration):
        if iteration == stop:
            raise KeyboardInterrupt
        return step(tuner, iteration)

    monkeypatch.setattr(Tuner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, recipe, tmp_path / "parts")
    done = []
    monkeypatch.setattr(Tuner, "step", lambda tuner, iteration: done.append(iteration) or step(tuner, iteration))
    calibrate(model, recipe, tmp_path / "parts")
    assert done == list(range(stop, 6))
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert not (tmp_path / "parts" / "talora").exists()


def test_a_damaged_state_is_begun_again(tmp_path):
    model, recipe = model_and_recipe(tmp_path, "use_lora=false")
    tuner = make_tuner(model, recipe, tmp_path)
    path = tmp_path / "talora.safetensors"
    path.write_bytes(b"not a state")
    before = [value.detach().clone() for value in tuner.parameters]
    assert tuner.load(path) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, tuner.parameters, strict=True))


def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    """Tokens and batch are enough for PyTorch to share sums among threads, if it were let."""
    files, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            monkeypatch.setenv("DITC_CACHE", str(tmp_path / f"cache of {threads}"))
            torch.set_num_threads(threads)
            model, recipe = model_and_recipe(tmp_path, "iterations=3", "batch=16")
            calibrate(model, recipe, tmp_path / str(threads))
            assert torch.get_num_threads() == threads
            files.append({path.name: path.read_bytes() for path in (tmp_path / str(threads)).iterdir()})
    finally:
        torch.set_num_threads(before)
    assert files[0] == files[1]


def test_memory_is_estimated_from_what_gradients_keep(tmp_path):
    model, recipe = model_and_recipe(tmp_path, "use_lora=false")
    small = make_tuner(model, recipe, tmp_path)
    estimate = small.activation_bytes()
    tokens, width = 16, tiny.WIDTH
    # Of every quantized linear at least its rounded input is kept; the feed-forward's is 4 times as wide.
    assert 4 * small.settings.batch * tokens * width * tiny.LAYERS * 8 < estimate < 2**28


def test_too_little_memory_is_told_before_tuning(tmp_path, monkeypatch):
    model, recipe = model_and_recipe(tmp_path)
    monkeypatch.setattr(talora_tuning.machine, "free_memory", lambda: talora_tuning.machine.FreeMemory(10**6))
    monkeypatch.setattr("pipeline.calibrate._refuse_too_large", lambda *args: None)
    with pytest.raises(ResourceError, match=r"TALoRA: activations of a batch of 4 take about .* GiB .* smaller"):
        calibrate(model, recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("activations=per_row", "activations 'per_row'; use one of per_tensor, per_token"),
        ("granularity=fine", "granularity 'fine'; use one of"),
        ("batch=0", "batch 0 at least 1"),
        ("lora_rank=0", "lora_rank 0 must be positive"),
        ("kinds=ff.fast", "layer kind 'ff.fast' is unknown"),
    ],
)
def test_bad_options_are_told(tmp_path, option, message):
    with pytest.raises(RecipeError, match=message):
        calibrate(*model_and_recipe(tmp_path, option), tmp_path / "out")
