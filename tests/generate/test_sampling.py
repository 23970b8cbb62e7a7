"""Samplers against closed forms and diffusers' own schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from export.errors import ContractError, RecipeError
from pipeline.generate.sampling import SAMPLERS, make_sampler, sample

SHAPE = (2, 3, 4, 4)


def random(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def conditioning(value=1.0, empty=0.0):
    return {"c": np.full((2, 5), value, np.float32)}, {"c": np.full((2, 5), empty, np.float32)}


def test_flow_of_straight_paths_ends_at_the_data():
    data, noise = random(0), random(1)
    sampler = make_sampler("flow_euler", 7)
    latents = sample(lambda inputs: {"sample": noise - data}, conditioning(), noise, sampler, 1.0)
    np.testing.assert_allclose(
        latents, data, atol=8 * 2.0**-24 * 2 * np.abs(noise - data).max()
    )  # 7 steps of 2 roundings
    np.testing.assert_allclose(sampler.timesteps, 1000 * (1 - np.arange(7) / 7), rtol=1e-6)


def test_time_that_rises_goes_the_same_way_with_the_opposite_velocity():
    latents, velocity = random(0), random(1)
    falling, rising = make_sampler("flow_euler", 5, 1.0), make_sampler("flow_euler_rising", 5, 1.0)
    np.testing.assert_allclose(rising.timesteps, 1 - falling.timesteps, atol=2.0**-23)
    for step in range(5):
        for one, other in zip(
            rising.step(latents, -velocity, step), falling.step(latents, velocity, step), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_ddim_is_diffusers_ddim():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(20)
    weight, noise = random(2, (3, 3)), random(3)

    def predict(x):
        return np.einsum("dc,bchw->bdhw", weight, np.tanh(x)).astype(np.float32)

    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(predict(x.numpy())), t, x).prev_sample
    sampler = make_sampler("ddim", 20)
    latents = sample(lambda inputs: {"sample": predict(inputs["hidden_states"])}, conditioning(), noise, sampler, 1.0)
    np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_allclose(latents, x.numpy(), rtol=1e-3, atol=1e-3)  # diffusers' schedule is computed in float32


def test_noise_alone_is_removed_exactly_by_ddim():
    noise = random(4)
    latents = sample(lambda inputs: {"sample": noise}, conditioning(), noise, make_sampler("ddim", 5), 1.0)
    kept = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[800]
    data = noise * (1 - np.sqrt(1 - kept)) / np.sqrt(kept)  # the first step's estimate, which the others keep
    np.testing.assert_allclose(latents, data, rtol=1e-4, atol=1e-5)


def test_guidance_runs_both_halves_as_one_batch_and_extrapolates():
    seen = []

    def run(inputs):
        seen.append(inputs)
        return {"sample": np.broadcast_to(inputs["c"][:, :1, None, None], (len(inputs["c"]), *SHAPE[1:]))}

    noise = random(5)
    latents = sample(run, conditioning(value=3.0, empty=1.0), noise, make_sampler("flow_euler", 1), 2.5)
    np.testing.assert_array_equal(seen[0]["hidden_states"], np.concatenate([noise, noise]))
    np.testing.assert_array_equal(seen[0]["c"][:, 0], [3, 3, 1, 1])
    assert seen[0]["timestep"].dtype == np.float32 and (seen[0]["timestep"] == 1000).all()
    np.testing.assert_allclose(latents, noise - (1 + 2.5 * (3 - 1)), rtol=1e-6, atol=1e-6)


def test_without_guidance_the_prompt_runs_alone():
    shapes = []

    def run(inputs):
        shapes.append(inputs["hidden_states"].shape)
        return {"sample": inputs["hidden_states"]}

    sample(run, conditioning(), random(6), make_sampler("flow_euler", 3), 1.0)
    assert shapes == [SHAPE] * 3


def test_tables_without_a_batch_axis_are_passed_once():
    table, seen = np.ones((2, 4), np.float32), []

    def run(inputs):
        seen.append(inputs["image_rotary_cos"])
        return {"sample": inputs["hidden_states"]}

    both = ({"image_rotary_cos": table}, {"image_rotary_cos": table})
    sample(run, both, random(7), make_sampler("flow_euler", 1), 2.0, shared=frozenset({"image_rotary_cos"}))
    assert seen[0].shape == table.shape


def test_a_learned_sigma_is_dropped():
    def run(inputs):
        x = inputs["hidden_states"]
        return {"sample": np.concatenate([x, np.full_like(x, np.nan)], axis=1)}

    assert np.isfinite(sample(run, conditioning(), random(8), make_sampler("ddim", 2), 2.0)).all()


def test_every_call_is_shown_and_the_state_stays_float32():
    steps = []
    result = sample(
        lambda inputs: {"sample": inputs["hidden_states"].astype(np.float64)}, conditioning(), random(9),
        make_sampler("flow_euler", 4), 2.0, lambda i, inputs, outputs: steps.append((i, inputs["hidden_states"].dtype)),
    )  # fmt: skip
    assert steps == [(i, np.float32) for i in range(4)] and result.dtype == np.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_go_one_way_and_scale(name):
    plain, scaled = make_sampler(name, 10), make_sampler(name, 10, 1.0)
    sign = 1 if name == "flow_euler_rising" else -1
    assert (sign * np.diff(plain.timesteps) > 0).all() and plain.n_steps == 10
    np.testing.assert_allclose(scaled.timesteps * 1000, plain.timesteps, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "n_steps", "words"),
    [("euler", 5, "unknown; use one of"), ("ddim", 0, "at least 1"), ("ddim", 1001, "at most")],
)
def test_wrong_choices_are_refused(name, n_steps, words):
    with pytest.raises(RecipeError, match=words):
        make_sampler(name, n_steps)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"other": random(0)}, "the engine gives other instead of `sample`"),
        ({}, "the engine gives nothing instead of `sample`"),
        ({"sample": random(0).ravel()}, r"`sample` of float32 \(96,\) for latents of \(2, 3, 4, 4\)"),
        ({"sample": random(0)[:1]}, r"float32 \(1, 3, 4, 4\)"),
        ({"sample": random(0)[:, :2]}, r"float32 \(2, 2, 4, 4\)"),
        ({"sample": random(0)[..., :2]}, r"float32 \(2, 3, 4, 2\)"),
        ({"sample": random(0).astype(str)}, "`sample` of <U"),
    ],
)
def test_an_output_that_is_no_prediction_is_refused(outputs, message):
    with pytest.raises(ContractError, match=message):
        sample(lambda inputs: outputs, conditioning(), random(0), make_sampler("flow_euler", 2), 1.0)
