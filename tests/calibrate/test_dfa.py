"""DFA's weights against the sampler's formulas and finite differences; the loss against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.calibrate.learn.dfa import dfa_loss, loss_weights, prediction_weights
from pipeline.generate.sampling import BETA_FIRST, BETA_LAST, SAMPLERS, TRAIN_STEPS, make_sampler, sample


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("n_steps", [1, 5, 20])
def test_gamma_is_the_finite_difference_of_the_update(name, n_steps):
    sampler = make_sampler(name, n_steps)
    rng = np.random.default_rng(0)
    x, prediction = rng.standard_normal((2, 64)).astype(np.float32)
    gamma = prediction_weights(sampler)
    for i in range(n_steps):
        step = np.float32(0.5)
        up, down = (sampler.advance(x, prediction + sign * step, i) for sign in (1, -1))
        difference = np.abs(up - down) / (2 * step)
        # Update and numbers are float32 of magnitude below 2^4, the difference divides by 1: 2^-24 * 2^4 * a few. In
        # ddim both terms are divided by sqrt(k), which is above 2^-8.
        np.testing.assert_allclose(difference, gamma[i], atol=2.0**-10 if name == "ddim" else 2.0**-17)


@pytest.mark.parametrize("n_steps", [4, 20])
def test_gamma_is_the_formula_of_each_sampler(n_steps):
    # advance rounds its coefficients to float32.
    np.testing.assert_allclose(prediction_weights(make_sampler("flow_euler", n_steps)), 1 / n_steps, rtol=2.0**-22)
    kept = np.cumprod(1 - np.linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS))
    stride = TRAIN_STEPS // n_steps
    times = np.arange(n_steps)[::-1] * stride
    then = np.where(times >= stride, kept[times - stride], 1.0)
    now = kept[times]
    expected = np.abs(np.sqrt(1 - then) - np.sqrt(then) * np.sqrt(1 - now) / np.sqrt(now))
    # A difference of two numbers up to 1 / sqrt(k) < 2^8, each rounded a few times.
    np.testing.assert_allclose(prediction_weights(make_sampler("ddim", n_steps)), expected, atol=2.0**-13)


@pytest.mark.parametrize(("guidance", "halves"), [(1.0, [1]), (2.0, [2, 1]), (0.5, [0.5, 0.5])])
def test_weights_have_the_mean_1_and_are_1_without_dfa(guidance, halves):
    sampler = make_sampler("ddim", 10)
    steps = [0, 3, 3, 9]
    weights = loss_weights(sampler, steps, guidance, use_dfa=True)
    gamma = prediction_weights(sampler)[steps]
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(weights / weights[0, 0], np.outer(gamma, halves) / (gamma[0] * halves[0]), rtol=1e-6)
    plain = loss_weights(sampler, steps, guidance, use_dfa=False)
    np.testing.assert_array_equal(plain, np.ones((4, len(halves))))


def test_halves_weigh_what_they_move_in_a_guided_step():
    """Finite difference of one guided step of `sample` by an error in one half of the model's output."""
    sampler, noise = make_sampler("flow_euler", 1), np.zeros((1, 1, 2, 2), np.float32)
    empty = {"class_labels": np.zeros(1)}

    def picture(conditioned, plain):
        def run(inputs):
            return {"sample": np.stack([np.full((1, 2, 2), value, np.float32) for value in (conditioned, plain)])}

        return sample(run, (empty, empty), noise, sampler, 3.0)

    weights = loss_weights(sampler, [0], 3.0, use_dfa=True)[0]
    moved = [np.abs(picture(*error) - picture(0, 0)).mean() for error in ((0.25, 0), (0, 0.25))]
    np.testing.assert_allclose(moved[0] / moved[1], weights[0] / weights[1], rtol=1e-6)


def test_a_rectified_flow_with_even_steps_is_left_as_it_is_but_for_guidance():
    weights = loss_weights(make_sampler("flow_euler", 20), range(20), 1.0, use_dfa=True)
    np.testing.assert_allclose(weights, 1, rtol=2.0**-21)


def test_the_loss_is_the_weighted_mean_square():
    rng = np.random.default_rng(1)
    output, target = rng.standard_normal((2, 3, 2, 4, 4))
    weight = rng.uniform(0, 2, 3)
    expected = np.mean([w * np.mean((a - b) ** 2) for w, a, b in zip(weight, output, target, strict=True)])
    loss = dfa_loss(*(torch.from_numpy(value) for value in (output, target, weight)))
    np.testing.assert_allclose(float(loss), expected, rtol=1e-12)
