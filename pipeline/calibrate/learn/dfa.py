"""MSFP's loss (DFA, arXiv 2505.21591): L_t = gamma_t * |prediction_float - prediction_quantized|^2.

gamma_t is the weight of the model's prediction in the sampler's update at t: how far an error of the prediction moves
the picture. Every sampler here is linear in the prediction, x' = a x + b e, so gamma_t = |b| is what one step makes of
x = 0 and e = 1:

flow_euler: x' = x + (t' - t) v, gamma_t = t - t', which is 1 / n_steps for every step of evenly spaced times.
flow_euler_rising: x' = x + (t' - t) v of times that rise, gamma_t = t' - t, which is 1 / n_steps, too.
ddim: x' = sqrt(k') (x - sqrt(1 - k) e) / sqrt(k) + sqrt(1 - k') e with k the signal's share of the power (alpha bar),
    gamma_t = |sqrt(1 - k') - sqrt(k') sqrt(1 - k) / sqrt(k)|. The paper's own formula was not seen; for DDPM it is
    recalled as (1 - alpha_t) / (sqrt(alpha_t) sqrt(1 - k)), the same idea.

With guidance g the update's prediction is g * conditional + (1 - g) * unconditional, so the two halves of a call have
the weights |g| gamma_t and |1 - g| gamma_t. This is our continuation of the idea: the paper was not seen to speak of
guidance. For a rectified flow with even steps it is all that DFA changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.generate.sampling import Sampler


def prediction_weights(sampler: Sampler) -> NDArray[np.float64]:
    """gamma of every step, [n_steps] float64, as the sampler has it (not normalised)."""
    nothing, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return np.array([abs(float(sampler.advance(nothing, one, i)[0])) for i in range(sampler.n_steps)])


def loss_weights(sampler: Sampler, steps: Sequence[int], guidance_scale: float, use_dfa: bool) -> NDArray[np.float32]:
    """Weight of the loss at each of `steps`, float32 [len(steps), halves]: conditional, then unconditional.

    One half without guidance (scale 1). The mean is 1, so that one learning rate serves with and without DFA; without
    all weights are 1.
    """
    halves = [1.0] if guidance_scale == 1.0 else [abs(guidance_scale), abs(1.0 - guidance_scale)]
    if not use_dfa:
        return np.ones((len(steps), len(halves)), np.float32)
    gamma = prediction_weights(sampler)[list(steps), None] * np.array(halves)
    return (gamma / gamma.mean()).astype(np.float32)


def dfa_loss(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of weight[i] * (output[i] - target[i])^2; output, target [B, ...], weight [B]."""
    per_sample = (output - target).square().flatten(1).mean(1)
    return (weight * per_sample).mean()
